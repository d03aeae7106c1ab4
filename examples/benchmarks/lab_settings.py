"""What the lab asks about single settings: one varied at a time, around the defaults."""

from collections.abc import Sequence
from dataclasses import replace

from lab_plan import Plan
from lab_train import Job

REST, VARIED = 0.5, 0.25
"""The part of the linear rate by which columns move that are not selected: where it is compared
with none, and where one setting after the other is varied."""

LENGTHS = (5 / 3, 10 / 3, 20 / 3)
"""Of runs that ask what becomes of the gap, over those of the sweeps: 1,000 steps, and so on."""


def with_signs(job: Job) -> Job:
    """The same with the defaults for signs."""
    return replace(job, rest_scale=REST, scale=round(job.rank ** (-2 / 3), 2))


def vary(
    plan: Plan,
    full: Job,
    rank: float,
    length: float,
    name: str,
    values: Sequence[float],
    rest_scale: float = 0.0,
) -> None:
    """One setting of grass; the others are n/r, and this rate of columns that are not selected."""
    steps = round(length * full.steps)
    job = replace(full, steps=steps, rank=rank, scale=1 / rank, rest_scale=rest_scale)
    jobs = [replace(job, **{name: float(value)}) for value in values]
    if plan.want(jobs):
        plan.varied.append(jobs[0])


def tuned_at(plan: Plan, full: Job, lengths: Sequence[float]) -> None:
    """AdamW's linear rate again, in longer runs than those of the sweeps."""
    for length in lengths:
        job = replace(full, steps=round(length * full.steps))
        if plan.bracket(job, ("linear_lr",)):
            plan.varied.append(job)


def grown(plan: Plan, full: Job, ranks: Sequence[float], length: float) -> None:
    """Periods that grow with the steps so far; `longer_periods` asks for those that do not."""
    for rank in ranks:
        job = replace(full, steps=round(length * full.steps), rank=rank, scale=1 / rank)
        plan.want([replace(job, grow=part) for part in (0.5, 1.0, 2.0)])
        plan.varied.append(job)


def longer_periods(
    plan: Plan,
    full: Job,
    ranks: Sequence[float],
    lengths: Sequence[float],
    one_turn: bool = False,
) -> None:
    """By the length of a run. `one_turn`: also the period in which all columns have one turn."""
    for length in lengths:
        for rank in ranks:
            steps = round(length * full.steps)
            job = replace(full, steps=steps, rank=rank, scale=1 / rank)
            periods = [100, 200, 400] + [round(rank * steps)] * one_turn
            if plan.want([replace(job, refresh_every=k) for k in periods]):
                plan.varied.append(job)


def rest_varied(plan: Plan, full: Job, rank: float) -> None:
    """The rate of such columns at two lengths; and how often they move, by what, and K."""
    for length in LENGTHS[:2]:
        grass = replace(
            full, steps=round(length * full.steps), rank=rank, scale=1 / rank, rest_scale=VARIED
        )
        plan.bracket(grass, ("rest_scale",))
        plan.varied.append(grass)
        if length == LENGTHS[0]:
            other = [replace(grass, rest_every=j) for j in (2, 4, 8)]
            other += [replace(grass, rest_kind="rms"), replace(grass, micro_batches=4)]
            other += [replace(grass, micro_batches=4, rest_kind="last")]
            other += [replace(grass, refresh_every=k) for k in (50, 200, 400)]
            plan.want(other)


SINGLE: tuple[dict, ...] = (
    {"beta2": 0.99},
    {"beta2": 0.95},
    {"eps": 1e-6},
    {"warm_up": 0},
    {"warm_up": 50},
    {"selection": "halves"},
)
"""Settings of grass that are varied alone."""
OTHERS = ({"selection": "input_norm"}, {"refresh_every": 200}, {"method": "adamw8bit"})
"""More of them, which other questions ask, too."""
OF_ADAMW = ("beta2", "eps")
"""Those that full gradients have, too."""
KINDS = {1 / 4: ((1 / 2, 1 / 8), (1 / 8, 5 / 16)), 1 / 8: ((1 / 4, 1 / 16), (1 / 16, 5 / 32))}
"""By rank: those of attention and of the MLP that hold as many numbers."""


def with_the_head(plan: Plan, full: Job, rank: float, signs: bool = False) -> Job | None:
    """The best of the rates that the head wants where grass takes it, too."""
    grass = replace(full, rank=rank, scale=1 / rank)
    if signs:
        grass = with_signs(grass)
    best = plan.bracket(replace(grass, head_scale=4.0), ("head_scale",))
    if plan.want([grass]) and best:
        plan.varied.append(grass)
    return best


def singly(
    plan: Plan, full: Job, ranks: Sequence[float], length: float, seeds: Sequence[int], signs: bool
) -> None:
    """Each of these with several seeds, beside the default, and beside full gradients."""
    base = replace(full, steps=round(length * full.steps))
    ways = [base, *(replace(base, **way) for way in SINGLE if not {*way}.isdisjoint(OF_ADAMW))]
    for rank in ranks:
        grass = replace(base, rank=rank, scale=1 / rank)
        kinds = [{"rank": own, "mlp_rank": mlp} for own, mlp in KINDS[rank]]
        if signs:
            grass = with_signs(grass)
        ways += [grass, *(replace(grass, **way) for way in (*SINGLE, *kinds))]
        if best := with_the_head(plan, full, rank, signs):
            ways.append(replace(best, steps=base.steps))
        ways += [replace(grass, **way) for way in OTHERS]
    for job in ways:
        jobs = [replace(job, seed=seed) for seed in seeds]
        if plan.want(jobs):
            plan.single.append(jobs)
