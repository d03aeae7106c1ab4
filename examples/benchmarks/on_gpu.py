"""Everything that docs/benchmarks.md has from a GPU, by one command, the most telling first.

    python examples/benchmarks/on_gpu.py                       # all of it: an hour of an H100
    python examples/benchmarks/on_gpu.py --minutes 9           # as much of it as fits; a next call
                                                               # goes on where this one ended
    python examples/benchmarks/on_gpu.py --only step-1b step-1b-block-16
    python examples/benchmarks/on_gpu.py --list
    python examples/benchmarks/on_gpu.py --smoke               # without a GPU, only to see that
                                                               # every script knows its options

Each measurement is a process of its own. What it prints goes to one file, --out, below its command,
what was predicted before it ever ran, and the goal; then how it ended and after how long. What
ended well is not run again. With --minutes nothing starts that, by its estimate, would end later,
and what takes longer than it should is stopped at the end. At last comes a table of all that was
measured, each beside its prediction.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measurement:
    """A command, to be run from the repository's root."""

    name: str
    seconds: int
    """That it takes on an H100: measured, or guessed."""
    predicted: str
    command: str
    shows: str = r"^\| .*\d.*"
    """The lines of what it prints that answer the prediction."""


STEP = (
    "python examples/benchmarks/step_time.py --device cuda --seq 1024 --dtype bfloat16 --breakdown"
)
SIZE_1B = f"{STEP} --size 1b --batch 16"
LAYERS_1B = f"{SIZE_1B} --layers 4 --rounds 12"
SIZE_7B = f"{STEP} --size 7b --layers 4 --rounds 12"
MEMORY = "python examples/benchmarks/memory.py --device cuda --dtype bfloat16 --checkpointing"
OPTIMIZER = (
    "python examples/benchmarks/optimizer_step.py --device cuda --size 1b --dtype bfloat16 "
    "--compile --rounds 20"
)
RATIOS = r"^\| (?:regular|scoring|signs|eager|galore|adamw8bit)\w* +\|.*\d\.\d.*"
PEAKS = r"^\| (?:full|grass|galore|adamw)\w* \|.*"

PLAN = (
    Measurement(
        "tests", 90, "all pass",
        # -P: of what is installed, since here grass_fx/ has no passes/ in it
        "python -P -m pytest -q -p no:cacheprovider -m '' tests/test_gpu.py",
        r"^.*\d+ passed.*|^FAILED.*",
    ),
    Measurement(
        "step-1b", 110,
        "tokens/s 1.24 of full rank's on an H100, 1.27 on an H200 (goal 1.25), optimizer 0.36 "
        "(goal 0.40), scoring step 1.05 to 1.10 (goal 1.08)",
        f"{SIZE_1B} --rounds 10", RATIOS,
    ),
    Measurement(
        "step-7b", 70,
        "tokens/s 1.38 of full rank's on an H100, 1.43 on an H200 (goal 1.40), scoring step 1.05",
        SIZE_7B, RATIOS,
    ),
    Measurement(
        "optimizer-step", 40,
        "compiled 3.2 ms on an H100, 2.3 on an H200; weight decay costs nothing",
        OPTIMIZER,
    ),
    Measurement(
        "optimizer-step-block-16", 40, "compiled 1.5 ms on an H100, 1.1 on an H200",
        f"{OPTIMIZER} --block 16",
    ),
    Measurement(
        "memory-7b-in-16-gb", 40, "15.9 GiB at r = 64, stepping in backward, within 16 GB",
        f"{MEMORY} --size 7b --limit-gb 17.18 --rank 64 --methods grass_in_backward", PEAKS,
    ),
    Measurement(
        "memory-7b-in-24-gb", 60, "19.1 GiB at r = 1/8 within 24 GB, scoring as regular",
        f"{MEMORY} --size 7b --limit-gb 24 --methods grass grass_tiles", PEAKS,
    ),
    Measurement(
        "memory-13b-in-32-gb", 50, "27.7 GiB at r = 64 within 32 GB",
        f"{MEMORY} --size 13b --limit-gb 32 --rank 64 --methods grass", PEAKS,
    ),
    Measurement(
        "memory-13b-in-40-gb", 80, "35.8 GiB at r = 1/8 within 40 GB, scoring as regular",
        f"{MEMORY} --size 13b --limit-gb 40 --methods grass grass_tiles", PEAKS,
    ),
    Measurement(
        "step-1b-no-pads", 100,
        "1.24 of full rank's tokens/s as well: with pads grass moves less; 430 TFLOP/s in "
        "the products of 5461",
        f"{SIZE_1B} --rounds 8 --variants full regular --no-pads", RATIOS,
    ),
    Measurement(
        "step-1b-inputs", 60, "a scoring step by norms of inputs 0.84 of full rank's",
        f"{LAYERS_1B} --scoring-rule input_norm", RATIOS,
    ),
    Measurement(
        "step-1b-block-16", 60, "tokens/s 0.02 more than with single columns",
        f"{LAYERS_1B} --block 16 --variants full regular", RATIOS,
    ),
    Measurement(
        "step-1b-signs", 60, "signs 1.02 to 1.06 of full rank's step",
        f"{LAYERS_1B} --variants full regular signs", RATIOS,
    ),
    Measurement(
        "step-1b-graphs", 60, "regular 0.79, scoring 1.05 to 1.08",
        f"{LAYERS_1B} --mode reduce-overhead --variants full regular scoring eager", RATIOS,
    ),
    Measurement(
        "step-1b-quarter", 60, "regular 0.86", f"{LAYERS_1B} --rank 0.25", RATIOS,
    ),
    Measurement(
        "train-60m", 480,
        "r = 1/4 within 0.03 nats of full rank after the same steps, 1/8 within 0.06",
        "python examples/compare.py --device cuda --size 60m --dtype bfloat16 --rank 0.25 0.125 "
        "--steps 1200 --batch 16 --seq 512 --eval-every 100 --lr 0.004 --linear-lr 0.001",
    ),
    Measurement(
        "memory-7b", 150,
        "GaLore with steps in backward 21 GiB, 8-bit AdamW 27, grass 19.1 as before, since with "
        "checkpointing nothing of a layer is kept",
        f"{MEMORY} --size 7b --galore-no-svd --methods grass galore_in_backward adamw8bit "
        "--picture runs/memory-7b.png", PEAKS,
    ),
    Measurement(
        "memory-1b", 240, "grass 0.6 of full rank: activations of three quarters, most of the peak",
        "python examples/benchmarks/memory.py --device cuda --dtype bfloat16 --size 1b --batch 8 "
        "--seq 1024 --methods full grass grass_tiles --picture runs/memory-1b.png", PEAKS,
    ),
    Measurement(
        "host-overhead", 60, "9 µs a weight or less",
        "python examples/benchmarks/host_overhead.py --device cuda",
    ),
    Measurement(
        "compile-time", 200, "cold 1.0 to 1.3 of Inductor, with scores up to 2; warm, no misses",
        "python examples/benchmarks/compile_time.py --device cuda --repeats 1",
    ),
    Measurement(
        "step-1b-autotuned", 400, "as without: the forward gathers, and products are the vendor's",
        f"{LAYERS_1B} --mode max-autotune-no-cudagraphs --variants full regular", RATIOS,
    ),
    Measurement(
        "peers", 150, "GaLore 1.0 of full rank's step without SVD, seconds with; 8-bit AdamW 1.0",
        f"{STEP} --size 130m --batch 16 --rounds 12 --peers --svd-rounds 2", RATIOS,
    ),
    Measurement(
        "selected-mm", 60, "picked / floor 1.11 to 1.99, median 1.35 (goal 1.15), as before",
        "python examples/benchmarks/selected_mm.py --device cuda --tokens 8192 --block 1",
    ),
    Measurement(
        "selected-mm-autotuned", 240,
        "autotuned at most as long as picked; for blocks of 64 1.2 of the floor",
        "python examples/benchmarks/selected_mm.py --device cuda --tokens 8192 --block 8 64 "
        "--parts 0.125 --rounds 30 --max-autotune",
    ),
    Measurement(
        "selected-mm-transposed", 60, "the kernel is picked: 1.1 to 1.3 of the floor",
        "python examples/benchmarks/selected_mm.py --device cuda --tokens 8192 --block 1 "
        "--parts 0.125 --rounds 30 --transposed",
    ),
)  # fmt: skip

ENDED_WELL = re.compile(r"^## (\S+)$((?:(?!^## ).)*)^ended with 0 ", re.M | re.S)


def done(out: Path) -> dict[str, str]:
    """The names of the measurements in the file that ended well, and what each printed."""
    return dict(ENDED_WELL.findall(out.read_text("utf-8"))) if out.exists() else {}


def summary(plan: Iterable[Measurement], out: Path) -> str:
    """What was measured, below what was predicted for it."""
    known, lines = done(out), []
    for each in plan:
        if each.name in known:
            printed = known[each.name].split(f"predicted: {each.predicted}")[-1]
            lines += [f"{each.name}: predicted {each.predicted}"]
            lines += [f"    {line}" for line in re.findall(each.shows, printed, re.M)]
    return "\n".join(lines)


def in_small(each: Measurement) -> Measurement:
    """The same on a processor, with as little as the script can do."""
    if "pytest" in each.command:
        return replace(each, command=f"{each.command} --collect-only")
    command = re.sub(r" --limit-gb \S+", "", each.command)
    return replace(each, command=command.replace("--device cuda", "--smoke"))


def measure(each: Measurement, out: Path, most: float | None) -> int:
    """Run it for ``most`` seconds at the most. Appends to the file and returns the exit status."""
    words = shlex.split(each.command)
    words[0] = sys.executable
    variables = {**os.environ, "TQDM_DISABLE": "1"}  # no bars in a file
    start = time.monotonic()
    with out.open("a", encoding="utf-8") as file:
        file.write(f"\n## {each.name}\n\n    {each.command}\n\npredicted: {each.predicted}\n\n")
        file.flush()
        try:
            status = subprocess.run(
                words, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, timeout=most
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124  # as of the command timeout
        file.write(f"\nended with {status} after {time.monotonic() - start:.0f} s\n")
    return status


def measure_all(plan: Iterable[Measurement], out: Path, minutes: float | None) -> dict[str, int]:
    """The exit status of each that ran. What is done already, or would take too long, does not."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    out.parent.mkdir(parents=True, exist_ok=True)
    ended, known = {}, done(out)
    for each in plan:
        left = None if deadline is None else deadline - time.monotonic()
        if each.name in known:
            print(f"{each.name}: done before")
        elif left is not None and left < each.seconds:
            print(f"{each.name}: left out, {each.seconds} s do not fit into {left:.0f}")
        else:
            print(f"{each.name}: about {each.seconds} s ...", flush=True)
            ended[each.name] = measure(each, out, left)
            print(f"{each.name}: ended with {ended[each.name]}", flush=True)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [each.name for each in PLAN]
    add = parser.add_argument
    add("--minutes", type=float, help="that it may take (default: as long as it takes)")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    add("--out", type=Path, default=Path("runs/on_gpu.md"), help="default: runs/on_gpu.md")
    add("--list", action="store_true", help="only say what would be run")
    add("--smoke", action="store_true", help="all commands in small, on a CPU")
    args = parser.parse_args()
    plan = [each for each in PLAN if each.name in args.only]
    if args.smoke:
        args.out = Path(tempfile.mkdtemp()) / "on_gpu.md"
        plan = list({(small := in_small(each)).command: small for each in plan}.values())
    if args.list:
        for each in plan:
            print(f"{each.name}, about {each.seconds} s: {each.command}\n    {each.predicted}")
        return
    ended = measure_all(plan, args.out.resolve(), args.minutes)
    print(f"{len(ended)} of {len(plan)} measured, into {args.out}\n")
    print(summary(plan, args.out))
    if any(ended.values()):
        sys.exit(f"failed: {', '.join(name for name, status in ended.items() if status)}")


if __name__ == "__main__":
    main()
