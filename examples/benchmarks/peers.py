"""Quality, memory, speed and traffic of grass beside its peers, with everything tuned alike.

    python examples/benchmarks/peers.py                            # all of it, on two CPU cores
    python examples/benchmarks/peers.py --stage timing --timing-rounds 20
    python examples/benchmarks/peers.py --scale gpu --minutes 9    # again and again until complete
    python examples/benchmarks/peers.py --scale gpu --size 130m --minutes 9
    python examples/benchmarks/peers.py --scale lab                # a larger model: see lab.py
    python examples/benchmarks/peers.py --smoke                    # only to see that it runs

Contenders stand in contenders.py. All train from the same weights, on the same batches, with the
same schedule. Stages:

    sweep       every method's rates, one seed: four rates of the linear weights, then, with the
                best, half and twice the rate of the rest, then half and twice the interval K of
                projections or selections. Where the best stands at the edge of its line, one more
                candidate beyond it. Variants of grass (sides, rules, blocks, resets) and 8-bit
                states have fewer: the settings of what they vary, with its linear rate and twice
                it (--scale gpu: and half of it)
    seeds       the best of each with further seeds
    ablations   one thing varied at a time, around grass's best run; rates not tuned again
    timing      seconds, bytes and traffic, all contenders in turns (peers_timing.py)
    finetune    AdamW, LoRA and grass from the weights of the best AdamW run to other text
    report      the tables and figures of what there is

A stage makes the runs before it that are missing (timing needs none). Every run is a line of
OUT/results.jsonl, under a key of all its settings: a second call makes only what is missing. Runs
are compiled by Inductor, whose compiled code stays in a cache: the first run of a kind waits 10 to
30 seconds for it, later ones half a second, and a step takes 55 to 80 % of the time without it.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import lab
import peers_plan as plans
import peers_timing as timing
from contenders import Run, train_once, why_missing
from peers_plan import Scale
from peers_report import report

TIMING_SECONDS = 240  # what the timing stage takes at most, once the code is compiled
STAGES = ("sweep", "seeds", "ablations", "timing", "finetune", "report", "all")

CPU = Run(
    size="tiny",
    shape={"hidden": 128, "ffn": 344, "heads": 4},
    steps=600,
    batch=4,
    seq=128,
    refresh_every=100,
)
GPU = Run(
    size="60m",
    shape={"vocab": 256},  # bytes
    steps=600,
    batch=64,
    seq=256,
    lr=4e-3,
    refresh_every=100,
    data="large",
    device="cuda",
)
SCALES = {
    # Half of the linear rate of what they vary was never the best of 23 variants: it is left out.
    "cpu": Scale(CPU, followers=(1, 2)),
    "gpu": Scale(
        GPU,
        rules=("top", "multinomial_norm"),
        details=False,
        workers=1,
        seconds_per_step=0.05,
        periods=(25, 50, 100, 200),
    ),
}
LAB = "lab"
SMOKE = {
    "size": "smoke",
    "shape": {},
    "steps": 6,
    "batch": 2,
    "seq": 32,
    "refresh_every": 2,
    "compiler": "aot_eager",
    "data": "reference",
    "windows": 32,
}
SMOKE_SCALE = {
    "only": ("adamw", "galore 1/4", "apollo 1/4", "lora*", "grass 1/4", "grass 1/4 mult*norm"),
    "rules": ("multinomial_norm",),
    "details": False,
    "candidates": 1,
    "neighbours": (1,),
    "followers": (1,),
    "ranks": ("1/4",),
    "periods": (2, 3),
    "warmups": (),
    "factors": (),
    "finetune_steps": 4,
    "seeds": 2,
    "workers": 0,
}


def scale_of(args: argparse.Namespace) -> Scale:
    scale = SCALES[args.scale]
    changes = {
        name: getattr(args, name) for name in ("size", "device", "dtype", "data", "steps", "batch")
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    base = replace(scale.base, **changes)
    if args.steps:
        scale = replace(scale, finetune_steps=max(1, round(0.4 * args.steps)))
    if args.smoke:
        scale = replace(scale, **SMOKE_SCALE)
        base = replace(base, **SMOKE)
    if args.only:
        scale = replace(scale, only=tuple(args.only))
    return replace(scale, base=base, **given(args, "seeds", "workers"))


def given(args: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


class Stopped(Exception):
    """Time is up."""


class Runner:
    """Makes the runs that a plan asks for, and remembers their results in a file."""

    def __init__(self, scale: Scale, out: Path, end: float) -> None:
        self.scale, self.out, self.end = scale, out, end
        self.file = out / "results.jsonl"
        self.results: plans.Results = {}
        self.made: list[float] = []
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    result = json.loads(line)
                except ValueError:
                    continue  # it was being written when the machine stopped
                self.results[result["key"]] = result

    def complete(self, plan: plans.Plan) -> dict:
        """Carry a plan out, and return what it returns."""
        return carry_out(plan, self.run)

    def missing(self, runs: list[Run]) -> list[Run]:
        unique = {run.key: run for run in runs}.values()
        return [run for run in unique if run.key not in self.results or self.lost(run)]

    def lost(self, run: Run) -> bool:
        return run.keep and not (self.out / "weights" / f"{run.key}.pt").exists()

    def run(self, runs: list[Run]) -> None:
        waiting = self.missing(runs)
        if not waiting:
            return
        make = partial(train_once, folder=self.out / "weights")
        bar = tqdm(total=len(waiting), desc="runs", leave=False)
        if not self.scale.workers:
            for run in waiting:
                self.keep(make(run))
                bar.update()
            return
        running = {}
        while waiting or running:
            while waiting and len(running) < self.scale.workers and self.time_left():
                run = waiting.pop(0)
                running[self.pool.submit(make, run)] = run
            if not running:
                raise Stopped
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    self.keep(future.result())
                except Exception as error:
                    bar.write(f"{run.method} {run.key} failed: {type(error).__name__}: {error}")
                bar.update()

    def keep(self, result: dict) -> None:
        self.results[result["key"]] = result
        self.made.append(result["seconds"])
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def time_left(self) -> bool:
        longest = max(self.made[-20:], default=self.seconds_per_run())
        return time.monotonic() + longest < self.end

    def seconds_per_run(self) -> float:
        """Of the runs of this scale that there are, the median; else what is usual."""
        seconds = [
            result["seconds"] / result["run"]["steps"]
            for result in self.results.values()
            if result["run"]["shape"] == self.scale.base.shape and not result["run"]["start"]
        ]
        per_step = statistics.median(seconds) if seconds else self.scale.seconds_per_step
        return self.scale.base.steps * per_step

    @property
    def pool(self) -> ProcessPoolExecutor:
        if not hasattr(self, "_pool"):
            context = multiprocessing.get_context("spawn")
            start = {"initializer": prepare_worker, "initargs": (self.scale.base.device,)}
            self._pool = ProcessPoolExecutor(self.scale.workers, context, **start)
        return self._pool

    def close(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown(cancel_futures=True)


def carry_out(plan: plans.Plan, run: Callable[[list[Run]], None]) -> dict:
    while True:
        try:
            run(next(plan))
        except StopIteration as done:
            return done.value


def prepare(device: str) -> None:
    """One thread for a process: small models gain nothing by more, and there are as many processes
    as cores."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # torchao's step is compiled for each shape
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32


def prepare_worker(device: str) -> None:
    prepare(device)
    logging.disable(logging.WARNING)  # of packages about their optional parts
    warnings.filterwarnings("ignore", module=r"torch\.")


class Stages:
    """What every stage needs of those before it."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.scale = runner, runner.scale
        everyone = plans.contenders(self.scale)
        methods = {each.run.method for each in everyone} | {"lora"}  # finetuning has it, too
        reasons = {method: why_missing(method) for method in sorted(methods)}
        self.missing = {method: reason for method, reason in reasons.items() if reason}
        self.entries = [each for each in everyone if each.run.method not in self.missing]
        self.usable = {"adamw", "lora", "grass"} - self.missing.keys()

    def everything(self, results: plans.Results, stages: tuple[str, ...]) -> plans.Plan:
        """The plan of some stages, in one."""
        seeds = self.scale.seeds if "seeds" in stages else 1
        scale = replace(self.scale, seeds=seeds)
        answer = {"pretraining": (yield from plans.pretraining(scale, results, self.entries))}
        best = answer["pretraining"]["best"]
        if "ablations" in stages:
            answer["panels"] = yield from plans.ablations(self.scale, best)
        if "finetune" in stages:
            plan = plans.finetuning(self.scale, results, best, self.usable)
            answer["finetuning"] = yield from plan
        return answer

    def at_most(self, stages: tuple[str, ...]) -> tuple[int, float]:
        """How many runs are missing if every grid is extended, as if all losses were equal; and how
        many whole ones that is, since finetuning's are shorter."""
        imagined = dict(self.runner.results)
        asked: dict[str, float] = {}

        def imagine(runs: list[Run]) -> None:
            for run in self.runner.missing(runs):
                asked[run.key] = run.steps / self.scale.base.steps
            for run in runs:
                imagined.setdefault(run.key, {"held_out": 0.0, "finite": True})

        carry_out(self.everything(imagined, stages), imagine)
        return len(asked), sum(asked.values())

    def time(self, rounds: int, facts: dict) -> None:
        """The timing stage: one measurement of all, which may be of another day than the losses."""
        if time.monotonic() + TIMING_SECONDS > self.runner.end:
            raise Stopped
        prepare(self.scale.base.device)
        runs = {each.name: each.run for each in self.entries}
        measured = timing.measure(runs, rounds)
        contents = {"environment": facts, "rounds": rounds, "threads": torch.get_num_threads()}
        contents["measured"] = measured
        (self.runner.out / "timing.json").write_text(json.dumps(contents))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--scale", default="cpu", choices=(*SCALES, LAB), help="how large it all is (cpu)")
    add("--stage", default="all", choices=STAGES, help="what to do (default: all)")
    add("--out", type=Path, help="where to write (default: runs/peers, or runs/peers-SIZE)")
    add("--size", choices=("60m", "130m"), help="another shape of the model, with --scale gpu")
    add("--only", nargs="+", metavar="NAME", help="contenders, or patterns such as 'grass*'")
    add("--steps", type=int, help="steps of a run")
    add("--batch", type=int, help="sequences of a step")
    add("--seeds", type=int, help="seeds of the finalists, the sweep's among them (3)")
    add("--workers", type=int, help="runs at a time (cpu: 2, gpu: 1); 0: in this process")
    add("--minutes", type=float, default=math.inf, help="start no run that would end later")
    add("--timing-rounds", type=int, default=8, help="timed periods of 5 steps (default: 8)")
    add("--device", help="cpu or cuda (default: by the scale)")
    add("--dtype", help="of weights, gradients and state (default: float32)")
    add("--data", help="a file or a folder of text (default: what the machine has)")
    add("--smoke", action="store_true", help="very small runs of few contenders")
    args = parser.parse_args(arguments)
    if args.size and args.scale != "gpu":
        parser.error("--size goes with --scale gpu")
    if args.scale == LAB:
        known = "scale", "out", "workers", "minutes", "data", "smoke"
        unknown = [name for name in vars(args) if name not in known]
        if other := [name for name in unknown if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--{other[0].replace('_', '-')} does not go with --scale {LAB}")
    return args


def in_the_lab(args: argparse.Namespace) -> None:
    """The same question, of 3.7M parameters and in the lab's plan of runs: its workers and tables.

    18 runs of 2,000 steps and the sweeps before them: hours.
    """
    out = args.out or Path("runs") / LAB
    given = ["--peers", "--out", str(out)]
    if args.data:
        given += ["--data", args.data]
    if args.smoke:
        given.append("--smoke")
    timed = [] if math.isinf(args.minutes) else ["--minutes", str(args.minutes)]
    work = [sys.executable, lab.__file__, "work", *given, *timed]
    count = 2 if args.workers is None else max(1, args.workers)
    workers = [subprocess.Popen(work) for _ in range(count)]
    if failed := sum(worker.wait() != 0 for worker in workers):
        raise SystemExit(f"{failed} of {count} workers failed: {' '.join(work)}")
    for command in ("save", "rates"):
        lab.main([command, str(out / "lab.json"), *given])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.scale == LAB:
        return in_the_lab(args)
    scale, started = scale_of(args), time.monotonic()
    name = "peers" if args.scale == "cpu" else f"peers-{scale.base.size}"
    out = args.out or Path("runs") / name
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers' torch reads it
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    runner = Runner(scale, out, started + 60 * args.minutes)
    stages = Stages(runner)
    wanted = STAGES[:-2] if args.stage == "all" else (args.stage,)
    facts = environment(scale.base.device)
    print(as_line(facts))
    for method, reason in stages.missing.items():
        print(f"{method}: left out ({reason})")
    try:
        if args.stage not in ("timing", "report"):
            (count, whole), each = stages.at_most(wanted), runner.seconds_per_run()
            minutes = whole * each / max(1, scale.workers) / 60
            print(
                f"{count} runs at most, a whole one of {each:.1f} s: up to {minutes:.0f} minutes, "
                "and a few more for compiling and the timing stage"
            )
            runner.complete(stages.everything(runner.results, wanted))
        if "timing" in wanted and (args.stage == "timing" or not (out / "timing.json").exists()):
            stages.time(args.timing_rounds, facts)
    except Stopped:
        print("Time is up: the same command goes on from here.")
    finally:
        runner.close()
    found = carry_out(stages.everything(runner.results, STAGES), lambda runs: None)
    report(out, scale, found, runner.results, facts, stages.missing)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; wrote tables and figures to {out}")


if __name__ == "__main__":
    main()
