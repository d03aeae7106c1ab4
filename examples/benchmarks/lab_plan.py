"""What the lab runs: a plan is a function of the results that there are.

Every worker asks for the plan again after each of its runs, and takes the first run of it that no
other has claimed. So a plan may decide by results, and any number of workers may share it.

Rates are swept by doubling and halving: from where a sweep starts it goes to the better neighbour,
until both neighbours are worse. So the best that it finds is never at an edge.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lab_train import Job

Results = dict[str, dict]
"""By the keys of their jobs."""


@dataclass(frozen=True)
class Cell:
    """One question: which scale do compact updates want, beside AdamW's best linear rate?"""

    name: str
    full: Job
    """With full gradients: the best of its sweep."""
    rank: float
    refresh_every: int
    best: Job
    """Of the scales that were tried."""
    tried: dict[float, float]
    """Held-out loss by scale."""
    rates: dict[float, float]
    """Held-out loss of full gradients by linear rate."""


@dataclass
class Plan:
    results: Results
    moves: int = 20
    """Of a sweep at most: a smoke test's losses say nothing."""
    wanted: list[Job] = field(default_factory=list)
    """The runs that are missing, in the order of their importance."""
    cells: list[Cell] = field(default_factory=list)
    """Those that are complete."""
    roundings: list[list[Job]] = field(default_factory=list)
    """Runs that differ in their rounding alone, those that are complete."""
    resting: list[list[Job]] = field(default_factory=list)
    """Runs of one length and seed: full gradients, then by ranks without and with a step of the
    columns that are not selected."""
    peers: list[list[Job]] = field(default_factory=list)
    """Runs of one length and seed: full gradients, then by ranks grass without and with such a
    step, and each of the peers."""
    ruled: list[list[Job]] = field(default_factory=list)
    """Runs of one length and seed: full gradients, then by ranks cyclic and by norms of inputs."""
    varied: list[Job] = field(default_factory=list)
    """Runs with such a step, around which its settings were varied one by one."""
    single: list[list[Job]] = field(default_factory=list)
    """Runs that differ in their seed alone: full gradients, then grass, then grass with one setting
    changed; and so on by rank."""
    repeats: list[list[Job]] = field(default_factory=list)
    """Runs that differ in their seed alone, those that are complete."""
    lookups: list[list[Job]] = field(default_factory=list)
    """Ways to step an embedding: the dense one, and where the sweeps of all others' rates begin."""
    longer: list[list[Job]] = field(default_factory=list)
    """The best of these ways, in longer runs of one seed, those that are complete."""

    def want(self, jobs: Iterable[Job]) -> bool:
        """Whether all of these are there."""
        missing = [job for job in jobs if job.key not in self.results]
        self.wanted += [job for job in missing if job not in self.wanted]
        return not missing

    def loss(self, job: Job) -> float:
        """Infinite if it diverged."""
        found = self.results[job.key]["held_out"]
        return math.inf if found is None else found

    def last(self, job: Job) -> float:
        """The mean training loss of the last tenth of the steps; infinite if it diverged."""
        return (self.results[job.key]["train"] or [math.inf])[-1]

    def bracket(self, start: Job, names: Sequence[str]) -> Job | None:
        """The best of a sweep over these settings; None if runs are missing."""
        job = start
        moves = 0
        while self.want([job]):
            if moves == self.moves:
                return job
            around = [
                replace(job, **{name: getattr(job, name) * factor})
                for name in names
                for factor in (0.5, 2)
            ]
            if not self.want(around):
                return None
            best = min([job, *around], key=self.loss)
            if best == job:
                return job
            job, moves = best, moves + 1
        return None

    def sweep(
        self,
        name: str,
        start: Job,
        ranks: Sequence[float],
        periods: Sequence[int] = (100,),
        rates: Sequence[str] = ("linear_lr", "lr"),
    ) -> Job | None:
        """Full gradients first, by their rates; then the scale of compact updates, from n/r on.

        Returns the best job with full gradients.
        """
        full = self.bracket(start, rates)
        if full is None:
            return None
        for every in periods:
            for rank in ranks:
                first = replace(full, rank=rank, refresh_every=every, scale=1 / rank)
                best = self.bracket(first, ("scale",))
                if best is not None:
                    lines = self.along("scale", first), self.along("linear_lr", full)
                    self.cells.append(Cell(name, full, rank, every, best, *lines))
        return full

    def along(self, name: str, job: Job) -> dict[float, float]:
        """The losses of all runs that differ from a job in one setting, by that setting."""
        found = {}
        for power in range(-8, 9):
            value = getattr(job, name) * 2.0**power
            if (other := replace(job, **{name: value})).key in self.results:
                found[value] = self.loss(other)
        return found
