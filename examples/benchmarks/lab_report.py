"""The lab's tables, in Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lab_model import SIZES
from lab_plan import Plan
from lab_rates import fraction, rate, rates_table
from lab_train import Job, model_of

DEFAULT = "the default"
NAMES = {"adamw": "AdamW", "apollo": "APOLLO", "galore": "GaLore", "lora": "LoRA"}


def roundings_table(plan: Plan) -> str:
    """What becomes of the bits that weights in bfloat16 lack."""
    ways = [job.rounding or "float32" for job in plan.roundings[0]] if plan.roundings else []
    lines = [f"| model | r | seed | {' | '.join(ways)} |", "|---" * (len(ways) + 3) + "|"]
    for jobs in plan.roundings:
        losses = " | ".join(f"{plan.loss(job):.4f}" for job in jobs)
        first = jobs[0]
        name = f"{first.size}{', fine-tuning' if first.start else ''}"
        lines.append(f"| {name} | {fraction(first.rank)} | {first.seed} | {losses} |")
    return "\n".join(lines) if ways else "No rounding is compared yet."


def repeats_table(plan: Plan) -> str:
    """The same runs with several seeds."""
    lines = ["| model | r | scale | by seed | mean | above full, by seed |", "|---" * 6 + "|"]
    full: list[float] = []
    for jobs in plan.repeats:
        losses, first = [plan.loss(job) for job in jobs], jobs[0]
        if not first.rank:
            full = losses
        above = [loss - other for loss, other in zip(losses, full, strict=False)]
        shown = (
            " ".join(f"{x:{form}}" for x in row) for row, form in ((losses, ".3f"), (above, "+.3f"))
        )
        by_seed, difference = shown
        rank, scale = (fraction(first.rank), f"{first.scale:g}") if first.rank else ("full", "")
        mean = statistics.fmean(losses)
        lines.append(f"| {first.size} | {rank} | {scale} | {by_seed} | {mean:.3f} | {difference} |")
    return "\n".join(lines) if plan.repeats else "Nothing is repeated yet."


def single_table(plan: Plan) -> str:
    """Single settings: losses by seed, and how much more than with the defaults."""
    by_kind: dict[tuple, dict[str, list[float]]] = {}
    for jobs in plan.single:
        first = jobs[0]
        share, rest = "full", ""
        if first.rank:
            share, rest = fraction(held(first)), "sign" if first.rest_scale else "none"
        kind = first.size, str(first.steps), share, rest
        by_kind.setdefault(kind, {})[setting(first)] = [plan.loss(job) for job in jobs]
    lines = ["| model | steps | r | rest | setting | by seed | above the default, by seed |"]
    lines.append("|---" * 7 + "|")
    for kind, found in by_kind.items():
        if DEFAULT not in found or len(found) == 1:
            continue
        for name, losses in found.items():
            above = [loss - other for loss, other in zip(losses, found[DEFAULT], strict=True)]
            shown = " ".join(f"{x:.3f}" for x in losses), " ".join(f"{x:+.3f}" for x in above)
            lines.append(f"| {' | '.join((*kind, name, *shown))} |")
    return "\n".join(lines) if plan.single else "No single setting is varied yet."


def setting(job: Job) -> str:
    """What is not a default in a run of `Plan.single`."""
    if job.mlp_rank:
        return f"attention {fraction(job.rank)}, MLP {fraction(job.mlp_rank)}"
    if job.head_scale:
        return f"with the head, at {job.head_scale:g} times the linear rate"
    if job.method == "adamw8bit":
        return "moments of 8 bits"
    names = {"beta2": "β₂", "eps": "ε", "warm_up": "warm-up", "selection": "selection"}
    names["refresh_every"] = "K"
    changed = [
        f"{text} {value if isinstance(value, str) else format(value, 'g')}"
        for name, text in names.items()
        if (value := getattr(job, name)) != getattr(Job, name)
    ]
    return ", ".join(changed) or DEFAULT


def held(job: Job) -> float:
    """The part of the numbers in the blocks' matrices that is selected, as a power of 2."""
    if not job.mlp_rank:
        return job.rank
    config = SIZES[job.size]
    attention, mlp = 4 * config.hidden**2, 3 * config.hidden * config.ffn
    part = (job.rank * attention + job.mlp_rank * mlp) / (attention + mlp)
    return 2.0 ** round(math.log2(part))


def resting_table(plan: Plan) -> str:
    """By length and seed: full gradients, and grass without and with a step of other columns."""
    return _pairs(plan, plan.resting, "none", "signs") or "Nothing is known of signs yet."


def peers_table(plan: Plan) -> str:
    """By length and seed: full gradients, grass, and methods that project them."""
    lines = [
        "| model | text | steps | seed | method | r | K | linear rate | held-out | over full |",
        "|---" * 10 + "|",
    ]
    for full, *ways in plan.peers:
        for job in (full, *ways):
            every = "never" if job.refresh_every >= job.steps else str(job.refresh_every)
            every = "" if job.method == "lora" else every
            of = f"{fraction(job.rank)} | {every}" if job.rank else " | "
            lines.append(
                f"| {' | '.join(map(str, what(job)))} | {job.seed} | {called(job)} | {of} | "
                f"{rate(job.linear_lr * job.scale)} | {plan.loss(job):.3f} | "
                f"{percent(plan.loss, job, full)} % |"
            )
    return "\n".join(lines) if plan.peers else "Nothing is known of peers yet."


def called(job: Job) -> str:
    """The method of a run of `Plan.peers`."""
    if not job.grass:
        name = NAMES.get(job.method, job.method)
        return name if job.rank else f"{name}, all gradients"
    name = 'grass, rest="sign"' if job.rest_scale else "grass"
    if job.micro_batches > 1:
        name += f", {job.rest_kind or 'majority'} of {job.micro_batches}"
    return f"{name}, 8-bit states" if job.method == "adamw8bit" else name


def percent(loss: Callable[[Job], float], job: Job, full: Job) -> str:
    """How far a run's loss is above another's."""
    return f"{100 * (loss(job) / loss(full) - 1):+.1f}"


def finalists_table(plan: Plan) -> str:
    """The same for grass, GaLore and APOLLO alone, all seeds in a line."""
    found: dict[tuple, dict[tuple, list[str]]] = {}
    for full, *ways in sorted(plan.peers, key=lambda jobs: jobs[0].seed):
        if {"galore", "apollo"} <= {job.method for job in ways}:
            for job in ways:
                row = found.setdefault((-job.rank, called(job)), {})
                row.setdefault(what(full), []).append(percent(plan.loss, job, full))
    runs = sorted({of for row in found.values() for of in row})
    heads = [f"{model}; {text} text" for model, text, _ in runs]
    lines = [f"| method | r | {' | '.join(heads)} |", "|---" * (len(runs) + 2) + "|"]
    for (rank, name), row in sorted(found.items()):
        cells = [", ".join(row.get(of, [])) for of in runs]
        lines.append(f"| {name} | {fraction(-rank)} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else "No peer is beside grass yet."


def ruled_table(plan: Plan) -> str:
    """By length and seed: full gradients, and columns in turn and by norms of inputs."""
    return _pairs(plan, plan.ruled, "cyclic", "input_norm") or "No other rule is known yet."


def what(job: Job) -> tuple[str, str, int]:
    """What the runs of a comparison share: model, text, steps."""
    return model_of(job), "the other" if job.text else "the first", job.steps


def _pairs(plan: Plan, runs: Sequence[Sequence[Job]], one: str, other: str) -> str:
    rows = {}  # two questions may share runs
    for full, *grass in runs:
        count = len(grass) // 2
        for still, moving in zip(grass[:count], grass[count:], strict=True):
            of = *what(full), full.seed
            cells = [*map(str, of), f"{plan.loss(full):.3f}", fraction(still.rank)]
            for job in (still, moving):
                cells += [f"{plan.loss(job):.3f}", f"{percent(plan.loss, job, full)} %"]
            rows[(*of, -still.rank)] = f"| {' | '.join(cells)} |"
    lines = [
        f"| model | text | steps | seed | full | r | {one} | over full | {other} | over full |",
        "|---" * 10 + "|",
    ]
    return "\n".join(lines + [line for _, line in sorted(rows.items())]) if rows else ""


def gaps_table(plan: Plan) -> str:
    """The same by length, all seeds in a line: how far grass is above full gradients."""
    ranks = sorted({job.rank for _, *grass in plan.resting for job in grass}, reverse=True)
    kinds = [(rank, signs) for rank in ranks for signs in (False, True)]
    found: dict[tuple, dict[tuple, dict[int, str]]] = {}
    for full, *grass in plan.resting:
        for name, loss in (("held-out", plan.loss), ("training", plan.last)):
            row = found.setdefault((*what(full), name), {kind: {} for kind in kinds})
            for job in grass:
                row[job.rank, job.rest_scale > 0][full.seed] = percent(loss, job, full)
    heads = [f"{fraction(rank)}{', signs' if signs else ''}" for rank, signs in kinds]
    lines = [f"| model | text | steps | loss | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    for of, row in sorted(found.items()):
        cells = [", ".join(above for _, above in sorted(row[kind].items())) for kind in kinds]
        lines.append(f"| {' | '.join(map(str, of))} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else "Nothing is known of the gap yet."


def varied_table(plan: Plan) -> str:
    """Around a run: one setting after the other."""
    lines = ["| model | steps | r | varied | losses, by value |", "|---" * 5 + "|"]
    for job in plan.varied:
        r = fraction(job.rank) if job.rank else "full"
        for name, losses in (_of_grass if job.rank else _of_adamw)(plan, job).items():
            if len(losses) > 1:
                shown = ", ".join(f"{x}: {loss:.3f}" for x, loss in losses.items())
                lines.append(f"| {model_of(job)} | {job.steps} | {r} | {name} | {shown} |")
    return "\n".join(dict.fromkeys(lines)) if plan.varied else "Nothing is varied yet."


Varied = dict[str, dict[Any, float]]
"""Losses by what was varied, and by its value."""


def _of_adamw(plan: Plan, job: Job) -> Varied:
    return {"linear rate": {rate(x): y for x, y in plan.along("linear_lr", job).items()}}


def _of_grass(plan: Plan, job: Job) -> Varied:
    rates = plan.along("rest_scale", job) | _at(plan, replace(job, rest_scale=0.0), 0.0)
    tried: Varied = {"rest_scale": {f"{x:.3g}": loss for x, loss in sorted(rates.items())}}
    scales = {f"{x:.3g}": loss for x, loss in plan.along("scale", job).items()}
    tried[f"scale, with rest_scale {job.rest_scale:g}"] = scales
    one_turn = round(job.rank * job.steps)
    periods = sorted({50, 100, 200, 400, one_turn})
    for name, values in (("rest_every", (1, 2, 4, 8)), ("refresh_every", periods)):
        tried[name] = _known(plan, {x: replace(job, **{name: x}) for x in values})
    parts = {f"{x:.3g}": replace(job, grow=x) for x in (0.5, 1.0, 2.0)}
    tried["a turn's part of the steps so far"] = _known(plan, parts)
    heads = plan.along("head_scale", replace(job, head_scale=1.0))
    tried["the head taken, its rate over the linear one"] = {
        "dense": plan.loss(job),
        **{f"{x:g}": loss for x, loss in heads.items()},
    }
    in_parts = replace(job, micro_batches=4)
    ways = {
        "signs": job,
        "8 bits of G over its column's root mean square": replace(job, rest_kind="rms"),
        "four micro-batches, majority": in_parts,
        "four micro-batches, the last one's": replace(in_parts, rest_kind="last"),
    }
    return tried | {"by what": _known(plan, ways)}


def _at(plan: Plan, job: Job, value: float) -> dict[float, float]:
    return {value: plan.loss(job)} if job.key in plan.results else {}


def _known(plan: Plan, jobs: dict[Any, Job]) -> dict[Any, float]:
    return {x: plan.loss(job) for x, job in jobs.items() if job.key in plan.results}


def lookups_table(plan: Plan) -> str:
    """Ways to step an embedding: held-out losses by their rates; * if these are not all."""
    lines = ["| head | way | r | K | losses, by its rate over the dense one's | over dense |"]
    lines.append("|---" * 6 + "|")
    for dense, *ways in plan.lookups:
        head = ("tied" if dense.tied else "of its own") + (", fine-tuning" if dense.start else "")
        reference = plan.loss(dense)
        lines.append(f"| {head} | dense | | | {reference:.3f} (lr {rate(dense.lr)}) | |")
        for way in ways:
            tried = plan.along("lookup_scale", way)
            if not tried:
                continue
            shown = ", ".join(f"{scale:g}: {loss:.3f}" for scale, loss in tried.items())
            best = min(tried, key=lambda scale: tried[scale])
            swept = way.lookups == "frozen" or {best / 2, best * 2} <= tried.keys()
            kind, rank, every = way.lookups, fraction(way.lookup_rank), f"{way.lookup_every}"
            if kind in ("factored", "frozen"):
                rank = every = ""
            over = f"{100 * (tried[best] / reference - 1):+.1f} %{'' if swept else '*'}"
            lines.append(f"| {head} | {kind} | {rank} | {every} | {shown} | {over} |")
    return "\n".join(lines) if plan.lookups else "Nothing is known of embeddings yet."


def longer_table(plan: Plan) -> str:
    """The best of these ways in longer runs, by seed."""
    lines = ["| head | steps | seed | way | r | K | held-out | over dense |", "|---" * 8 + "|"]
    for dense, *ways in plan.longer:
        head = "tied" if dense.tied else "of its own"
        for job in (dense, *ways):
            kind = job.lookups or "dense"
            by_columns = job.lookups not in ("", "factored")
            of = f"{fraction(job.lookup_rank)} | {job.lookup_every}" if by_columns else " | "
            lines.append(
                f"| {head} | {job.steps} | {job.seed} | {kind} | {of} | {plan.loss(job):.3f} "
                f"| {percent(plan.loss, job, dense)} % |"
            )
    return "\n".join(lines) if plan.longer else "No longer run of these is complete yet."


TABLES = (
    gaps_table,
    rates_table,
    repeats_table,
    roundings_table,
    resting_table,
    varied_table,
    single_table,
    lookups_table,
    longer_table,
    ruled_table,
    peers_table,
    finalists_table,
)
