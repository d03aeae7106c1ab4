"""Writes a report as one self-contained HTML page, without network or other files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from grass_fx.inspect.findings import Amount, Findings, Weight
from grass_fx.inspect.layers import place, shown
from grass_fx.inspect.plot import MEMORY, PRODUCTS, Bars, bars
from grass_fx.inspect.text import amount_text, headline, readable, setting

TEMPLATE = Path(__file__).with_name("report.html")

STATUS = {
    "pushed": "its full gradient is never formed",
    "taken": "its compact gradient is selected from a full one",
    "dense": "it trains as without grass",
}
AMOUNTS = (
    ("gradient", "gradient", "bytes"),
    ("state", "state", "bytes"),
    ("flops", "weight_gradient_flops", "FLOPs"),
)
"""Columns as (key to sort by, attribute of ``Cost``, unit)."""


def as_html(report: Findings) -> str:
    """The page: tables of weights, bars of memory and FLOPs, and the graph of a chosen weight."""
    groups = report.groups()
    taken = [group for group in groups if group[1][0].taken]
    dense = [group for group in groups if not group[1][0].taken]
    parts = {
        "headline": "".join(f"<p>{escape(line)}</p>" for line in headline(report).splitlines()),
        "model": escape(report.subject.model),
        "facts": _facts(report),
        "bars": "".join(_panel(report, each) for each in bars(report)),
        "others": _others(report),
        "taken": _rows(report, taken, _cells),
        "dense": _rows(report, dense, _dense_cells),
        "saved": _saved(report),
        "choices": _choices(taken),
        "selected": " or ".join(sorted({str(weight.selects) for _, (weight, *_) in taken})),
        "data": _data(report.weights),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name in ("taken", "dense", "choices", "saved"):
        if not parts[name]:  # leave <!--if name--> ... <!--end name--> out
            page = re.sub(rf"<!--if {name}-->.*?<!--end {name}-->", "", page, flags=re.S)
    page = re.sub(r"<!--(if|end) \w+-->\n?", "", page)
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _facts(report: Findings) -> str:
    """What was explained, when, and symbols, as paragraphs."""
    versions = (f"{name} {version}" for name, version in report.subject.versions.items())
    lines = [setting(report), f"{report.subject.date}, {', '.join(versions)}."]
    if report.symbols:
        known = ", ".join(f"{name} = {value}" for name, value in report.symbols.items())
        lines.append(f"Sizes are symbolic. Bars and small numbers are at {known}.")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


# --- bars -----------------------------------------------------------------------------------------


def _panel(report: Findings, of: Bars) -> str:
    """Two stacked bars, with their numbers below."""
    rows = {name: (before, after) for name, before, after, _ in report.rows()}
    whole = "memory in all" if of.unit == "bytes" else "all products"
    lines = [(f"c{k}", name, before, after) for k, (name, before, after) in enumerate(of.parts)]
    lines.append(("", whole, *rows[whole]))
    if (values := of.values(report)) is None:
        drawn = "<p>No bars: some sizes have no value.</p>"
    else:
        most = max(map(sum, values)) or 1
        drawn = "".join(
            f'<div class="bar"><span class="of">{name}</span><div>{_segments(of, parts, most)}'
            f"</div><b>{readable(sum(parts), of.unit)}</b></div>"
            for name, parts in zip(("full rank", "grass"), values, strict=True)
        )
    body = "".join(_total(report, *line, of.unit) for line in lines)
    return (
        f'<section class="panel"><h2>{of.title.capitalize()}</h2>{drawn}<table class="totals">'
        "<thead><tr><th></th><th>full rank</th><th>grass</th><th>ratio</th></tr></thead>"
        f"<tbody>{body}</tbody></table></section>"
    )


def _segments(of: Bars, values: Sequence[float], most: float) -> str:
    return "".join(
        f'<i class="c{k}" style="width:{100 * value / most:.3f}%" '
        f'title="{name}: {readable(value, of.unit)}"></i>'
        for k, ((name, *_), value) in enumerate(zip(of.parts, values, strict=True))
        if value
    )


def _total(
    report: Findings, colour: str, name: str, before: Amount, after: Amount, unit: str
) -> str:
    swatch = f'<i class="swatch {colour}"></i>' if colour else ""
    kind = "" if colour else ' class="sum"'
    cells = _compared(report, before, after, unit)
    return f'<tr{kind}><th scope="row">{swatch}{name}</th>{cells}</tr>'


def _compared(report: Findings, before: Amount, after: Amount, unit: str) -> str:
    """Table cells: an amount at full rank, with grass, and their ratio."""
    pair = report.evaluated(before), report.evaluated(after)
    ratio = f"{pair[1] / pair[0]:.3f}" if pair[0] and pair[1] is not None else ""
    cells = "".join(_amount(report, each, unit) for each in (before, after))
    return f'{cells}<td class="n">{ratio}</td>'


def _others(report: Findings) -> str:
    """The totals that are not part of a bar."""
    skipped = {*MEMORY, *PRODUCTS, "memory in all", "all products"}
    rows = [row for row in report.rows() if row[0] not in skipped]
    text = "".join(_total(report, "", *row) for row in rows)
    if (more := report.evaluated(report.scoring_step)) is None or more > 0:
        cell = _amount(report, report.scoring_step, "bytes")
        text += f'<tr><th scope="row">a scoring step, more</th><td></td>{cell}<td></td></tr>'
    return text.replace(' class="sum"', "")


# --- tables ---------------------------------------------------------------------------------------


def _amount(report: Findings, amount: Amount, unit: str) -> str:
    """A table cell: a readable number, with the exact one in its tooltip.

    A symbolic amount shows its expression, and below it the number in small print.
    """
    number = report.evaluated(amount)
    symbolic = bool(getattr(amount, "free_symbols", ()))
    text = "" if number is None else readable(number, unit)
    if symbolic:
        small = f"<small>{text}</small>" if text else ""
        text = f"<code>{escape(amount_text(amount))}</code>{small}"
    exact = "" if symbolic or number is None else f' title="{number:,.0f} {unit}"'
    order = "-1" if number is None else f"{number:.0f}"
    return f'<td class="n" data-v="{order}"{exact}>{text}</td>'


Cells = Callable[[Findings, Sequence[Weight]], str]


def _rows(report: Findings, groups: Sequence[tuple[str, list[Weight]]], cells: Cells) -> str:
    """One ``tbody`` for each group: a row for its sum, and rows for its weights that unfold."""
    bodies = []
    for name, group in groups:
        lines = [_row(report, name, group, cells)]
        if len(group) > 1:
            lines += [_row(report, each.name, [each], cells, member=True) for each in group]
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return "\n".join(bodies)


def _row(
    report: Findings, name: str, group: Sequence[Weight], cells: Cells, member: bool = False
) -> str:
    first = group[0]
    text = _name(name)
    if first.pictures:
        text = f'<button class="pick" data-weight="{escape(first.name)}">{text}</button>'
    shape = f"{escape(str(first.shape))}<small>{escape(first.dtype)}</small>"
    more = f'<td data-v="{math.prod(first.shape)}">{shape}</td>{cells(report, group)}'
    return _named(name, text, len(group), more, member)


def _named(name: str, text: str, count: int, cells: str, member: bool) -> str:
    """A table row that begins with a name, and a button that unfolds it if it stands for more."""
    if count > 1:
        fold = f'aria-expanded="false" aria-label="the {count} of {escape(name)}"'
        text = f'<button class="fold" {fold}></button>{text} <small>× {count}</small>'
    kind = ' class="member" hidden' if member else ""
    return f'<tr{kind}><th scope="row" data-v="{escape(name)}">{text}</th>{cells}</tr>'


def _name(name: str) -> str:
    """A name that may be broken after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _saved(report: Findings) -> str:
    """The rows of the table of activations: a ``tbody`` for modules alike but for numbers."""
    bodies = []
    for name, group in report.saved_groups():
        lines = [(name, group), *([(row.module, [row]) for row in group] if group[1:] else [])]
        text = ""
        for k, (module, rows) in enumerate(lines):
            before, after = (sum(getattr(r, when) for r in rows) for when in ("before", "after"))
            label = {None: "(no module, or one that is not known)", "": "(the model itself)"}
            title = label.get(module, str(module))
            cells = _compared(report, before, after, "bytes")
            text += _named(title, _name(title), len(rows), cells, member=k > 0)
        bodies.append(f"<tbody>{text}</tbody>")
    return "\n".join(bodies)


def _cells(report: Findings, group: Sequence[Weight]) -> str:
    first = group[0]
    status = f'<span class="{first.status}" title="{STATUS[first.status]}">{first.status}</span>'
    status += "".join(
        f"<small>{escape(text)}</small>" for text in (first.kernel, first.reason) if text
    )
    amounts = "".join(
        _amount(report, sum(getattr(getattr(w, when), kind) for w in group), unit)
        for _, kind, unit in AMOUNTS
        for when in ("before", "after")
    )
    return (
        f'<td data-v="{first.rank}" title="side {first.side}">{first.rank} {first.selects}</td>'
        f"<td>{status}</td>{amounts}"
    )


def _dense_cells(report: Findings, group: Sequence[Weight]) -> str:
    amounts = "".join(
        _amount(report, sum(getattr(w.after, kind) for w in group), unit)
        for _, kind, unit in AMOUNTS
    )
    return f'<td class="why">{escape(group[0].reason)}</td>{amounts}'


# --- graphs ---------------------------------------------------------------------------------------


def _choices(groups: Sequence[tuple[str, list[Weight]]]) -> str:
    """The options of the select box; the weights of a group stand together."""
    text = ""
    for name, group in groups:
        names = [escape(weight.name) for weight in group if weight.pictures]
        options = "".join(f'<option value="{value}">{value}</option>' for value in names)
        if len(names) > 1:
            options = f'<optgroup label="{escape(name)}">{options}</optgroup>'
        text += options
    return text


def _data(weights: Sequence[Weight]) -> str:
    """The JSON that the page's script draws from.

    It has each distinct drawing once, and for each weight the numbers of its drawings and the names
    of their nodes.
    """
    pool: dict[str, int] = {}
    drawn: dict[str, Any] = {}
    for weight in weights:
        if not weight.pictures:
            continue
        entry: dict[str, Any] = {
            "text": f"{weight.shape}, of which {weight.rank} {weight.selects} are selected: "
            f"{STATUS[weight.status]}" + (f" ({weight.reason})" if weight.reason else "")
        }
        for when in ("before", "after"):
            nodes = shown(weight.pictures.get(when, ()))
            key = json.dumps(place(nodes))
            names = [(node.name, node.label, node.shape) for node in nodes]
            entry[when] = [pool.setdefault(key, len(pool)), [" ".join(texts) for texts in names]]
        drawn[weight.name] = entry
    text = json.dumps({"weights": drawn})
    text = f'{text[:-1]}, "drawings": [{", ".join(pool)}]}}'
    return text.replace("<", "\\u003c")
