"""The documentation is true: its listings are produced, its code runs, its links lead somewhere."""

import contextlib
import gc
import io
import json
import re
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from test_on_gpu import PLAN
from test_structure import FLOORS, MODULES, floor_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
OF_THE_READER = ("train.py", "first.py", "graphs/03_pushed_regular.py")
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
    if torch.__version__ < "2.13":  # torch's decomposition of silu is another
        shown = {name: text for name, text in shown.items() if "sigmoid" not in text}
        listings = {name: listings[name] for name in shown}
    assert shown and shown == listings


def test_the_two_excerpts_of_the_readme_are_lines_of_the_listings(inspect_graphs):
    listings = inspect_graphs.stages()
    for excerpt, whole in (("before", "joint"), ("after", "kept")):
        lines = listings[excerpt].splitlines()
        assert {*lines} <= {line.strip() for line in listings[whole].splitlines()}
    assert "grass.select." in listings["before"] and "selected_mm" not in listings["before"]
    assert listings["after"].startswith("select_default") and "aten.mm." in listings["after"]


PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
# Blocks that cannot run on one machine without a GPU, by their page: the reason stands in a comment
# <!-- not run: reason --> above each. Think of a hidden <!-- setup ... --> before you add one.
NOT_RUN: dict[str, list[str]] = {
    "README.md": [
        "the same code runs on the page of trainers, with a model and data",
        "the same code runs on several processes in the tests",
    ],
}
NEEDED = {
    "trainers.md": ("transformers", "accelerate", "lightning"),
    "comparison.md": ("bitsandbytes",),
    "finetune.md": ("transformers",),
    "fsdp2.md": ("transformers",),
}


def pieces(page):
    """Hidden set-ups and code blocks of a page: (line, kind, comment above, text)."""
    text = page.read_text(encoding="utf-8")
    for found in PIECE.finditer(text):
        kind = "setup" if found["setup"] is not None else found["language"]
        body = found["code"] if found["setup"] is None else found["setup"]
        at = text.index(body, found.start()) if body else found.start()
        yield text.count("\n", 0, at), kind, found["mark"] or "", body


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(kind == "python" for _, kind, _, _ in pieces(page))],
    ids=lambda page: page.name,
)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """All blocks of a page in order and in one namespace; a block's output follows it."""
    for module in NEEDED.get(page.name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    printed, names, left_out = "", {"__name__": "documentation"}, []
    with warnings.catch_warnings():
        for line, kind, mark, text in pieces(page):
            where = f"{page.name}, after line {line}"
            if mark == "output":
                assert printed == text, where
            elif mark.startswith("not run:"):
                left_out.append(mark.removeprefix("not run: "))
            elif mark.startswith("source: "):
                source = (ROOT / mark.removeprefix("source: ")).read_text(encoding="utf-8")
                indented = (textwrap.indent(text, " " * k) for k in (0, 4, 8))  # within functions
                assert any(each in source for each in indented), where
            elif kind == "setup" or (kind == "python" and not mark.startswith("listing:")):
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile("\n" * line + text, page.name, "exec"), names)
                printed = out.getvalue()
    assert left_out == NOT_RUN.get(page.name, [])
    torch._dynamo.reset()
    names.clear()
    gc.collect()  # no later test is to find a gradient that nobody steps with


def test_the_example_of_the_readme_is_short():
    code = [text for _, kind, _, text in pieces(ROOT / "README.md") if kind == "python"]
    assert len(code[0].splitlines()) <= 12  # "ten lines"


@every_page
def test_code_is_in_blocks_that_run(page):
    """Python stands in marked blocks, never in an indented one, where nothing would run it."""
    text = re.sub(r"^```.*?^```$|^<!--.*?-->$", "", page.read_text("utf-8"), flags=re.M | re.S)
    indented = [line.strip() for line in re.findall(r"^    .*$", text, re.M)]
    python = r"import |from \w+ import|def |class |>>>|(for|with) .*:$|.*(grass_fx|torch)\.\w+\("
    assert [line for line in indented if re.match(python, line)] == []


COMMAND = re.compile(
    r"(?:^    |^\$ |`)(?:\w+=\S+ )*python (-m grass_fx \w+|\S+\.py)([^`\n]*)", re.M
)


def commands():
    """Everything the documentation tells to run of ours: {"examples/compare.py": its flags}.

    And all that is measured on a GPU, where there is no time for mistakes.
    """
    told, texts = {}, [page.read_text(encoding="utf-8") for page in PAGES]
    for text in [*texts, *(f"    {each.command}" for each in PLAN)]:
        for script, arguments in COMMAND.findall(text):
            flags = re.findall(r"(?<!\S)--[\w-]+", arguments)
            told.setdefault(script, set()).update(flags)
    return told


COMMANDS = commands()


def test_scripts_that_are_told_to_run_exist():
    ours = [script for script in COMMANDS if not script.startswith("-m ")]
    assert [s for s in ours if s not in OF_THE_READER and not (ROOT / s).exists()] == []


@pytest.mark.parametrize("script", [script for script in COMMANDS if COMMANDS[script]])
def test_scripts_know_the_options_they_are_told_to_run_with(script, monkeypatch, capsys):
    words = script.removeprefix("-m ").split()
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that is imported already, and run again
        if script.startswith("-m "):
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    assert COMMANDS[script] - {*re.findall(r"--[\w-]+", capsys.readouterr().out)} == set()


def words(page):
    """The text of a page, of a notebook that of its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(words(page))):
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


def test_the_page_of_options_is_the_code():
    """If this fails and should: python docs/generate_options.py --update."""
    made = runpy.run_path(str(ROOT / "docs/generate_options.py"))["page"]()
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == made
