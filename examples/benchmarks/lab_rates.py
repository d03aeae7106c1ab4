"""The lab's table of rates: which scale compact updates want."""

import math
import statistics
from fractions import Fraction

from lab_plan import Cell, Plan
from lab_train import Job

CLOSE = 0.01  # nats


def fraction(rank: float) -> str:
    part = Fraction(rank).limit_denominator(64)
    return f"{part.numerator}/{part.denominator}" if rank < 1 else "1"


def rate(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def vertex(tried: dict[float, float], middle: float) -> float:
    """Where the best stands, between the values that were tried: the vertex of the parabola, over
    the logarithm, through the best and its neighbours."""
    left, best, right = (tried.get(k * middle, math.inf) for k in (0.5, 1, 2))
    if not math.isfinite(left + right):
        return middle
    curvature = left - 2 * best + right
    return middle * 2 ** ((left - right) / (2 * curvature)) if curvature > 0 else middle


def ratio(cell: Cell) -> float:
    """The best linear rate of grass over that of full gradients, both between those tried."""
    rate = cell.full.linear_lr
    return vertex(cell.tried, cell.best.scale) * rate / vertex(cell.rates, rate)


def at(cell: Cell, scale: float) -> float:
    """The loss at a scale, between those that were tried along straight lines over log(scale)."""
    lower = max((each for each in cell.tried if each <= scale), default=None)
    upper = min((each for each in cell.tried if each >= scale), default=None)
    if lower is None or upper is None:
        return math.nan
    if lower == upper:
        return cell.tried[lower]
    part = math.log(scale / lower) / math.log(upper / lower)
    return (1 - part) * cell.tried[lower] + part * cell.tried[upper]


def rates_table(plan: Plan) -> str:
    """For each cell the loss by scale, and what the scale n/r costs beside the best."""
    scales = sorted({scale for cell in plan.cells for scale in cell.tried})
    lines = []
    for name in dict.fromkeys(cell.name for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.name == name]
        lines += [f"**{name}**", "", *references(plan, cells[0].full), ""]
        lines += [
            "| r | K | " + " | ".join(f"{c:g}" for c in scales) + " | best ratio | n/r - best |"
        ]
        lines += ["|---" * (len(scales) + 4) + "|"]
        for cell in sorted(cells, key=lambda cell: (cell.refresh_every, -cell.rank)):
            shown = []
            for scale in scales:
                loss = cell.tried.get(scale)
                text = "" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged"
                shown.append(f"**{text}**" if scale == 1 / cell.rank else text)
            lines.append(
                f"| {fraction(cell.rank)} | {cell.refresh_every} | {' | '.join(shown)} | "
                f"{ratio(cell):.1f} | {excess(cell):+.3f} |"
            )
        lines.append("")
    return "\n".join(
        lines + conclusion([cell for cell in plan.cells if cell.full.method == "adamw"])
    )


def references(plan: Plan, full: Job) -> list[str]:
    """The sweep with full gradients, in a sentence."""
    lines = (("linear", plan.along("linear_lr", full)), ("dense", plan.along("lr", full)))
    swept = "; ".join(
        f"{name} " + ", ".join(f"{rate(x)}: {loss:.3f}" for x, loss in sorted(line.items()))
        for name, line in lines
    )
    return [f"Full gradients: {plan.loss(full):.3f} ({swept})"]


def excess(cell: Cell) -> float:
    return cell.tried[1 / cell.rank] - cell.tried[cell.best.scale]


def conclusion(cells: list[Cell]) -> list[str]:
    if not cells:
        return ["No cell is complete."]
    close = sum(excess(cell) <= CLOSE for cell in cells)
    worst = max(map(excess, cells))
    powers = [math.log(ratio(cell)) / math.log(1 / cell.rank) for cell in cells]
    lines = [
        f"With AdamW n/r is within {CLOSE} nats of the best scale in {close} of {len(cells)} "
        f"cells, and at most {worst:.3f} above it. The ratio of the best rates is (n/r)^p with p "
        f"= {statistics.median(powers):.2f} in the median, from {min(powers):.2f} to "
        f"{max(powers):.2f}.",
        "",
        "| rule | mean above the best | at most | within 0.01 |",
        "|---|---|---|---|",
    ]
    for power in (0, 0.5, 0.75, 1, 1.25):
        above = [at(cell, cell.rank**-power) - cell.tried[cell.best.scale] for cell in cells]
        known = [each for each in above if math.isfinite(each)]
        if known:
            lines.append(
                f"| (n/r)^{power:g} | {statistics.fmean(known):.3f} | {max(known):.3f} | "
                f"{sum(each <= CLOSE for each in known)} of {len(known)} |"
            )
    return lines
