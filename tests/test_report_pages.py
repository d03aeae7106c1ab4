"""The page and the picture of a report: what they hold, and what a browser makes of the page."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import sympy
import torch

from grass_fx.errors import MissingPackageError
from grass_fx.inspect.explain import Cost, GraphNode, Saved, Subject, Weight, explain
from grass_fx.inspect.html import as_html
from grass_fx.inspect.layers import HEIGHT, WIDTH, place, roles
from grass_fx.inspect.plot import as_figure, bars
from grass_fx.inspect.report import Report
from helpers import mlp

VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}


@pytest.fixture(scope="module")
def report():
    return explain(mlp(32, 48, 16), torch.randn(8, 32), options={"rank": 4, "exclude": ["2.*"]})


@pytest.fixture(scope="module")
def symbolic():
    return explain(mlp(32, 48), torch.randn(8, 32), options={"rank": 4}, dynamic=True)


def weight(name, status="pushed", reason="", **more):
    """A made up weight of 8 kB, and its gradient of 1 kB."""
    after = Cost(weight_gradient_flops=100, gradient=1000, state=2000)
    before = Cost(weight_gradient_flops=800, gradient=8000, state=16000)
    more = {"before": before, "after": after, "selects": "rows", "rank": 5, **more}
    return Weight(name, (40, 50), "float32", status, reason, kernel="gather + mm", **more)


def made_up(*weights, **more):
    subject = Subject("Made", ("(2, 3) int64",), "cpu", "2026-11-30", {"torch": "2.13.0"})
    found = {"activations": (100, 100), "saved": (), "scoring_step": 0, "graphs": 1}
    return Report(subject, weights, 1000, **{**found, "options": {}, "symbols": {}, **more})


class Page(HTMLParser):
    """Elements, checked to be nested; the rows of tables; what would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.ids, self.loaded, self.script = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loaded += [attributes[k] for k in ("src", "href") if k in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.script += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, name):
        """The first row that begins so."""
        return next(row for row in self.rows if row and row[0] == name)


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_the_tables_have_what_the_report_has(report):
    page = Page(as_html(report))
    first = report["0.weight"]
    row = page.row("0.weight")
    assert row[1:4] == ["(48, 32)float32", "4 columns", f"pushed{first.kernel}"]
    assert row[4:8] == ["6.14 kB", "768 bytes", "12.3 kB", "1.62 kB"]
    assert (first.before.gradient, first.after.state) == (6144, 2 * 768 + 16 * 4 + 16)
    assert page.row("2.weight")[2] == report["2.weight"].reason != ""
    assert page.row("memory in all")[1] in str(report)
    assert "1 of 2 weight matrices get compact gradients" in as_html(report)


def test_the_page_needs_nothing_else_and_is_the_same_each_time(report):
    text = as_html(report)
    assert Page(text).loaded == [] and "@import" not in text and "url(h" not in text
    assert set(re.findall(r"https?://[^\"' )]*", text)) == {"http://www.w3.org/2000/svg"}  # a name
    assert len(set(Page(text).ids)) == len(Page(text).ids)
    assert as_html(report) == text


def test_the_drawings_are_of_the_graphs_before_and_after(report):
    data = data_of(as_html(report))
    assert [*data["weights"]] == ["0.weight"]
    labels = {}
    for when in ("before", "after"):
        index, names = data["weights"]["0.weight"][when]
        nodes = data["drawings"][index]["nodes"]
        labels[when] = {(node[3], node[2]) for node in nodes}
        assert len(names) == len(nodes)
    assert {("mm", "full"), ("select", "compact")} <= labels["before"]
    assert ("selected_mm", "compact") in labels["after"]
    assert "full" not in {role for _, role in labels["after"]}


def test_nodes_stand_below_their_inputs_and_apart():
    def op(name, *inputs, label="view", kind="op"):
        return GraphNode(name, kind, label, "(2, 3)", inputs)

    nodes = [
        op("x", kind="rest"), op("i", label="indices", kind="input"), op("d", kind="rest"),
        op("a", "x"), op("b", "a"), op("mm", "b", "d", label="mm"), op("t", "mm"),
        op("far", "x", "t", label="add.Tensor"), op("s", "far", "i", label="select"),
    ]  # fmt: skip
    assert roles(nodes)[-4:] == ["full", "full", "full", "compact"]
    drawing = place(nodes)
    at = {node.name: drawn[:2] for node, drawn in zip(nodes, drawing["nodes"], strict=True)}
    for node in nodes:
        assert all(at[name][1] + HEIGHT < at[node.name][1] for name in node.inputs)
    for (x, y), (u, v) in zip(sorted(at.values()), sorted(at.values())[1:], strict=False):
        assert y != v or u >= x + WIDTH
    assert len(drawing["edges"]) == 9
    assert max(map(len, drawing["edges"])) > 2  # x to far goes around what lies between
    assert place([]) == {"size": [0, -30], "nodes": [], "edges": []}


def test_names_are_escaped():
    name = '<u>"&</script>'
    node = GraphNode("mm_1", "op", "mm", "(40, 50)", ())
    text = as_html(made_up(weight(name, pictures={"before": (node,), "after": (node,)})))
    assert "<u>" not in text
    assert Page(text).row(name)
    assert [*data_of(text)["weights"]] == [name]


def test_the_page_says_what_was_explained_and_by_which_modules_activations_are_made():
    saved = [Saved(f"h.{k}.up", 2000, 500) for k in range(3)]
    saved += [Saved("", 30, 30), Saved(None, 7, 7)]
    text = as_html(made_up(saved=(*saved,), options={"rank": 3, "side": "in"}))
    assert "Made on cpu, inputs (2, 3) int64; rank = 3.<" in text  # "in" is the default
    assert "2026-11-30, torch 2.13.0." in text
    page = Page(text)
    assert page.row("h.*.up × 3")[1:] == ["6 kB", "1.5 kB", "0.250"]
    assert page.row("h.2.up")[1:] == ["2 kB", "500 bytes", "0.250"]
    assert page.row("(the model itself)")[1] == "30 bytes"
    assert page.row("(no module, or one that is not known)")[1] == "7 bytes"


def test_symbolic_amounts_are_shown_as_they_are(symbolic):
    flops = symbolic["0.weight"].after.weight_gradient_flops
    cell = Page(as_html(symbolic)).row("0.weight")[9]
    assert flops.free_symbols and cell.startswith(str(flops))
    assert symbolic.evaluated(flops) == 2 * 8 * 48 * 4
    assert cell.endswith("3.07 kFLOP")


def test_a_size_without_value_leaves_bars_out():
    s = sympy.Symbol("s0")
    lone = weight("w", before=Cost(forward_flops=s), after=Cost(forward_flops=s))
    report = made_up(lone, symbols={"s0": None})
    assert [each.values(report) is None for each in bars(report)] == [False, True]
    assert as_html(report).count("No bars") == 1
    assert len(as_figure(report).axes) == 2


def test_reports_of_every_kind():
    """No weight, no graph, only dense ones, a stopped one, and a stack."""
    empty = as_html(made_up(graphs=0))
    assert "No training graph was compiled" in empty and 'id="graph"' not in Page(empty).ids
    dense = as_html(made_up(weight("w", "dense", "frozen in", after=Cost(gradient=8000))))
    assert 'data-sort="sort"' not in dense and Page(dense).row("w")[2] == "frozen in"
    stopped = Page(as_html(made_up(weight("w", "taken", "no rule for aten.foo"))))
    assert stopped.row("w")[2:4] == ["5 rows", "takengather + mmno rule for aten.foo"]
    stack = replace(weight("w"), shape=(4, 40, 50))
    assert Page(as_html(made_up(stack))).row("w")[1] == "(4, 40, 50)float32"


def test_alike_weights_share_a_row_and_a_drawing():
    nodes = [(GraphNode(f"mm_{k}", "op", "mm", "(40, 50)", ()),) for k in range(300)]
    weights = [
        weight(f"layers.{k}.w", pictures={"before": each, "after": each})
        for k, each in enumerate(nodes)
    ]
    text = as_html(made_up(*weights))
    assert len(data_of(text)["drawings"]) == 1
    assert text.count("<tbody>") == 4  # three of totals
    assert Page(text).row("layers.*.w × 300")[5] == "300 kB"
    assert len(text) < 600_000


def test_the_picture_has_the_bars_of_the_report(report, tmp_path):
    figure = as_figure(report)
    for axis, part in zip(figure.axes, bars(report), strict=True):
        widths = [[bar.get_width() for bar in bars] for bars in zip(*axis.containers, strict=True)]
        assert widths == [[report.evaluated(p[k]) for p in part.parts] for k in (1, 2)]
    report.plot(tmp_path / "new" / "report.png")
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        report.plot("never.png")


CHROMIUM = shutil.which("chromium")


def browsed(page, profile, fragment=""):
    """The page after its script has run, as a browser has it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", f"--user-data-dir={profile}", "--dump-dom"]
    run = subprocess.run(
        [CHROMIUM, *flags, page.as_uri() + fragment], capture_output=True, text=True, timeout=60
    )
    return run.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_sorts_draws_and_filters(tmp_path):
    def nodes(label):
        return (GraphNode("n", "op", label, "(40, 50)", ()),)

    flops = {"b": 30, "a": 1000, "c": 200}
    weights = [
        weight(
            name,
            after=Cost(weight_gradient_flops=count),
            pictures={"before": nodes("mm"), "after": nodes(f"of_{name}")},
        )
        for name, count in flops.items()
    ]
    page = tmp_path / "page.html"
    made_up(*weights).to_html(page)

    def order(text):
        return re.findall(r'data-weight="(\w)"', text)

    linked = browsed(page, tmp_path / "1", "#weight=c&sort=-flops")
    assert order(linked) == ["a", "c", "b"]
    assert linked.count("<svg viewBox") == 2 and ">of_c</text>" in linked
    assert re.search(r'<th class="n" aria-sort="descending"><button data-key="flops">', linked)

    clicks = """<script>
    document.querySelector("button[data-key=name]").click();
    document.querySelector("button[data-weight=b]").click();
    const box = document.getElementById("filter");
    box.value = "B"; box.dispatchEvent(new Event("input"));
    document.title = location.hash;
    </script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", clicks), encoding="utf-8")
    clicked = browsed(page, tmp_path / "2")
    assert order(clicked) == ["a", "b", "c"]
    assert ">of_b</text>" in clicked
    assert len(re.findall(r'<tbody hidden="">', clicked)) == 2
    assert "<title>#sort=name&amp;weight=b&amp;filter=B</title>" in clicked
