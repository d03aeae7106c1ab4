"""What the lab asks about fine-tuning: from the weights of a run to another text."""

from collections.abc import Sequence
from dataclasses import replace

from lab_plan import Plan
from lab_train import Job, model_of

NEVER = 10**6
"""A period longer than every run."""


def finetuning(
    plan: Plan, full: Job, prose: str, ranks: Sequence[float], before: int = 2
) -> Job | None:
    """To another text, in half as many steps as a sweep's, from the weights of a run that is
    `before` times as long.

    Returns the best job with full gradients.
    """
    start = tuning(plan, full, prose, before)
    return start and plan.sweep(model_of(start), start, ranks)


def tuning(plan: Plan, full: Job, prose: str, before: int = 2) -> Job | None:
    """A first run of fine-tuning; None if the run is missing from whose weights it starts."""
    source = replace(full, steps=before * full.steps, save=True)
    if not plan.want([source]):
        return None
    return replace(
        full,
        text=prose,
        start=source.key,
        steps=full.steps // 2,
        lr=full.lr / 8,
        linear_lr=full.linear_lr / 2,
    )


def of_lora(plan: Plan, full: Job, ranks: Sequence[float], seeds: Sequence[int]) -> None:
    """Fine-tuning by LoRA and by columns that never change, each at its own best rate."""
    ways = [full]
    for rank in ranks:
        grass = replace(full, rank=rank, scale=1 / rank)
        lora = replace(full, method="lora", rank=rank, dtype="float32")
        for job, name in (
            (grass, "scale"),
            (replace(grass, refresh_every=NEVER), "scale"),
            (replace(lora, linear_lr=4 * full.linear_lr), "linear_lr"),
        ):
            if best := plan.bracket(job, (name,)):
                ways.append(best)
    if len(ways) < 1 + 3 * len(ranks):
        return
    for seed in seeds:
        jobs = [replace(job, seed=seed) for job in ways]
        if plan.want(jobs):
            plan.peers.append(jobs)
