"""A lab for the quality of training methods on a processor: many small runs, and what they say.

    python examples/benchmarks/lab.py work                  # the runs of the plan, one by one
    python examples/benchmarks/lab.py work --minutes 60     # in another shell: a second worker
    python examples/benchmarks/lab.py save docs/lab.json
    python examples/benchmarks/lab.py rates docs/lab.json   # a table of what was found
    python examples/benchmarks/lab.py --smoke               # only to see that it runs

A worker has one thread; start as many as there are idle cores. Which run is next follows from the
results that there are: runs stand in OUT/results.jsonl, a run that is there is never made again,
and a worker that is stopped loses its run alone. Before all others a run is made twice, with
compact gradients made from full ones, as in all runs here, and with the real backend: the worker
stops if they differ.

Questions: lab_questions.py, of a plan: lab_plan.py. Texts: lab_data.py. Model: lab_model.py.
Methods: lab_methods.py. A run: lab_train.py.
"""

import argparse
import fcntl
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import environment

import lab_questions as questions
from lab_model import SIZES
from lab_plan import Plan, Results
from lab_report import TABLES
from lab_train import Job, compare, text_of, train, weights_file
from peer_optimizers import why_missing

DATA = "/usr/share/perl/5.36:pm,pod"
PROSE = "/usr/share/doc:txt,md,rst"
SMOKE_TEXT = f"{Path(__file__).resolve().parents[1]}:py"


def read(out: Path) -> Results:
    found = {}
    file = out / "results.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue  # it was being written when the machine stopped
        found[result["key"]] = result
    return found


def keep(out: Path, result: dict) -> None:
    with (out / "results.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")


@contextmanager
def claim(out: Path, key: str) -> Iterator[bool]:
    """Whether this worker has the run of that key. Its lock ends with it, however it ends."""
    folder = out / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / key).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:  # another may just have finished it
            found = read(out).get(key)
            yield found is None or lost(out, found)


def lost(out: Path, result: dict) -> bool:
    """Whether a run's weights are no longer there from which others start."""
    return (
        result.get("job", {}).get("save", False) and not weights_file(out, result["key"]).exists()
    )


def check_texts(args: argparse.Namespace) -> None:
    """Runs are compared with those that are there, so their texts must be the same."""
    vocab, cached = SIZES["3.7m"].vocab, args.out / "texts"
    names = dict.fromkeys((args.data, args.prose))
    facts = [text_of(args.data, name, vocab, cached).facts() for name in names]
    for each in facts:
        print(json.dumps(each))
    file = args.out / "texts.json"
    if not file.exists():
        file.write_text(json.dumps(facts))
    elif (before := json.loads(file.read_text())) != facts:
        raise SystemExit(
            f"the texts have changed since the runs in {args.out} began: they were {before}. "
            "Put the files back, or name another --out."
        )


def work(planner: questions.Planner, first: Job, out: Path, end: float) -> None:
    """Make runs of a plan until none is missing, or until the time is up."""
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of model
    while time.monotonic() < end:
        results = read(out)
        if "equal" not in results:
            makers = [("equal", partial(compare, first, out))]
        else:
            wanted = [job for job in planner(results).wanted if not missing(job.method)]
            for k, job in enumerate(wanted):
                if job.start and lost(out, first := results[job.start]):
                    wanted[k] = Job(**first["job"])
            makers = [(job.key, partial(train, job, out)) for job in wanted]
        if not makers:
            return
        for key, make in makers:
            with claim(out, key) as mine:
                if mine:
                    result = make()
                    print(json.dumps(result), flush=True)
                    keep(out, result)
                    break
        else:
            time.sleep(2)  # others are at all of them


@cache
def missing(method: str) -> bool:
    """Whether a method's package is not installed; its runs are left for another machine."""
    if reason := why_missing(method):
        print(f"without {method}: {reason}", file=sys.stderr)
    return bool(reason)


def save(file: Path, out: Path, texts: list[str]) -> None:
    """All that was found, and by what: one run a line."""
    results = list(read(out).values())
    used = {result["text"] for result in results if "text" in result}
    vocab = SIZES["3.7m"].vocab
    facts = {
        "environment": environment(),
        "texts": [
            text_of(texts[0], text, vocab, out / "texts").facts() for text in texts if text in used
        ],
    }
    lines = ",\n".join(json.dumps(result) for result in results)
    file.write_text(json.dumps(facts, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]}}\n')


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("work", "save", "rates"), default="work")
    parser.add_argument(
        "json", nargs="?", type=Path, default="docs/lab.json", help="to save to, or to read"
    )
    parser.add_argument("--data", default=DATA, help="FOLDER or FOLDER:suffix,suffix")
    parser.add_argument("--prose", default=PROSE, help="another text, for fine-tuning")
    parser.add_argument("--out", type=Path, help="default: runs/lab; --smoke: a new folder")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after these")
    parser.add_argument(
        "--peers", action="store_true", help="only grass beside GaLore and APOLLO, 3.7M parameters"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of a very small model")
    args = parser.parse_args(given)
    args.out = args.out or Path(tempfile.mkdtemp() if args.smoke else "runs/lab")
    if args.smoke:
        args.data = args.prose = SMOKE_TEXT
    return args


def found(file: Path, smoke: bool = False, peers: bool = False) -> Plan:
    """The plan of a saved file, with its results."""
    contents = json.loads(file.read_text())
    results = {run["key"]: run for run in contents["runs"]}
    texts = dict(zip(("data", "prose"), (text["name"] for text in contents["texts"]), strict=False))
    asked = argparse.Namespace(**{"prose": PROSE, **texts}, smoke=smoke, peers=peers)
    planner, _ = planner_of(asked)
    return planner(results)


def planner_of(args: argparse.Namespace) -> tuple[questions.Planner, Job]:
    """The plan, and a run of it."""
    base = Job(args.data)
    small, words, moves = replace(base, size="0.7m"), replace(base, size="8k"), 20
    if args.smoke:
        base = Job(args.data, size="smoke", steps=4, batch=2, seq=32, windows=2)
        base = replace(base, compiler="aot_eager")
        small, words, moves = replace(base, seed=1), replace(base, seed=2), 0
    if args.peers:
        return partial(questions.beside_peers, base, moves=moves), base
    return partial(questions.everything, base, small, words, args.prose, moves=moves), base


def main(given: list[str] | None = None) -> None:
    args = parse(given)
    torch.set_num_threads(1)
    planner, base = planner_of(args)
    if args.command == "work":
        args.out.mkdir(parents=True, exist_ok=True)
        check_texts(args)
        first = replace(base, rank=0.25, scale=4.0, refresh_every=20, rest_scale=questions.REST)
        work(planner, first, args.out, time.monotonic() + 60 * args.minutes)
    elif args.command == "save":
        save(args.json, args.out, [args.data, args.prose])
    else:
        plan = found(args.json, args.smoke, args.peers)
        print("\n\n".join(table(plan) for table in TABLES))


if __name__ == "__main__":
    main()
