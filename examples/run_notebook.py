"""Run a notebook's cells without Jupyter, and compare what they print with what is saved.

    python examples/run_notebook.py examples/story.ipynb             # compare
    python examples/run_notebook.py examples/story.ipynb --update    # write the outputs anew

The cells run in order in one namespace and in the notebook's folder, as they do in a new kernel.
A cell's outputs are what it prints and the figures of pyplot that it leaves open. Printed text has
to equal the saved text. In cells tagged "measured" decimals may differ by 5 %, because they depend
on the machine and on its version of Python. Pictures are not compared, only counted.
"""

import argparse
import base64
import contextlib
import difflib
import io
import json
import linecache
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine torch's threads wait spinning
matplotlib.use("Agg")  # no display is needed to write a picture
import matplotlib.pyplot as plt

TOLERANCE = 0.05
DECIMAL = re.compile(r"\d+\.\d+")


def run(cells: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The code cells with the outputs of a run from the top, and what went to stderr."""
    names: dict[str, Any] = {"__name__": "__main__"}
    made, errors = [], io.StringIO()
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for count, cell in enumerate(code_cells, 1):
        source, file, printed = "".join(cell["source"]), f"<cell {count}>", io.StringIO()
        # As IPython does: tracebacks, inspect and Dynamo read the lines of functions here.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            exec(compile(source, file, "exec"), names)
        outputs = [stream(printed.getvalue())] if printed.getvalue() else []
        made.append({**cell, "execution_count": count, "outputs": [*outputs, *pictures()]})
    return made, errors.getvalue()


def stream(text: str) -> dict[str, Any]:
    return {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}


def pictures() -> list[dict[str, Any]]:
    """The open figures as outputs; they are closed."""
    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", bbox_inches="tight", dpi=80)
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        found.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return found


def text_of(cell: dict[str, Any]) -> str:
    """A cell's printed text, with a line for each picture."""
    parts = ("".join(output.get("text", "[picture]\n")) for output in cell["outputs"])
    return "".join(parts)


def same(saved: str, made: str, measured: bool) -> bool:
    """Whether two outputs are equal, in a measured cell up to the tolerance."""
    if not measured:
        return saved == made
    pairs = zip(DECIMAL.findall(saved), DECIMAL.findall(made), strict=False)
    close = all(math.isclose(float(a), float(b), rel_tol=TOLERANCE) for a, b in pairs)
    return close and DECIMAL.sub("#", saved) == DECIMAL.sub("#", made)


def differences(saved: list[dict[str, Any]], made: list[dict[str, Any]]) -> str:
    """A diff of the outputs, empty if they are the same."""
    found = []
    for number, (old, new) in enumerate(zip(saved, made, strict=True), 1):
        before, after = text_of(old), text_of(new)
        if not same(before, after, "measured" in old["metadata"].get("tags", ())):
            names = f"cell {number}, saved", f"cell {number}, now"
            lines = (before.splitlines(), after.splitlines())
            found += difflib.unified_diff(*lines, *names, lineterm="")
    return "\n".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--update", action="store_true", help="write the outputs anew")
    args = parser.parse_args()
    path = args.notebook.resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    saved = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    made, errors = run(saved)
    if args.update:
        new = iter(made)
        cells = notebook["cells"]
        notebook["cells"] = [next(new) if c["cell_type"] == "code" else c for c in cells]
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    different = "" if args.update else differences(saved, made)
    for text in filter(None, (different, errors and f"stderr is not empty:\n{errors}")):
        print(text, file=sys.stderr)
    return int(bool(different or errors))


if __name__ == "__main__":
    raise SystemExit(main())
