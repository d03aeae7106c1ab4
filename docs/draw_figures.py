"""The pictures of how-it-works.md and architecture.md, as SVG that reads in light and in dark.

    python docs/draw_figures.py    # writes docs/figures/

tests/test_site.py compares the committed files with `figures()`. A picture brings its own
background, so that it reads on a page of either kind.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("figures")
WIDTH = 760
STYLE = """\
text { font: 14px system-ui, sans-serif; fill: #1f2933; }
.small { font-size: 12px; fill: #52606d; } .code { font: 13px ui-monospace, monospace; }
.title { font-weight: 600; } .mid { text-anchor: middle; } .end { text-anchor: end; }
.card { fill: #ffffff; stroke: #d9dfe5; } .box { fill: #e7edf4; stroke: #8296ab; }
.keep { fill: #2f9e63; stroke: #1d7a49; } .none { fill: none; stroke: #a9b6c4; }
.full { fill: #f6ddd8; stroke: #c8685b; } .line { fill: none; stroke: #52606d; stroke-width: 1.5; }
.new { fill: #7cc79e; stroke: #1d7a49; } .back { stroke: #1d7a49; stroke-dasharray: 5 4; }
.head { fill: #52606d; } .headback { fill: #1d7a49; } .on { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb; } .small { fill: #a3b0bd; } .card { fill: #16191d; stroke: #333b44; }
  .box { fill: #26313d; stroke: #6b8096; } .none { stroke: #46525f; }
  .full { fill: #4a2823; stroke: #d98578; } .line { stroke: #a3b0bd; } .head { fill: #a3b0bd; }
  .keep { fill: #2a8f59; stroke: #57c58b; } .new { fill: #1b5a39; stroke: #57c58b; }
  .on { fill: #ffffff; } .back { stroke: #57c58b; } .headback { fill: #57c58b; }
}"""
MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    f'orient="auto"><path d="M0 0 8 4 0 8z" class="{name}"/></marker>'
    for name in ("head", "headback")
)


def rect(x: float, y: float, w: float, h: float, kind: str = "box", round_: int = 3) -> str:
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{round_}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def arrow(path: str, back: bool = False) -> str:
    """Along an SVG path; dashed and green for a gradient."""
    kind, head = ("line back", "headback") if back else ("line", "head")
    return f'<path d="M{path}" class="{kind}" marker-end="url(#{head})"/>'


def node(x: float, y: float, w: float, words: str, shape: str = "", kind: str = "box") -> str:
    """A box of the graph, with what it computes and, smaller, of which shape."""
    on = " on" if kind == "keep" else ""
    lines = rect(x, y, w, 30 if not shape else 42, kind, 6)
    lines += text(x + w / 2, y + (20 if not shape else 18), words, f"mid code{on}")
    return lines + (text(x + w / 2, y + 34, shape, f"mid small{on}") if shape else "")


def matrix(x: float, y: float, columns: int, h: float, kept: tuple = (), kind: str = "box") -> str:
    """A matrix of columns 11 wide; the kept ones are filled."""
    bars = "".join(rect(x + 11 * i, y, 11, h, "keep", 0) for i in kept)
    return rect(x, y, 11 * columns, h, kind, 0) + bars


def picture(height: int, what: str, *parts: str) -> str:
    """A whole file."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{what}</title>\n<style>\n{STYLE}\n</style>\n<defs>{MARKERS}</defs>\n"
        f"{rect(0.5, 0.5, WIDTH - 1, height - 1, 'card', 8)}\n{body}\n</svg>\n"
    )


def gradient() -> str:
    """The weight gradient as matrices: G and then a selection of it, or only the selection."""
    kept = (1, 4, 6)

    def factors(y: float, selected: tuple, kind: str) -> list[str]:
        return [
            matrix(40, y, 12, 70),
            text(106, y - 8, "Dᵀ", "mid code"),
            text(106, y + 88, "m × b", "mid small"),
            text(189, y + 40, "·", "mid title"),
            matrix(207, y - 20, 9, 110, selected, kind),
            text(256, y - 28, "X", "mid code"),
            text(256, y + 108, "b × n", "mid small"),
            text(327, y + 40, "=", "mid title"),
        ]

    return picture(
        404,
        "The full gradient and then a selection, against a product of selected columns",
        text(24, 32, "The full gradient, then a selection", "title"),
        *factors(86, (), "box"),
        matrix(350, 86, 9, 70, kept, "full"),
        text(400, 78, "G", "mid code"),
        text(400, 174, "m × n: computed, written", "mid small"),
        arrow("462 120 H 528"),
        text(494, 112, "select σ", "mid small"),
        matrix(570, 86, 3, 70, (0, 1, 2)),
        text(586, 78, "C", "mid code"),
        text(594, 174, "m × r: all that is kept", "mid small"),
        text(24, 228, "The selected columns of X, then the product", "title"),
        *factors(280, kept, "none"),
        matrix(384, 280, 3, 70, (0, 1, 2)),
        text(400, 272, "C", "mid code"),
        text(400, 368, "m × r", "mid small"),
        text(470, 300, "The same numbers for r/n of the work.", "small"),
        text(470, 318, "G is never formed, and where nothing", "small"),
        text(470, 336, "else needs X, only its selected", "small"),
        text(470, 354, "columns are saved by the forward.", "small"),
    )


def graph() -> str:
    """The same as nodes of the graph, with the shapes of the example in inspecting-graphs.md."""
    return picture(
        410,
        "The gradient in the graph, as AOTAutograd makes it and as it is compiled",
        text(30, 32, "Joint graph", "title"),
        node(30, 56, 120, "D", "(64, 8)"),
        node(220, 56, 120, "X", "(64, 32), saved"),
        node(30, 128, 120, "permute", "(8, 64)"),
        arrow("90 98 V 126"),
        arrow("90 170 V 208"),
        arrow("280 98 V 228 H 244"),
        node(30, 210, 212, "mm", "(8, 32): the full gradient", "full"),
        arrow("90 252 V 280"),
        node(30, 282, 130, "permute, twice", "(8, 32)"),
        arrow("90 324 V 346"),
        node(30, 348, 212, "select(σ)", "(8, 4)", "keep"),
        text(420, 32, "As it is compiled", "title"),
        node(420, 56, 120, "D", "(64, 8)"),
        node(610, 56, 120, "X", "(64, 32)"),
        node(420, 128, 120, "permute", "(8, 64)"),
        node(592, 128, 156, "select(σ)", "(64, 4), saved", "keep"),
        arrow("480 98 V 126"),
        arrow("670 98 V 126"),
        arrow("480 170 V 208"),
        arrow("670 170 V 228 H 634"),
        node(420, 210, 212, "mm", "(8, 4)", "keep"),
        text(420, 288, "push_selection moved the selection below", "small"),
        text(420, 306, "the product; no node has the weight's shape.", "small"),
        text(420, 324, "keep_selected moved it into the forward,", "small"),
        text(420, 342, "which saves 4 of 32 columns of X.", "small"),
    )


def tap() -> str:
    """How the compact gradient leaves the graph: by the gradient of the proxy."""
    return picture(
        300,
        "The tap: the weight passes, and the proxy receives the compact gradient",
        text(24, 32, "The tap of one weight", "title"),
        node(40, 62, 150, "w", "(m, n)"),
        node(40, 136, 150, "d", "proxy, shape of C"),
        node(40, 210, 150, "σ", "r column numbers"),
        node(300, 62, 130, "tap", "returns w"),
        node(530, 62, 190, "linear(x, ·)", "and on to the loss"),
        arrow("190 76 H 298"),
        arrow("190 150 H 250 V 92 H 298"),
        arrow("190 231 H 270 V 100 H 298"),
        arrow("430 76 H 528"),
        arrow("528 92 H 432", back=True),
        text(480, 110, "G", "mid code"),
        node(300, 160, 130, "select(G, σ)", "C, (m, r)", "keep"),
        arrow("365 104 V 158", back=True),
        arrow("298 182 H 214 V 164 H 192", back=True),
        text(455, 170, "The backward of the tap: nothing to w, C to d.", "small"),
        text(455, 188, "On its way out C is put on weight.grad.", "small"),
        arrow("470 232 H 520"),
        text(530, 236, "forward", "small"),
        arrow("470 256 H 520", back=True),
        text(530, 260, "backward", "small"),
    )


def path() -> str:
    """One weight's way through the code, from torch.compile to the next selection."""
    stages = (
        (
            "1  compile, once per graph",
            ("backend.grass", "a Dynamo graph", "box"),
            ("FIND", "which weights", "box"),
            ("TAP", "adds d and σ", "box"),
            ("JOINT", "push, keep", "keep"),
            ("compile/lowering", "code", "box"),
        ),
        (
            "2  forward",
            ("GrassCallable", "the call", "box"),
            ("registry.demand", "its Subspace", "box"),
            ("graph_inputs", "σ, ρ", "keep"),
            ("DeliverGradients", "makes d", "box"),
            ("compiled graph", "saves X[:, σ]", "box"),
        ),
        (
            "3  backward",
            ("compiled graph", "Dᵀ X[:, σ]", "keep"),
            ("gradient of d", "C", "keep"),
            ("DeliverGradients", "backward", "box"),
            ("CompactGrad", "C with σ", "keep"),
            ("weight.grad", "reads as (m, n)", "box"),
        ),
        (
            "4  optimizer.step()",
            ("_plan", "checks", "box"),
            ("_prepare", "state follows σ", "box"),
            ("Step.apply", "W[:, σ] moves", "keep"),
            ("Step.commit", "after all moved", "box"),
            ("finish_steps", "step + 1", "box"),
        ),
        (
            "5  refresh, every K steps",
            ("finish_steps", "is one due?", "box"),
            ("upcoming", "what comes next", "box"),
            ("state/rules", "draws σ", "keep"),
            ("check_selections", "all ranks agree", "box"),
            ("become", "the next σ", "keep"),
        ),
    )
    parts = []
    for row, (title, *nodes) in enumerate(stages):
        y = 40 + 92 * row
        parts.append(text(24, y, title, "title"))
        for column, (name, detail, kind) in enumerate(nodes):
            x = 24 + 146 * column
            parts.append(node(x, y + 12, 128, name, detail, kind))
            if column:
                parts.append(arrow(f"{x - 18} {y + 33} H {x - 2}", back=row == 2))
    return picture(500, "The path of one weight through the code, in five rows", *parts)


def timeline() -> str:
    """Which columns move in which step, of a rule without scores and of one with them."""
    steps, rows, w, h = 16, 12, 19, 11

    def grid(x: float, periods: list[tuple[int, tuple]]) -> list[str]:
        cells = [rect(x, 84, w * steps, h * rows, "none", 0)]
        ends = [start for start, _ in periods[1:]] + [steps]
        ages = dict.fromkeys(range(rows), 0)
        for (start, kept), end in zip(periods, ends, strict=True):
            ages = {row: age if row in kept else 0 for row, age in ages.items()}
            for step in range(start, end):
                for row in kept:
                    ages[row] += 1
                    kind = "new" if ages[row] < 3 else "keep"
                    cells.append(rect(x + w * step, 84 + h * row, w, h, kind, 0))
        names = [text(x + w * (s + 0.5), 232, str(s), "mid small") for s in range(0, steps, 5)]
        return [*cells, *names, text(x + w * steps / 2, 250, "optimizer step", "mid small")]

    def bracket(x: float, first: int, after: int) -> str:
        return f'<path d="M{x + w * first + 2} 80 v-6 H{x + w * after - 2} v6" class="line"/>'

    left, right = 58, 430
    walk = [(0, (1, 4, 6, 10)), (5, (0, 3, 8, 11)), (10, (2, 5, 7, 9)), (15, (1, 3, 6, 8))]
    top = [(0, (1, 4, 6, 10)), (1, (2, 4, 7, 8)), (6, (2, 4, 5, 8)), (11, (2, 3, 5, 8))]
    return picture(
        312,
        "Which columns are selected in which step, for two rules",
        text(left, 32, '"cyclic": columns in turn', "title"),
        text(left, 52, "after n/r periods every column has had one", "small"),
        text(right, 32, '"top": the columns of largest norm', "title"),
        text(right, 52, "scored in the steps marked ▾, one in K", "small"),
        text(12, 154, "column", "small"),
        *grid(left, walk),
        *(bracket(left, s, s + 5) for s in (0, 5, 10)),
        text(left + w * 2.5, 68, "K = 5", "mid small"),
        *grid(right, top),
        *(text(right + w * (s + 0.5), 79, "▾", "mid small") for s in (0, 5, 10, 15)),
        rect(58, 276, w, h, "keep", 0),
        text(84, 286, "moves", "small"),
        rect(150, 276, w, h, "new", 0),
        text(176, 286, "moves, still warming up: a column that is new in the selection", "small"),
        rect(560, 276, w, h, "none", 0),
        text(586, 286, "stays as it is", "small"),
    )


def figures() -> dict[str, str]:
    """Every picture by the name of its file."""
    drawn = {"gradient": gradient, "graph": graph, "tap": tap, "timeline": timeline, "path": path}
    return {f"{name}.svg": draw() for name, draw in drawn.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in figures().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
