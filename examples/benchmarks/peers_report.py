"""Tables, goals and figures of what peers.py has found."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import matplotlib
from environment import as_line

from contenders import Run
from peers_plan import PERIODIC, SWEPT, Panels, Results, Scale, loss_of, with_seeds
from peers_timing import summary as timing_summary

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "activations": "activations, temporaries",
}
TONES = ("#9ca3af", "#60a5fa", "#15803d", "#fbbf24")
SHOWN = (
    "adamw", "adamw8bit", "galore 1/4", "galore 1/8", "apollo 1/4", "apollo 1/8", "lora 1/4",
    "grass 1/4", "grass 1/8", "grass8bit 1/4",
)  # fmt: skip
"""In the figures: the variants of grass stand in the table and in the small figures."""
SEEDS = 32  # more than anyone will have


def over_seeds(run: Run, results: Results, most: int = SEEDS) -> dict | None:
    """Mean and spread (most less least) of the held-out loss over the seeds that there are."""
    losses = [loss_of(each, results) for each in with_seeds(run, most) if each.key in results]
    if not losses:
        return None
    return {
        "mean": statistics.fmean(losses),
        "spread": max(losses) - min(losses) if math.isfinite(max(losses)) else math.nan,
        "seeds": len(losses),
        "losses": losses,
    }


def beside(line: dict[str, Run], results: Results) -> dict[str, dict]:
    """The same of several runs, over as many seeds as all of them have: others do not compare."""
    found = {x: over_seeds(run, results) for x, run in line.items()}
    most = min((each["seeds"] for each in found.values() if each), default=0)
    again = {x: over_seeds(run, results, most) for x, run in line.items()}
    return {x: each for x, each in again.items() if each}


def at_edge(best: Run, tried: Iterable[Run]) -> list[str]:
    """Rates, or K, whose best value is the least or the greatest of three or more."""
    tried, found = list(tried), []
    for rate in SWEPT:
        values = {getattr(run, rate) for run in tried}
        if len(values) > 2 and getattr(best, rate) in (min(values), max(values)):
            found.append(rate)
    return found


def settings(run: Run, edges: Iterable[str] = ()) -> str:
    """What was swept: the two rates, and K where there is one; * where it stands at an edge."""
    names = SWEPT if run.method.startswith(PERIODIC) else SWEPT[:2]
    return " / ".join(f"{getattr(run, name):g}{'*' * (name in edges)}" for name in names)


def summaries(swept: dict, results: Results, timed: dict | None) -> dict[str, dict]:
    """Of every contender that has a best run."""
    found = {}
    for name, best in swept["best"].items():
        row = over_seeds(best, results)
        tried = swept["tried"][name]
        row["run"] = {**asdict(best), "key": best.key}
        row["at_edge"] = at_edge(best, tried)
        row["settings"] = settings(best, row["at_edge"])
        row["candidates"] = {
            settings(run): loss_of(run, results) for run in tried if run.key in results
        }
        row["train"] = results[best.key]["train"]
        row["curve"] = mean_curve(best, results)
        if best.start:
            row["old_text"] = results[best.key]["old_text"]
        if timed and name in timed["measured"]:
            row |= timing_summary(timed["measured"][name], best.refresh_every)
        found[name] = row
    return found


def mean_curve(run: Run, results: Results) -> list[tuple[int, float]]:
    curves = [results[each.key]["curve"] for each in with_seeds(run, SEEDS) if each.key in results]
    return [
        (points[0][0], statistics.fmean(loss for _, loss in points))
        for points in zip(*curves, strict=True)
    ]


def goals(rows: dict[str, dict]) -> list[dict]:
    """What grass with its default rule is to reach, and whether it does."""
    found = []
    for rank, share in (("1/4", 0.01), ("1/8", 0.03)):
        grass, adamw, galore = (
            rows.get(name) for name in (f"grass {rank}", "adamw", f"galore {rank}")
        )
        if grass and adamw:
            gap = grass["mean"] / adamw["mean"] - 1
            found.append(
                {
                    "goal": f"r = {rank}: held-out loss within {share:.0%} of tuned AdamW's",
                    "measured": f"{gap:+.2%}",
                    "met": gap <= share,
                }
            )
        if grass and galore:
            gap = grass["mean"] - galore["mean"]
            spread = max(grass["spread"], galore["spread"])
            allowed, text = (spread, "no worse than GaLore's beyond the spread")
            if rank == "1/8":
                allowed, text = 0.0, "better than GaLore's"
            found.append(
                {
                    "goal": f"r = {rank}: {text}",
                    "measured": f"{gap:+.4f} nats, spread {spread:.4f} ({grass['seeds']} seeds)",
                    "met": gap < allowed if rank == "1/8" else gap <= allowed,
                }
            )
    return found


def table(rows: dict[str, dict]) -> str:
    """The losses, one line for each contender, in Markdown."""
    columns = ["", "lr / linear lr / K", "runs tried", "held-out", "spread (seeds)", "/ AdamW"]
    old = any("old_text" in row for row in rows.values())
    if old:
        columns += ["held-out before", "old text after"]
    lines = [f"| {' | '.join(columns)} |", f"|:--|{'--:|' * (len(columns) - 1)}"]
    for name, row in rows.items():
        cells = [
            name,
            row["settings"],
            str(len(row["candidates"])),
            f"{row['mean']:.4f}",
            f"{row['spread']:.4f} ({row['seeds']})" if row["seeds"] > 1 else "- (1)",
            f"{row['mean'] / rows['adamw']['mean'] - 1:+.2%}" if "adamw" in rows else "-",
        ]
        if old:
            cells += [f"{row['curve'][0][1]:.3f}", f"{row['old_text']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_costs(costs: dict[str, dict]) -> str:
    columns = [
        "", "weights MB", "gradients", "state", "activations", "sum", "peak", "ms regular",
        "special", "mean", "sent kB/step",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|:--|{'--:|' * (len(columns) - 1)}"]
    for name, row in costs.items():
        sizes = [row["bytes"][part] for part in PARTS]
        cells = [name, *(f"{size / 1e6:.2f}" for size in (*sizes, sum(sizes), row["peak"]))]
        cells += [f"{row[f'{kind}_ms']:.1f}" for kind in ("regular", "special", "mean")]
        lines.append(f"| {' | '.join(cells)} | {row['traffic'] / 1e3:.0f} |")
    return "\n".join(lines)


def table_of_panels(panels: Panels, results: Results) -> str:
    lines = ["| varied | rank | held-out, by value |", "|:--|:--|:--|"]
    for title, series in panels.items():
        for label, line in series.items():
            cells = [f"{x}: {each['mean']:.3f}" for x, each in beside(line, results).items()]
            lines.append(f"| {title} | {label} | {', '.join(cells)} |")
    return "\n".join(lines)


def about(scale: Scale) -> str:
    """What the tables are of."""
    base = scale.base
    shape = ", ".join(f"{name} {value}" for name, value in base.shape.items())
    return (
        f"LLaMA “{base.size}”{f' with {shape}' if shape else ''}, {base.dtype}; {base.steps} steps "
        f"of {base.batch} x {base.seq} bytes ({base.steps * base.batch * base.seq:,} in all); "
        f"grass: cyclic, input features, warm-up {base.warmup_steps}, carry, the head dense unless "
        f"said otherwise. Rates and K are the best of the candidates tried (first K: "
        f"{base.refresh_every}), * where one stands at the edge of its line even after one more "
        "candidate. Held-out losses are nats per byte, means over seeds."
    )


NOTES = """\
- The spread is the most less the least over the seeds; with one seed there is none.
- LoRA: adapters on frozen random matrices; embedding, norms and head train. It is no method of
  pretraining, and stands here for its bytes.
- Variants of grass and 8-bit states have the dense rate and the K of what they vary, and the best
  of a few multiples of its linear rate, with none beyond them."""
COSTS = """\
- Memory: read off the tensors; activations and temporaries are the most that the allocator's record
  of a regular step has above what was held, less all gradients. That is too little where the peak
  comes before all of these exist: look at "sum", and at "peak", the most of all kinds of steps.
- ms: of one step, all contenders in turns. "special" is the slowest kind of a period's steps
  (scoring, new rows, projections with their SVD), "mean" what a step takes in the mean at the best
  K, or at the first one where none was swept.
- Sent: gradients, as a data-parallel step would send them; for grass with the scores."""


def report(
    out: Path, scale: Scale, found: dict, results: Results, facts: dict, missing: dict[str, str]
) -> dict:
    file = out / "timing.json"
    timed = json.loads(file.read_text()) if file.exists() else None
    rows = summaries(found["pretraining"], results, timed)
    tuned = summaries(found["finetuning"], results, None)
    reached = goals(rows)
    parts = ["## Pretraining", about(scale), table(rows), NOTES]
    if reached:
        lines = ["| goal | measured | |", "|:--|--:|:--|"]
        for each in reached:
            met = "met" if each["met"] else "missed"
            lines.append(f"| {each['goal']} | {each['measured']} | {met} |")
        parts += ["### Goals", "\n".join(lines)]
    if timed:
        how = f"{timed['threads']} thread(s), {timed['rounds']} periods of 5 steps, in turns"
        first = {"run": asdict(scale.base)}
        costs = {
            name: timing_summary(measured, rows.get(name, first)["run"]["refresh_every"])
            for name, measured in timed["measured"].items()
        }
        parts += ["## What a step costs", f"{as_line(timed['environment'])}; {how}."]
        parts += [table_of_costs(costs), COSTS]
    swept = "side, selection, on_refresh and block, which have the rates of the table"
    parts += ["## Ablations", f"No new rates, but for {swept}; seeds that all of a line have."]
    parts.append(table_of_panels(found["panels"], results))
    if tuned:
        text = f"From the best AdamW run's weights, {scale.finetune_steps} steps on other text."
        parts += ["## Finetuning", text, table(tuned)]
    (out / "table.md").write_text("\n\n".join(parts) + "\n")
    contents = {
        "environment": facts,
        "settings": asdict(scale),
        "left_out": missing,
        "timing": timed and {**timed, "measured": [*timed["measured"]]},
        "pretraining": rows,
        "goals": reached,
        "ablations": {
            title: {label: beside(line, results) for label, line in series.items()}
            for title, series in found["panels"].items()
        },
        "finetuning": tuned,
    }
    (out / "peers.json").write_text(json.dumps(contents, indent=1))
    if rows:
        draw(rows, scale, out / "peers.png")
        draw_panels(found["panels"], results, scale, out / "ablations.png")
    print("\n\n".join(parts))
    return contents


def draw(rows: dict[str, dict], scale: Scale, path: Path) -> None:
    """Loss by tokens and by time, and memory by part."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    shown = {name: row for name, row in rows.items() if name in SHOWN}
    figure, (by_token, by_second, memory) = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained"
    )
    colours = plt.get_cmap("tab10").colors
    tokens = scale.base.batch * scale.base.seq
    for colour, (name, row) in zip(colours, shown.items(), strict=False):
        steps, losses = zip(*row["curve"], strict=True)
        style = {"color": colour, "label": name, "marker": ".", "linewidth": 1.6}
        style["linestyle"] = "--" if "1/8" in name else "-"
        by_token.plot([tokens * step for step in steps], losses, **style)
        if "mean_ms" in row:
            by_second.plot([step * row["mean_ms"] / 1e3 for step in steps], losses, **style)
    by_token.set(xlabel="bytes of text", ylabel="held-out loss, nats per byte", title="by tokens")
    by_second.set(xlabel="seconds: steps x mean step at K", title="by time")
    by_token.legend(frameon=False)
    timed = {name: row["bytes"] for name, row in shown.items() if "bytes" in row}
    left = [0.0] * len(timed)
    for tone, (part, label) in zip(TONES, PARTS.items(), strict=True):
        widths = [sizes[part] / 1e6 for sizes in timed.values()]
        memory.barh(list(timed), widths, left=left, color=tone, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    memory.invert_yaxis()
    memory.set(xlabel="MB", title="memory of a regular step")
    if timed:
        memory.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    figure.suptitle(about(scale).split(";")[0] + ", every contender with its best rates")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_panels(panels: Panels, results: Results, scale: Scale, path: Path) -> None:
    if not panels:
        return
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(15, 3.6 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        places = list(dict.fromkeys(x for line in series.values() for x in line))
        for label, line in series.items():
            points = [(places.index(x), each) for x, each in beside(line, results).items()]
            points = [(at, each) for at, each in points if math.isfinite(each["mean"])]
            xs, means = [at for at, _ in points], [each["mean"] for _, each in points]
            below = [each["mean"] - min(each["losses"]) for _, each in points]
            above = [max(each["losses"]) - each["mean"] for _, each in points]
            ordered = all(x.replace(".", "").isdigit() for x in places)
            style = {"marker": "o", "linestyle": "-" if ordered else "", "capsize": 3}
            axis.errorbar(xs, means, (below, above), label=label, **style)
        slant = {} if len(places[0]) < 6 else {"rotation": 30, "ha": "right"}
        axis.set_xticks(range(len(places)), places, **slant)
        axis.set(title=title, ylabel="held-out loss")
        axis.legend(frameon=False, title="r / m")
    base = scale.base
    figure.suptitle(
        f"Around grass with cyclic, input features, warm-up {base.warmup_steps}, carry, block 1, "
        f"its best rates and K; {base.steps} steps; bars: least and most over seeds"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
