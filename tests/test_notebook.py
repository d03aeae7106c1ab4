"""The notebook is saved whole, and the script that runs notebooks sees what is not as it was.

`make smoke` runs its cells and compares what they print.
"""

import base64
import copy
import json
from pathlib import Path

import pytest

import run_notebook

STORY = Path(__file__).resolve().parent.parent / "examples/story.ipynb"


def code(source, *tags):
    metadata = {"tags": [*tags]} if tags else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": []}


CELLS = [
    code("import inspect\n\ndef twice(x):\n    return 2 * x\n"),
    {"cell_type": "markdown", "source": "Words are not run."},
    code("print(inspect.getsource(twice), twice(21))"),
    code("print('loss', 2.43 * scale, 'after 10 steps')", "measured"),
    code("import matplotlib.pyplot as plt\n\nplt.figure(figsize=(1, 1));"),
]


def with_scale(number):
    return [code(f"scale = {number}"), *CELLS]


def test_outputs_are_what_cells_print_and_the_figures_they_leave():
    made, errors = run_notebook.run(with_scale(1.0))
    assert errors == ""
    assert [cell["execution_count"] for cell in made] == [1, 2, 3, 4, 5]
    texts = [run_notebook.text_of(cell) for cell in made]
    source = "def twice(x):\n    return 2 * x\n"
    assert texts == ["", "", f"{source} 42\n", "loss 2.43 after 10 steps\n", "[picture]\n"]
    (picture,) = made[-1]["outputs"]
    assert base64.b64decode(picture["data"]["image/png"]).startswith(b"\x89PNG")


def test_decimals_of_measured_cells_may_differ_a_little_and_nothing_else():
    saved, _ = run_notebook.run(with_scale(1.0))
    assert run_notebook.differences(saved, run_notebook.run(with_scale(1.03))[0]) == ""
    far = run_notebook.differences(saved, run_notebook.run(with_scale(1.1))[0])
    assert "cell 4, saved" in far and "-loss 2.43 after" in far
    for cell, old, new in ((2, "42", "43"), (3, "10 steps", "11 steps")):
        changed = copy.deepcopy(saved)
        text = run_notebook.text_of(saved[cell]).replace(old, new)
        changed[cell]["outputs"] = [run_notebook.stream(text)]
        assert f"cell {cell + 1}, now" in run_notebook.differences(saved, changed)
    without = [*saved[:-1], {**saved[-1], "outputs": []}]
    assert "+[picture]" in run_notebook.differences(without, saved)


def test_warnings_are_reported_and_the_notebook_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the script prepends the folder itself: undone after
    file = tmp_path / "noisy.ipynb"
    text = json.dumps({"cells": [code("import sys\nprint('loud', file=sys.stderr)")]})
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["run_notebook.py", str(file)])
    assert run_notebook.main() == 1
    assert "stderr is not empty:\nloud" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == text


@pytest.fixture(scope="module")
def story():
    return json.loads(STORY.read_text(encoding="utf-8"))


def test_the_story_is_saved_with_the_outputs_of_one_run(story):
    cells = [cell for cell in story["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds == {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    printing = [cell for cell in cells if "print(" in "".join(cell["source"])]
    assert all(cell["outputs"] for cell in printing)


def test_the_story_is_small_and_names_no_machine(story):
    assert STORY.stat().st_size < 150_000
    texts = [run_notebook.text_of(c) for c in story["cells"] if c["cell_type"] == "code"]
    assert not [text for text in texts if "/home/" in text or "/tmp/" in text or "0x" in text]
    assert len({cell["id"] for cell in story["cells"]}) == len(story["cells"])
