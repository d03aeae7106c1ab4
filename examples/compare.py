"""Full-rank AdamW and grass from the same weights on the same batches: one table, one picture.

    python examples/compare.py                         # a few minutes on two CPU cores
    python examples/compare.py --rank 0.125 --selection multinomial_norm
    python examples/compare.py --smoke                 # only to see that it runs

The two train side by side, a step of one and a step of the other, so that whatever else the
machine is doing slows both. Both have two rates: one for the linear weights (--linear-lr), which
grass multiplies by n / r (--scale), and one for the rest (--lr).
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch

from llama import build
from pretrain import (
    UNTIMED_STEPS,
    Settings,
    add_arguments,
    is_linear,
    settings_from,
    summarise,
    training,
)
from progress import Scalars, bar, line
from token_files import corpus_of, unit

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

LABELS = {"full": "full rank (Inductor, AdamW)", "grass": "grass"}
COLOURS = {"full": "#6b7280", "grass": "#15803d"}
PARTS = {"weights": "weights", "gradients": "gradients", "state": "optimizer state"}


def run(settings: dict[str, Settings], tensorboard: Path | None = None) -> dict[str, list[dict]]:
    """Train every method of `settings` in turns, a step at a time."""
    full = settings["full"]
    corpus = corpus_of(full)
    runs = {name: training(each, corpus) for name, each in settings.items()}
    records = {name: [] for name in runs}
    held_out = dict.fromkeys(runs, "-")
    scalars = {name: Scalars(tensorboard and tensorboard / name) for name in runs}
    steps = bar(zip(*runs.values(), strict=True), full.steps, "both")
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
    """Both runs and their ratio, in Markdown."""
    full, grass = summaries["full"], summaries["grass"]
    rows = [
        (f"held-out loss, last ({of})", full["held_out"], grass["held_out"], ".3f"),
        (f"held-out loss, best ({of})", full["best"], grass["best"], ".3f"),
        ("seconds per step (median)", full["seconds_per_step"], grass["seconds_per_step"], ".4f"),
        ("tokens per second", full["tokens_per_second"], grass["tokens_per_second"], ",.0f"),
    ]
    for part, title in PARTS.items():
        rows.append((f"{title} (bytes)", full["bytes"][part], grass["bytes"][part], ",d"))
    both = [sum(each["bytes"].values()) for each in (full, grass)]
    rows.append(("all three (bytes)", *both, ",d"))

    lines = [
        f"| {'':<32} | {'full':>12} | {'grass':>12} | {'ratio':>5} |",
        f"|:{'-' * 32}-|-{'-' * 12}:|-{'-' * 12}:|-{'-' * 5}:|",
    ]
    for title, left, right, style in rows:
        lines.append(
            f"| {title:<32} | {left:>12{style}} | {right:>12{style}} | {right / left:>5.2f} |"
        )
    return "\n".join(lines)


def notes(summaries: dict[str, dict], settings: Settings) -> str:
    parameters = dict(build(settings.size).named_parameters())
    linear = sum(p.numel() for name, p in parameters.items() if is_linear(name, p))
    share = linear / sum(p.numel() for p in parameters.values())
    head = " and the head" if settings.include_head else ""
    compiling = {name: f"{each['first_steps']:.0f} s" for name, each in summaries.items()}
    return (
        f"Grass takes the linear weights of the blocks, {share:.0%} of all weights{head}; whatever "
        f"else there is trains dense.\n"
        f"The first {UNTIMED_STEPS} steps compile (full {compiling['full']}, grass "
        f"{compiling['grass']}): no clock counts them, nor the evaluations."
    )


def draw(
    records: dict[str, list[dict]], summaries: dict[str, dict], settings: Settings, path: Path
) -> None:
    """Held-out loss by step and by second of training, and the bytes that training holds."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_step, by_second, memory) = plt.subplots(
        1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1, 1, 1.05)
    )
    for name, run_records in records.items():
        evaluated = [record for record in run_records if "held_out" in record]
        loss = [record["held_out"] for record in evaluated]
        style = {"color": COLOURS[name], "label": LABELS[name], "linewidth": 2}
        # By the median step, so that a hiccup of the machine bends no curve.
        for axis, each in ((by_step, 1), (by_second, summaries[name]["seconds_per_step"])):
            axis.plot([each * record["step"] for record in evaluated], loss, **style)
            axis.plot(each * evaluated[-1]["step"], loss[-1], "o", color=COLOURS[name])
    by_step.set(xlabel="step", ylabel=f"held-out loss, {unit(settings)}", title="by step")
    by_second.set(xlabel="seconds: steps × median step, no compiling", title="by time")
    by_step.legend(frameon=False)
    for axis in (by_step, by_second):
        axis.grid(alpha=0.25)
    draw_memory(memory, {name: summary["bytes"] for name, summary in summaries.items()})

    selected = f"{settings.rank:.0%}" if isinstance(settings.rank, float) else settings.rank
    figure.suptitle(
        f"LLaMA “{settings.size}” on Python source text: {selected} of the rows at a time, "
        f"{settings.selection}, refreshed every {settings.refresh_every} steps"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_memory(axis: plt.Axes, held: dict[str, dict[str, int]]) -> None:
    width = 0.38
    for offset, (name, parts) in enumerate(held.items()):
        heights = [parts[part] / 1e6 for part in PARTS]
        places = [index + (offset - 0.5) * width for index in range(len(PARTS))]
        bars = axis.bar(places, heights, width * 0.94, color=COLOURS[name])
        texts = [f"{height:.2f}" for height in heights]
        if name != "full":
            shares = [parts[part] / held["full"][part] for part in PARTS]
            texts = [f"{text}\n({share:.0%})" for text, share in zip(texts, shares, strict=True)]
        axis.bar_label(bars, texts, padding=2, fontsize=9, color=COLOURS[name])
    axis.set_xticks(range(len(PARTS)), PARTS.values())
    axis.set(ylabel="MB", title="memory held while training")
    axis.margins(y=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, skip=("method",))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where to write")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write scalars here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: settings_from(args, method=name) for name in LABELS}

    records = run(settings, args.tensorboard)
    summaries = {name: summarise(records[name], settings[name]) for name in settings}
    print("\n" + table(summaries, unit(settings["full"])))
    print("\n" + notes(summaries, settings["grass"]))

    picture = args.out / "compare.png"
    draw(records, summaries, settings["grass"], picture)
    for name in settings:
        contents = {"settings": asdict(settings[name]), "summary": summaries[name]}
        contents["records"] = records[name]
        (args.out / f"{name}.json").write_text(json.dumps(contents, indent=1))
    print(f"\nwrote {picture}, and the records beside it")


if __name__ == "__main__":
    main()
