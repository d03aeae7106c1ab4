"""The documentation is true: its listings are produced, its code runs, its links lead somewhere."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
from test_structure import FLOORS, MODULES, floor_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text):
    return re.sub(r"^```.*?^```$|^    .*?$|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.fixture(scope="module")
def inspect_graphs():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import inspect_graphs

        yield inspect_graphs
    finally:
        sys.path.remove(str(ROOT / "examples"))


def test_every_listing_is_what_the_example_produces(inspect_graphs):
    """If this fails and should: python examples/inspect_graphs.py --update, and read the diff."""
    listings = inspect_graphs.stages()
    shown = {}
    for page in inspect_graphs.DOCUMENTS:
        for _, name, text in inspect_graphs.LISTING.findall(page.read_text(encoding="utf-8")):
            shown[name] = text
    assert shown == listings


def test_the_two_excerpts_of_the_readme_are_lines_of_the_listings(inspect_graphs):
    listings = inspect_graphs.stages()
    for excerpt, whole in (("before", "joint"), ("after", "pushed")):
        lines = listings[excerpt].splitlines()
        assert {*lines} <= {line.strip() for line in listings[whole].splitlines()}
    assert "grass.select." in listings["before"] and "selected_mm" not in listings["before"]
    assert "selected_mm" in listings["after"] and "aten.mm." not in listings["after"]


def test_the_example_of_the_readme_runs_and_prints_what_it_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?<!-->\n)^```python\n(.*?)^```$", text, re.M | re.S)
    (promised,) = re.findall(r"<!-- output -->\n```text\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks[0].splitlines()) <= 12  # "ten lines"
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert printed.getvalue() == promised


@every_page
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_rooms_of_the_architecture_are_the_rooms_of_the_house():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([\w/.]+)` \|", text, re.M)
    told = {}
    for floor, room in rows:
        name = room.removesuffix(".py").strip("/").replace("/", ".")
        told["grass_fx.passes" if name == "passes" else name] = int(floor)
    rooms = {".".join(module.split(".")[:2]) for module in MODULES} - {"grass_fx"}
    assert told == {room: floor_of(room) for room in rooms if room in FLOORS}


def test_the_options_of_the_readme_are_the_options():
    """Names and defaults of the table against the configuration."""
    from dataclasses import fields

    from grass_fx.config import GrassConfig

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Options")[2].partition("`grass_fx.AdamW`")[0]
    told = {}
    for names, defaults in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table, re.M):
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True):
            told[name.strip("`")] = {"all": "None", "none": "()"}.get(default, default.strip("`"))
    config = GrassConfig()
    real = {field.name: getattr(config, field.name) for field in fields(config)}
    assert told == {k: f'"{v}"' if isinstance(v, str) else str(v) for k, v in real.items()}
