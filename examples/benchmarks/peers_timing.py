"""Seconds, bytes and traffic of the contenders of peers.py, which take turns a step at a time.

Losses do not depend on it, so this is measured apart, with nothing else running: all contenders in
one process, compiled by Inductor, in an order that reverses every round. Selections and projections
are renewed every PERIOD steps, so that all kinds of steps occur; steps 0, 1 and 4 of a period are
those that score, project, draw, or begin with new rows, and the others are regular.

Bytes are read off the tensors (step_time.py). What a step allocates besides, activations and
temporaries, is the peak of the allocator's record in a regular step, less the gradients; "peak" is
the most of all kinds of steps. Traffic is what a data-parallel step sends: the gradients as they
come to the optimizer, in the mean over the steps of a period of K; for grass compact ones, and the
scores of scoring steps.
"""

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from contenders import Run, set_up, text
from data import Batches
from memory import history_of_cpu
from step_time import Clock, Variant, no_times

PERIOD = 5
SPECIAL, REGULAR = (0, 1, 4), (2, 3)


def prepare(run: Run) -> Variant:
    gap = PERIOD if run.refresh_every > 1 else 1
    model, compiled, optimizer = set_up(replace(run, refresh_every=gap, start=""), Path())
    # All are read as peers: `nbytes` knows projectors and quantized state, and compact gradients.
    return Variant(model, compiled, optimizer, peer=True)


def peak_of_step(variant: Variant, clock: Clock, batch: tuple) -> int:
    """The most bytes that a step has allocated at any time of it, above what was held before."""
    if clock.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step(clock, *batch)
        return torch.cuda.max_memory_allocated() - before
    with_record = torch.profiler.profile(profile_memory=True, activities=CPU)
    with_record.start()
    variant.step(clock, *batch)
    changes, _ = history_of_cpu(with_record)
    return max(itertools.accumulate(change for _, change in changes))


CPU = [torch.profiler.ProfilerActivity.CPU]


def total(variant: Variant, part: str) -> int:
    return sum(held[part] for held in variant.held.values())


def measure(runs: dict[str, Run], rounds: int) -> dict[str, dict]:
    """For every name: milliseconds by place in the period, bytes by part, traffic."""
    base = next(iter(runs.values()))
    clock = Clock(torch.device(base.device))
    variants = {name: prepare(run) for name, run in tqdm(runs.items(), desc="set up", leave=False)}
    draw = Batches(text(base.data).train, base.batch, base.seq, seed=0, device=base.device)
    times = {name: [[] for _ in range(PERIOD)] for name in variants}
    held: dict[str, list[dict]] = {name: [{} for _ in range(PERIOD)] for name in variants}
    peaks: dict[str, list[int]] = {name: [] for name in variants}
    # Two periods compile and read bytes, the last of all measures peaks, the others are timed.
    last = (2 + rounds) * PERIOD
    for index in tqdm(range(last + PERIOD), desc="steps in turns", leave=False):
        batch, place = next(draw), index % PERIOD
        order = list(variants) if index % 2 else list(reversed(variants))
        for name in order:
            variant = variants[name]
            if index >= last:
                peaks[name].append(peak_of_step(variant, clock, batch))
                continue
            milliseconds = variant.step(clock, *batch, note_bytes=PERIOD <= index < 2 * PERIOD)
            variant.times = no_times()
            if PERIOD <= index < 2 * PERIOD:
                parts = ("weights", "gradients", "state")
                held[name][place] = {part: total(variant, part) for part in parts}
            elif 2 * PERIOD <= index < last:
                times[name][place].append(milliseconds["step"])
    return {
        name: {"times": times[name], "held": held[name], "peaks_above": peaks[name]}
        for name in runs
    }


def summary(measured: dict, every: float) -> dict:
    """Of one contender, with selections or projections renewed `every` steps."""
    medians = [statistics.median(place) for place in measured["times"]]
    regular = statistics.median(
        itertools.chain.from_iterable(measured["times"][place] for place in REGULAR)
    )
    held, above = measured["held"][REGULAR[0]], measured["peaks_above"]
    gradients = [each["gradients"] for each in measured["held"]]
    return {
        "regular_ms": regular,
        "special_ms": max(medians[place] for place in SPECIAL),
        "mean_ms": mean_at(every, regular, [medians[place] for place in SPECIAL]),
        "bytes": {**held, "activations": above[REGULAR[0]] - held["gradients"]},
        "peak": held["weights"] + held["state"] + max(above),
        "traffic": mean_at(every, held["gradients"], [gradients[place] for place in SPECIAL]),
    }


def mean_at(every: float, regular: float, special: Iterable[float]) -> float:
    """The mean over a period of `every` steps, some of which are special."""
    return regular + sum(each - regular for each in special) / every
