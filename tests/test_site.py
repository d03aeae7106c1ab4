"""The pages make one site: groups, the API page, the pictures.

``make docs`` builds it, and fails on a link or a name that leads nowhere.
"""

import re
import runpy
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

import grass_fx
from grass_fx import errors

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DRAWN = runpy.run_path(str(DOCS / "draw_figures.py"))["figures"]()


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def groups():
    """{"Start": ["docs/faq.md", ...], ...} as the index has them."""
    table = r"^```\{toctree\}\n:caption: (\w+)\n:hidden:\n\n(.*?)^```$"
    tables = re.findall(table, read("index.md"), re.M | re.S)
    files = {name: re.findall(r"[^\s<>]+\.md", entries) for name, entries in tables}
    return {name: [(DOCS / file).resolve() for file in group] for name, group in files.items()}


def test_every_page_is_in_one_group_and_every_entry_is_a_page():
    grouped = [file for group in groups().values() for file in group]
    roots = {ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    pages = {*DOCS.glob("**/*.md"), *roots}
    assert sorted(grouped) == sorted(pages - {DOCS / "index.md"})
    assert list(groups()) == ["Start", "Recipes", "Use", "Inspect", "Measure", "Inside"]


def test_the_api_page_has_every_public_name():
    entries = set(re.findall(r"auto(?:class|function|module):: ([\w.]+)", read("api.md")))
    public = {f"grass_fx.{name}" for name in grass_fx.__all__ if not name.startswith("__")}
    of_errors = {f"grass_fx.{name}" for name in vars(errors)}  # the page has their module
    assert "grass_fx.errors" in entries
    assert public - of_errors - entries == set()


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_what_its_script_draws(name):
    """If this fails and should: python docs/draw_figures.py, and look at it."""
    assert read(f"figures/{name}") == DRAWN[name]
    root = xml.fromstring(DRAWN[name])
    width, height = (float(number) for number in root.get("viewBox").split()[2:])
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(element.get(key)) for key in ("x", "y", "width", "height"))
        assert min(x, y, width - x - w, height - y - h) >= 0
    classes = {kind for element in root.iter() for kind in (element.get("class") or "").split()}
    styled = set(re.findall(r"\.(\w+) \{", root.find("{*}style").text))
    assert classes <= styled
    assert [key for element in root.iter() for key in element.attrib if "href" in key] == []


def test_every_picture_is_shown_with_words_for_who_cannot_see_it():
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("**/*.md"))
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", pages)
    assert {f"figures/{name}" for name in DRAWN} <= {path for _, path in shown}
    assert all(len(words) > 20 for words, _ in shown)
