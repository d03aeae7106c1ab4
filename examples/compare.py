"""Full-rank AdamW and grass from the same weights on the same batches: one table, one picture.

    python examples/compare.py                         # a few minutes on two CPU cores
    python examples/compare.py --rank 0.25 0.125 --selection multinomial_norm
    python examples/compare.py --smoke                 # only to see that it runs

All train side by side, a step of each in turn, so that whatever else the machine is doing slows
all of them. They have two rates: one for the linear weights (--linear-lr), which grass multiplies
by n / r (--scale), and one for the rest (--lr).
"""

import argparse
import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import matplotlib
import torch

from llama import build
from pretrain import (
    UNTIMED_STEPS,
    Settings,
    add_arguments,
    is_linear,
    rank,
    settings_from,
    summarise,
    training,
)
from progress import Scalars, bar, line
from token_files import corpus_of, unit

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

FULL = "full rank (Inductor, AdamW)"
COLOURS = ("#6b7280", "#15803d", "#1d4ed8", "#b45309")
PARTS = {"weights": "weights", "gradients": "gradients", "state": "optimizer state"}


def part(rank: int | float) -> str:
    """`0.125` is 1/8, `64` a number of columns."""
    return str(Fraction(rank).limit_denominator(64)) if isinstance(rank, float) else str(rank)


def run(settings: dict[str, Settings], tensorboard: Path | None = None) -> dict[str, list[dict]]:
    """Train every method of `settings` in turns, a step at a time."""
    full = settings["full"]
    corpus = corpus_of(full)
    runs = {name: training(each, corpus) for name, each in settings.items()}
    records = {name: [] for name in runs}
    held_out = dict.fromkeys(runs, "-")
    scalars = {name: Scalars(tensorboard and tensorboard / name) for name in runs}
    steps = bar(zip(*runs.values(), strict=True), full.steps, "all")
    for step in steps:
        for name, record in zip(runs, step, strict=True):
            records[name].append(record)
            scalars[name].add(record, full.batch * full.seq)
            if "held_out" in record:
                held_out[name] = f"{record['held_out']:.3f}"
                if steps.disable:
                    print(line(name, record, full.steps), flush=True)
        steps.set_postfix(held_out)
    for each in scalars.values():
        each.close()
    return records


def table(summaries: dict[str, dict], of: str) -> str:
    """All runs, and the ratios to full rank, in Markdown."""
    rows = [
        (f"held-out loss, last ({of})", lambda each: each["held_out"], ".3f"),
        (f"held-out loss, best ({of})", lambda each: each["best"], ".3f"),
        ("seconds per step (median)", lambda each: each["seconds_per_step"], ".4f"),
        ("tokens per second", lambda each: each["tokens_per_second"], ",.0f"),
    ]
    for kind, title in PARTS.items():
        rows.append((f"{title} (bytes)", lambda each, kind=kind: each["bytes"][kind], ",d"))
    rows.append(("all three (bytes)", lambda each: sum(each["bytes"].values()), ",d"))

    first, *others = summaries
    head = "".join(f" | {name:>12} | {'ratio':>5}" for name in others)
    rule = f"|-{'-' * 12}:|-{'-' * 5}:" * len(others)
    lines = [f"| {'':<32} | {first:>12}{head} |", f"|:{'-' * 32}-|-{'-' * 12}:{rule}|"]
    for title, value, style in rows:
        full = value(summaries[first])
        cells = "".join(
            f" | {value(summaries[name]):>12{style}} | {value(summaries[name]) / full:>5.2f}"
            for name in others
        )
        lines.append(f"| {title:<32} | {full:>12{style}}{cells} |")
    return "\n".join(lines)


def notes(summaries: dict[str, dict], settings: Settings) -> str:
    parameters = dict(build(settings.size).named_parameters())
    linear = sum(p.numel() for name, p in parameters.items() if is_linear(name, p))
    share = linear / sum(p.numel() for p in parameters.values())
    head = " and the head" if settings.include_head else ""
    compiling = ", ".join(f"{name} {x['first_steps']:.0f} s" for name, x in summaries.items())
    return (
        f"Grass takes the linear weights of the blocks, {share:.0%} of all weights{head}; whatever "
        f"else there is trains dense.\n"
        f"The first {UNTIMED_STEPS} steps compile ({compiling}): no clock counts them, nor the "
        f"evaluations."
    )


def draw(
    records: dict[str, list[dict]],
    summaries: dict[str, dict],
    settings: dict[str, Settings],
    path: Path,
) -> None:
    """Held-out loss by step and by second of training, and the bytes that training holds."""
    any_of = settings["full"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_step, by_second, memory) = plt.subplots(
        1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1, 1, 1.05)
    )
    for (name, run_records), colour in zip(records.items(), COLOURS, strict=False):
        evaluated = [record for record in run_records if "held_out" in record]
        loss = [record["held_out"] for record in evaluated]
        style = {"color": colour, "label": FULL if name == "full" else name, "linewidth": 2}
        # By the median step, so that a hiccup of the machine bends no curve.
        for axis, each in ((by_step, 1), (by_second, summaries[name]["seconds_per_step"])):
            axis.plot([each * record["step"] for record in evaluated], loss, **style)
            axis.plot(each * evaluated[-1]["step"], loss[-1], "o", color=colour)
    by_step.set(xlabel="step", ylabel=f"held-out loss, {unit(any_of)}", title="by step")
    by_second.set(xlabel="seconds: steps × median step, no compiling", title="by time")
    by_step.legend(frameon=False)
    for axis in (by_step, by_second):
        axis.grid(alpha=0.25)
    draw_memory(memory, {name: summary["bytes"] for name, summary in summaries.items()})

    selected = " and ".join(part(each.rank) for each in settings.values() if each.method == "grass")
    figure.suptitle(
        f"LLaMA “{any_of.size}” on Python source text: {selected} of the columns at a time, "
        f"{any_of.selection}, refreshed every {any_of.refresh_every} steps"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_memory(axis: plt.Axes, held: dict[str, dict[str, int]]) -> None:
    width, size = 0.76 / len(held), 9 if len(held) == 2 else 7
    for offset, (name, parts) in enumerate(held.items()):
        heights = [parts[each] / 1e6 for each in PARTS]
        middle = (len(held) - 1) / 2
        places = [index + (offset - middle) * width for index in range(len(PARTS))]
        bars = axis.bar(places, heights, width * 0.94, color=COLOURS[offset])
        texts = [f"{height:.2f}" for height in heights]
        if name != "full":
            shares = [parts[each] / held["full"][each] for each in PARTS]
            texts = [f"{text}\n({share:.0%})" for text, share in zip(texts, shares, strict=True)]
        axis.bar_label(bars, texts, padding=2, fontsize=size, color=COLOURS[offset])
    axis.set_xticks(range(len(PARTS)), PARTS.values())
    axis.set(ylabel="MB", title="memory held while training")
    axis.margins(y=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, skip=("method", "rank"))
    parser.add_argument(
        "--rank", nargs="+", type=rank, default=[Settings.rank], help="grass: one run of each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where to write")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write scalars here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if len(args.rank) >= len(COLOURS):
        parser.error(f"--rank: at most {len(COLOURS) - 1} at a time")
    settings = {"full": settings_from(args, method="full", rank=args.rank[0])}
    for each in args.rank:
        name = "grass" if len(args.rank) == 1 else f"grass {part(each)}"
        settings[name] = settings_from(args, method="grass", rank=each)

    records = run(settings, args.tensorboard)
    summaries = {name: summarise(records[name], settings[name]) for name in settings}
    print("\n" + table(summaries, unit(settings["full"])))
    print("\n" + notes(summaries, settings["full"]))

    picture = args.out / "compare.png"
    draw(records, summaries, settings, picture)
    for name in settings:
        contents = {"settings": asdict(settings[name]), "summary": summaries[name]}
        contents["records"] = records[name]
        (args.out / f"{name.replace(' ', '-').replace('/', '-')}.json").write_text(
            json.dumps(contents, indent=1)
        )
    print(f"\nwrote {picture}, and the records beside it")


if __name__ == "__main__":
    main()
