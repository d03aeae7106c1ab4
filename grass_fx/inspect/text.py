"""A report as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from grass_fx.config import GrassConfig
from grass_fx.inspect.findings import Amount, Findings, Weight

UNITS = {"bytes": ("kB", "MB", "GB", "TB"), "FLOPs": ("kFLOP", "MFLOP", "GFLOP", "TFLOP")}


def readable(value: float, unit: str) -> str:
    """A number of bytes or FLOPs with a decimal prefix: 1134336 bytes are "1.13 MB"."""
    if abs(value) < 1000:
        return f"{value:.0f} {unit}"
    for name in UNITS[unit]:
        value /= 1000
        if abs(value) < 999.5 or name == UNITS[unit][-1]:
            break
    return f"{value:.3g} {name}" if value < 999.5 else f"{value:.0f} {name}"


def as_text(report: Findings) -> str:
    """What was explained, a headline and the tables of a report; alike weights share a line."""
    head = f"{setting(report)}\n{headline(report)}"
    parts = [head, _weights(report), _left(report), _totals(report)]
    symbols = ", ".join(f"{name} = {value}" for name, value in report.symbols.items())
    if symbols:
        parts.append(f"Amounts at {symbols}; report.flops and others have them as symbols.")
    return "\n\n".join(part for part in parts if part)


def setting(report: Findings) -> str:
    """A sentence with the model, its device and inputs, and the options that are no defaults."""
    subject, config = report.subject, GrassConfig.from_options(report.options)
    changed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    given = {"rank": config.rank, **report.options}
    options = [f"{k} = {v!r}" for k, v in given.items() if k == "rank" or k in changed]
    inputs = f", inputs {', '.join(subject.inputs)}" if subject.inputs else ""
    return f"{subject.model} on {subject.device}{inputs}; {', '.join(options)}."


def headline(report: Findings) -> str:
    """A sentence that counts the matrices taken and pushed, and the graphs."""
    matrices = [weight for weight in report.weights if len(weight.shape) > 1]
    taken = [weight for weight in matrices if weight.taken]
    pushed = sum(weight.status == "pushed" for weight in taken)
    graphs = f"{report.graphs} graph{'' if report.graphs == 1 else 's'}"
    line = f"{len(taken)} of {len(matrices)} weight matrices get compact gradients"
    if taken:
        line += f"; the full gradient is formed for {(len(taken) - pushed) or 'none'} of them"
    lines = [f"{line} ({graphs})."]
    if not report.graphs:
        lines.append("No training graph was compiled: does the model run inside torch.compile?")
    elif not taken:
        lines.append("Nothing is rewritten: every parameter trains dense.")
    return "\n".join(lines)


def _weights(report: Findings) -> str:
    groups = [(name, group) for name, group in report.groups() if group[0].taken]
    if not groups:
        return ""
    head = ["compact", "", "shape", "selected", "", "gradient products", "", "kernel"]
    rows = [_row(report, name, group) for name, group in groups]
    return _table([head, *rows], "l>l>l>ll")


def _row(report: Findings, name: str, group: Sequence[Weight]) -> list[str]:
    first = group[0]
    before, after = (
        _amount(report, sum(getattr(w, side).weight_gradient_flops for w in group), "FLOPs")
        for side in ("before", "after")
    )
    count = f"x {len(group)}" if len(group) > 1 else ""
    kernel = first.kernel or "none"
    if first.reason:
        kernel += f"  ({first.reason})"
    cells = (first.shape, first.rank, first.selects, f"{before} ->", after, kernel)
    return [name, count, *map(str, cells)]


def _left(report: Findings) -> str:
    """The table of dense parameters: matrices by name with the reason, vectors only counted."""
    rows = [["dense", "", "shape", "why"]]
    vectors = 0
    for name, group in report.groups():
        first = group[0]
        if first.taken:
            continue
        if len(first.shape) < 2 and "dimension" in first.reason:
            vectors += len(group)
            continue
        count = f"x {len(group)}" if len(group) > 1 else ""
        rows.append([name, count, str(first.shape), first.reason])
    if vectors:
        rows.append(["vectors", f"x {vectors}", "", "only matrices are taken"])
    return _table(rows, "l>ll") if len(rows) > 1 else ""


def _totals(report: Findings) -> str:
    rows = [["in a step", "full rank", "grass", "ratio"]]
    for name, before, after, unit in report.rows():
        values = report.evaluated(before), report.evaluated(after)
        ratio = f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else ""
        rows.append([name, *(_amount(report, each, unit) for each in (before, after)), ratio])
    if report.evaluated(report.scoring_step) != 0:
        rows.append(["a scoring step, more", "", _amount(report, report.scoring_step, "bytes"), ""])
    return _table(rows, "l>>>")


def _amount(report: Findings, amount: Amount, unit: str) -> str:
    value = report.evaluated(amount)
    return amount_text(amount) if value is None else readable(value, unit)


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'>' if side == '>' else '<'}{width}}"
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def amount_text(amount: Amount) -> str:
    """A symbolic amount as its expression, a number with thousands separators."""
    return str(amount) if hasattr(amount, "free_symbols") else f"{amount:,}"
