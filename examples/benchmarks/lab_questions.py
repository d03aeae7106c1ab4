"""What the lab asks, one question a function, in the order of their importance.

A question wants runs of a plan (lab_plan.py), and notes in it what their table is to show.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lab_finetuning import finetuning, of_lora, tuning
from lab_plan import Plan, Results
from lab_settings import (
    LENGTHS,
    REST,
    grown,
    longer_periods,
    rest_varied,
    singly,
    tuned_at,
    vary,
    with_signs,
    with_the_head,
)
from lab_train import Job, model_of

Planner = Callable[[Results], Plan]

RANKS = (1 / 4, 1 / 8, 1 / 2, 1 / 16)
ROUNDINGS = ("", "nearest", "stochastic", "low bits")


def everything(
    base: Job, small: Job, words: Job, prose: str, results: Results, moves: int = 20
) -> Plan:
    """All questions, in the order of their importance.

    `base` and `small` are of two sizes, `words` of a larger vocabulary; `prose` is another text.
    """
    plan = Plan(results, moves)
    small_full = plan.sweep(small.size, small, RANKS)
    full = plan.sweep(base.size, base, RANKS[:2])
    tuned = None
    if full:
        roundings(plan, full, RANKS[1], (0, 1, 2))
    if small_full:
        resting(plan, small_full, RESTING, LENGTHS, (0, 1))
    if full:
        vary(plan, full, RANKS[1], LENGTHS[0], "rest_scale", (0.25, 0.5, 1.0, 2.0, 0.125))
    plan.sweep(base.size, base, RANKS[2:])
    plan.sweep(base.size, base, RANKS[:2], (50, 200))
    looked_up(plan, words, (True,))
    if full:
        vary(plan, full, RANKS[1], LENGTHS[1], "scale", (8, 4, 2, 16), REST)
        vary(plan, full, RANKS[1], LENGTHS[1], "scale", (8, 4), 0.0)
        vary(plan, full, RANKS[1], LENGTHS[1], "scale", (8, 4), 1.0)
    if small_full:
        vary(plan, small_full, RANKS[1], LENGTHS[1], "scale", (8, 4, 2), REST)
        vary(plan, small_full, RANKS[0], LENGTHS[1], "scale", (4, 2, 1), REST)
        vary(plan, small_full, RANKS[3], LENGTHS[1], "scale", (16, 8, 4), REST)
        vary(plan, small_full, RANKS[1], LENGTHS[2], "scale", (8, 4), REST)
        vary(plan, small_full, RANKS[1], LENGTHS[1], "scale", (8, 4, 16), 1.0)
        vary(plan, small_full, RANKS[1], LENGTHS[1], "scale", (8, 4), 0.0)
        beside(plan, small_full, RANKS[1], LENGTHS[1], (0, 1), in_micro_batches)
        grown(plan, small_full, RANKS[:2], LENGTHS[1])
        beside(plan, small_full, RANKS[1], LENGTHS[1], (0, 1), in_its_time)
        beside(plan, small_full, RANKS[0], LENGTHS[1], (0, 1), in_8_bits)
        other = replace(small_full, text=prose)
        resting(plan, other, RANKS[:2], LENGTHS[:2], (1,))
        of_peers(plan, small_full, RANKS[:2], LENGTHS[1:2], (0, 1))
        rest_varied(plan, small_full, RANKS[1])
    if full:
        vary(plan, full, RANKS[1], LENGTHS[1], "rest_scale", (0.25, 0.5, 1.0))
    if small_full:
        vary(plan, small_full, RANKS[1], LENGTHS[2], "rest_scale", (0.25, 0.5, 1.0))
        vary(plan, small_full, RANKS[0], LENGTHS[1], "rest_scale", (0.25, 0.5, 1.0))
        in_bfloat16(plan, small_full, prose, 2, (0, 1, 2))
    looked_up(plan, words, (False,))
    looked_up_further(plan, words, prose)
    if full:
        resting(plan, full, RANKS[:2], LENGTHS[1:2], (0, 1))
    wider = full and widened(full, products="bfloat16")
    wide = wider and plan.sweep(model_of(wider), wider, ())
    if wide:
        resting(plan, wide, RANKS[:2], LENGTHS[1:2], (0, 1, 2))
        beside(plan, wide, RANKS[0], LENGTHS[1], (0, 1), partial(at_another_rate, 0.5))
        longer_periods(plan, wide, RANKS[:2], LENGTHS[1:2])
    if small_full:
        if small_wide := plan.bracket(widened(small_full), ("linear_lr",)):
            resting(plan, small_wide, RANKS[:2], LENGTHS[1:2], (0,))
        ruled(plan, small_full, RANKS[:2], (1, LENGTHS[1]), (0, 1, 2))
        of_others(plan, small_full)
        longer_periods(plan, small_full, RANKS[:2], LENGTHS[1:], one_turn=True)
    if full:
        of_peers(plan, full, RANKS[:2], LENGTHS[1:2], (0, 1))
        with_the_head(plan, full, RANKS[0])
    if wide:
        resting(plan, replace(wide, text=prose), RANKS[:2], LENGTHS[1:2], (1,))
        resting(plan, wide, RANKS[:2], LENGTHS[2:], (0,))
        tuned_at(plan, wide, LENGTHS[1:])
        plan.sweep(model_of(wide), wide, RANKS[:2])
        of_peers(plan, wide, RANKS[:2], LENGTHS[1:2], (0,))
        resting(plan, replace(wide, text=prose), RANKS[:1], LENGTHS[2:], (1,))
    if small_full:
        tuned_at(plan, small_full, LENGTHS[1:])
        singly(plan, small_full, RANKS[:2], LENGTHS[1], (0, 1), signs=False)
        singly(plan, small_full, RANKS[:2], LENGTHS[1], (0, 1), signs=True)
    if wide:
        resting(plan, replace(wide, text=prose), RANKS[:2], LENGTHS[2:], (1,))
        of_peers(plan, wide, RANKS[:2], LENGTHS[1:2], (1,))
        in_bfloat16(plan, wide, prose, 5, (0, 1))
        for rank in RANKS[:2]:  # AdamW's best there is twice that of the sweeps
            beside(plan, wide, rank, LENGTHS[2], (0,), partial(at_another_rate, 2))
        of_peers(plan, wide, RANKS[:2], LENGTHS[1:2], (1,), prose)
        beside(plan, wide, RANKS[1], LENGTHS[1], (0, 1), in_its_time)
    if small_full:
        bfloat16 = replace(small_full, dtype="bfloat16")
        plan.sweep(f"{small.size}, bfloat16 weights", bfloat16, RANKS[:2])
        tuned = finetuning(plan, small_full, prose, RANKS[:2])
    plan.sweep(small.size, small, RANKS[:2], (50, 200))
    if small_full:
        roundings(plan, small_full, RANKS[1], (0,))
    if tuned:
        resting(plan, tuned, RANKS[:2], (1,), (0, 1))
        roundings(plan, tuned, RANKS[1], (0, 1))
    if small_full:
        repeats(plan, small_full, RANKS[:2], (0, 1, 2))
        roundings(plan, small_full, RANKS[1], (1, 2))
    plan.sweep(small.size, small, RANKS[2:], (50, 200))
    if full:
        ruled(plan, full, RANKS[:2], LENGTHS[1:2], (0, 1))
        resting(plan, full, RESTING, LENGTHS, (0, 1))
    return plan


def beside_peers(base: Job, results: Results, moves: int = 20) -> Plan:
    """The one question of `peers.py --scale lab`."""
    plan = Plan(results, moves)
    start = widened(base, products="bfloat16")
    if full := plan.sweep(model_of(start), start, RANKS[:2]):
        resting(plan, full, RANKS[:2], LENGTHS[1:2], (0, 1))
        of_peers(plan, full, RANKS[:2], LENGTHS[1:2], (0, 1))
    return plan


RESTING = (1 / 4, 1 / 8, 1 / 16)


def in_bfloat16(plan: Plan, full: Job, prose: str, before: int, seeds: Sequence[int]) -> None:
    """Fine-tuning of weights in bfloat16: signs, LoRA, and columns that never change."""
    if tuned := finetuning(plan, replace(full, dtype="bfloat16"), prose, RANKS[:2], before):
        resting(plan, tuned, RANKS[:2], (1,), (0, 1))
        of_lora(plan, tuned, RANKS[:2], seeds)


def of_others(plan: Plan, full: Job) -> None:
    """Other optimizers than AdamW in the subspace."""
    for method, rate in (("sgd", 0.25), ("muon", 1e-3)):
        start = replace(full, method=method, linear_lr=rate, steps=full.steps // 2)
        plan.sweep(f"{full.size}, {method}", start, RANKS[1:2], (50,), ("linear_lr",))


def resting(
    plan: Plan, full: Job, ranks: Sequence[float], lengths: Sequence[float], seeds: Sequence[int]
) -> None:
    """What it brings that columns which are not selected move, too, by the length of a run."""
    plan.resting += pairs(plan, full, ranks, lengths, seeds, with_signs)


def widened(job: Job, **more) -> Job:
    """The same with four times as many tokens a step."""
    return replace(job, batch=4 * job.batch, **more)


def beside(
    plan: Plan,
    full: Job,
    rank: float,
    length: float,
    seeds: Sequence[int],
    ways: Callable[[Job], list[Job]],
) -> None:
    """By seed: full gradients, then these ways of grass at n/r."""
    for seed in seeds:
        base = replace(full, steps=round(length * full.steps), seed=seed)
        jobs = [base, *ways(replace(base, rank=rank, scale=1 / rank))]
        if plan.want(jobs):
            plan.peers.append(jobs)


def in_micro_batches(grass: Job) -> list[Job]:
    """Whose signs count where a step has four gradients."""
    four = replace(with_signs(grass), micro_batches=4)
    return [grass, with_signs(grass), four, replace(four, rest_kind="last")]


def at_another_rate(factor: float, grass: Job) -> list[Job]:
    """Whether longer runs want another rate than those of the sweeps."""
    other = replace(grass, linear_lr=factor * grass.linear_lr)
    full = replace(other, rank=Job.rank, scale=Job.scale)
    return [full, grass, other, with_signs(grass), with_signs(other)]


FASTER = (1.216, 1.354)
"""Tokens per second over full rank's at r = 1/8, of docs/benchmarks.md: 1b, and layers of 7b."""


def in_its_time(grass: Job) -> list[Job]:
    """As many steps as grass has made when full gradients have made theirs."""
    return [replace(grass, steps=round(grass.steps * more)) for more in FASTER]


def in_8_bits(grass: Job) -> list[Job]:
    """What moments of 8 bits lose: half the rank takes as many bytes in float32."""
    half = replace(grass, rank=grass.rank / 2, scale=2 * grass.scale)
    return [half, grass, replace(grass, method="adamw8bit")]


PEERS = (("galore", 4, 100), ("apollo", 8, 200))
"""Where their sweeps begin: over the best rate with full gradients; and their period."""


def of_peers(
    plan: Plan,
    full: Job,
    ranks: Sequence[float],
    lengths: Sequence[float],
    seeds: Sequence[int],
    text: str = "",
) -> None:
    """Methods that project full gradients, at the same ranks, each at its own best rate.

    With another text all keep the rates of the first.
    """
    found: dict[float, list[Job]] = {rank: [] for rank in ranks}
    for method, factor, every in PEERS:
        for rank in ranks:
            start = replace(full, method=method, rank=rank, refresh_every=every)
            start = replace(start, linear_lr=factor * full.linear_lr)
            if best := plan.bracket(start, ("linear_lr",)):
                found[rank].append(best)
    if any(len(peers) < len(PEERS) for peers in found.values()):
        return
    for jobs in pairs(plan, replace(full, text=text), ranks, lengths, seeds, with_signs):
        base, *grass = jobs
        longer = {"steps": base.steps, "seed": base.seed, "text": text}
        ways = [base]
        for k, rank in enumerate(ranks):
            ways += [grass[k], grass[len(ranks) + k]]
            ways += [replace(peer, **longer) for peer in found[rank]]
        if plan.want(ways):
            plan.peers.append(ways)


def ruled(
    plan: Plan, full: Job, ranks: Sequence[float], lengths: Sequence[float], seeds: Sequence[int]
) -> None:
    """What it brings to draw columns by the norms of inputs, and not in turn."""
    other = partial(replace, selection="input_norm")
    plan.ruled += pairs(plan, full, ranks, lengths, seeds, other)


def pairs(
    plan: Plan,
    full: Job,
    ranks: Sequence[float],
    lengths: Sequence[float],
    seeds: Sequence[int],
    change: Callable[[Job], Job],
) -> list[list[Job]]:
    """By seed and length: full gradients, then by ranks grass as it is, and changed."""
    complete = []
    for seed in seeds:
        for length in lengths:
            base = replace(full, steps=round(length * full.steps), seed=seed)
            grass = [replace(base, rank=r, scale=1 / r) for r in ranks]
            jobs = [base, *grass, *map(change, grass)]
            if plan.want(jobs):
                complete.append(jobs)
    return complete


WAYS = (
    {"lookups": "plain"},
    {"lookups": "row"},
    {"lookups": "factored", "lookup_scale": 32.0},
)
"""To step an embedding: those that longer runs compare."""
FURTHER = (
    {"lookups": "plain", "lookup_rank": 1.0},
    {"lookups": "plain", "lookup_rank": 1.0, "lookup_every": 10000},
    {"lookups": "signs"},
    {"lookups": "plain", "lookup_rank": 1 / 2},
    {"lookups": "plain", "lookup_rank": 3 / 4},
    {"lookups": "plain", "lookup_every": 25},
    {"lookups": "plain", "lookup_every": 400},
    {"lookups": "started"},
    {"lookups": "counted"},
)
"""Two with all of its columns tell what it costs to forget moments."""


def looked_up(plan: Plan, words: Job, heads: Sequence[bool]) -> None:
    """What an embedding loses, tied to the head or not, if its columns move by turns."""
    for tied in heads:
        dense = plan.bracket(replace(words, tied=tied), ("lr",))
        if dense is None:
            continue
        ways = [replace(dense, **way) for way in WAYS]
        plan.lookups.append([dense, *ways])
        best = [plan.bracket(way, ("lookup_scale",)) for way in ways]
        if not all(best):
            continue
        for seed in (0, 1, 2):
            longer = {"steps": round(LENGTHS[1] * words.steps), "seed": seed}
            jobs = [replace(job, **longer) for job in (dense, *best)]
            if plan.want(jobs):
                plan.longer.append(jobs)


def looked_up_further(plan: Plan, words: Job, prose: str) -> None:
    """The ways that longer runs leave out, and fine-tuning."""
    for tied in (True, False):
        dense = plan.bracket(replace(words, tied=tied), ("lr",))
        if dense is None:
            continue
        ways = [
            replace(dense, **way)
            for way in FURTHER
            if not (tied and way["lookups"] == "counted")  # a head's rows occur in every step
        ]
        next(group for group in plan.lookups if group[0] == dense).extend(ways)
        for way in ways:
            plan.bracket(way, ("lookup_scale",))
        tuned(plan, dense, prose)


def tuned(plan: Plan, dense: Job, prose: str) -> None:
    """The same in fine-tuning, where an embedding moves little."""
    start = tuning(plan, dense, prose)
    first = start and plan.bracket(start, ("lr",))
    if first is None:
        return
    frozen = replace(first, lookups="frozen")
    ways = [replace(first, lookups="plain", lookup_rank=rank) for rank in (1 / 4, 1 / 8)]
    plan.lookups.append([first, frozen, *ways])
    plan.want([frozen])
    for way in ways:
        plan.bracket(way, ("lookup_scale",))


def repeats(plan: Plan, full: Job, ranks: Sequence[float], seeds: Sequence[int]) -> None:
    """How much of a difference is chance: full gradients, and the scales n/r and twice that."""
    grass = [replace(full, rank=r, scale=k / r) for r in ranks for k in (1, 2)]
    for job in (full, *grass):
        jobs = [replace(job, seed=seed) for seed in seeds]
        if plan.want(jobs):
            plan.repeats.append(jobs)


def roundings(plan: Plan, full: Job, rank: float, seeds: Sequence[int]) -> None:
    """What becomes of the bits that weights in bfloat16 lack, in longer runs."""
    grass = replace(full, rank=rank, scale=1 / rank, steps=round(5 / 3 * full.steps))
    for seed in seeds:
        jobs = [replace(grass, rounding=how, seed=seed) for how in ROUNDINGS]
        if plan.want(jobs):
            plan.roundings.append(jobs)
