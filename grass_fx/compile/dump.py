"""Writes the graphs of every stage to ``options={"dump_dir": ...}`` and to TORCH_TRACE.

A file is readable code with shapes, and it runs: ``python graphs/03_pushed_regular.py``.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import importlib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from grass_fx._torch_compat import argument_counts, input_position, trace_artifact
from grass_fx.config import GrassConfig
from grass_fx.passes.pipeline import AOT, Event
from grass_fx.state.units import Units

if sys.platform != "win32":
    import fcntl

BEGIN, END = "# ---- the graph ----\n", "# ---- to run it ----\n"

Rows = Mapping[int, tuple[int, int]]
"""Position of each graph input that is a selection -> (size of the selected dimension, block)."""


class _NotRunnable(Exception):
    """Raised with the reason why a graph does not run by itself."""


def graph_text(graph: fx.Graph) -> str:
    """A graph as readable code with shapes."""
    return _module(graph).print_readable(print_output=False, expanded_def=True)


def graph_part(text: str) -> str:
    """Only the graph, from the text of a dumped file."""
    return text.partition(BEGIN)[2].partition(END)[0]


def random_tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """A random tensor with this layout; integers are zero, which is a valid index everywhere."""
    count = 1 + sum((s - 1) * stride for s, stride in zip(shape, strides, strict=True))
    flat = torch.zeros(max(count, 0), dtype=dtype, device=device)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        flat = torch.randn(flat.shape, dtype=wide, device=device).to(dtype)
    return flat.as_strided(shape, strides).requires_grad_(requires_grad)


def random_rows(shape: tuple[int, ...], size: int, block: int = 1, device: str = "cpu") -> Tensor:
    """A random σ with ``shape`` (r,), or (e, r) for a stack: rows below ``size``, in blocks."""
    units, count = Units(size, block), shape[-1] // block
    drawn = [
        units.rows(torch.randperm(units.count, device="cpu")[:count].sort().values)
        for _ in range(math.prod(shape[:-1]))
    ]
    return torch.stack(drawn).reshape(shape).to(device)


class Dump:
    """Writes the stages of one compiled graph, in their order.

    Each stage becomes a file such as ``03_pushed_regular.py`` in ``config.dump_dir``. Numbers are
    unique in a folder, also if several processes write to it; with torch.distributed each rank has
    its own folder. Each stage is also an artifact such as ``grass_pushed_regular`` in torch's
    structured trace (``TORCH_TRACE``), where tlparse shows it. ``what`` names the graph in files.
    """

    def __init__(self, config: GrassConfig, what: str) -> None:
        self.config, self.what = config, what
        self.directory = None if config.dump_dir is None else Path(config.dump_dir)
        if self.directory is not None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                self.directory /= f"rank{torch.distributed.get_rank()}"
            self.directory.mkdir(parents=True, exist_ok=True)

    def write(
        self, stage: str, graph: fx.Graph, made_by: str, source: str | None, rows: Rows
    ) -> str | None:
        """Write ``graph`` under the next number; return the file's name, or None without a folder.

        ``source`` is the file with the graph from which this one was made.
        """
        trace_artifact(f"grass_{stage}", lambda: graph_text(graph))
        if self.directory is None:
            return None
        origin = made_by if source is None else f"{made_by} from {source}"
        text = self._text(stage, graph, origin, rows)
        with _locked(self.directory):
            numbers = [re.match(r"\d+(?=_)", file.name) for file in self.directory.iterdir()]
            number = 1 + max((int(found[0]) for found in numbers if found), default=-1)
            path = self.directory / f"{number:02d}_{stage}.py"
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        return path.name

    def _text(self, stage: str, graph: fx.Graph, origin: str, rows: Rows) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in _changed(self.config))
        try:
            imports, to_run = _runnable(graph, rows)
            remark = "Run this file, or import it and call run(seed): random inputs, all outputs."
        except _NotRunnable as reason:
            imports, to_run, remark = (
                "import torch\n",
                "",
                f"This does not run by itself: {reason}.",
            )
        header = (
            f"{stage}, {len(graph.nodes)} nodes",
            f"made by {origin}",
            f"graph: {self.what}",
            f"options: {options or 'all default'}",
            f"grass_fx {version('grass-fx')}, torch {torch.__version__}, process {os.getpid()}",
            remark,
        )
        lines = "".join(f"# {line}\n" for line in header)
        return f"{lines}{imports}\n{BEGIN}{graph_text(graph)}\n{END}{to_run}"


class DumpStages:
    """An observer of the passes that writes the graphs of one variant.

    ``source`` is the file with the graph from which the variant is made.
    """

    def __init__(self, dump: Dump, variant: str, rows: Rows, source: str | None) -> None:
        self._dump, self._variant, self._rows, self._source = dump, variant, rows, source

    def __call__(self, graph: fx.Graph, event: Event) -> None:
        did = event.by is AOT or event.result.count or event.result.stopped
        if event.by.makes and did:
            stage = f"{event.by.makes}_{self._variant}"
            self._source = self._dump.write(stage, graph, event.by.name, self._source, self._rows)


def _changed(config: GrassConfig) -> Iterator[tuple[str, Any]]:
    """The options that differ from their defaults, except ``dump_dir``."""
    default = GrassConfig()
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name != "dump_dir" and value != getattr(default, option.name):
            yield option.name, value


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from numbering files in ``directory``; has no effect on Windows."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # unlocks


def _module(graph: fx.Graph) -> fx.GraphModule:
    owner = graph.owning_module
    return fx.GraphModule(owner if owner is not None else torch.nn.Module(), graph)


# --- Files that run -------------------------------------------------------------------------------

PROLOGUE = """\
from math import inf, nan

import torch
import torch.fx._pytree as fx_pytree
import torch.utils._pytree as pytree
from torch import device

import grass_fx.ops  # the operators grass::*
from grass_fx.compile.dump import random_rows, random_tensor

NoneType = type(None)
"""

EPILOGUE = '''

def inputs(seed=0):
    """The graph's inputs, in order: random, with shapes, strides and types of the examples."""
    torch.manual_seed(seed)
    return [
{inputs}    ]


def run(seed=0):
    """The graph's outputs for inputs(seed), in order."""
{call}


if __name__ == "__main__":
    for index, output in enumerate(run()):
        if isinstance(output, torch.Tensor):
            norm = output.detach().double().norm().item()
            print(f"output {{index}}: {{tuple(output.shape)}} {{output.dtype}}, norm {{norm:.6g}}")
        else:
            print(f"output {{index}}: {{output}}")
'''

FLAT = "    return list({name}()(*inputs(seed)))"
LISTS = """\
    flat = iter(inputs(seed))
    return {name}()(*([next(flat) for _ in range(count)] for count in {counts}))


{name}._in_spec = pytree.tree_structure(tuple([0] * count for count in {counts}))
{name}._out_spec = pytree.tree_structure([0] * {outputs})"""


def _runnable(graph: fx.Graph, rows: Rows) -> tuple[str, str]:
    """The imports of a graph's code, and the code that runs it; raises _NotRunnable."""
    held = [node.target for node in graph.nodes if node.op in ("get_attr", "call_module")]
    if held:
        raise _NotRunnable(
            f"it holds {', '.join(map(str, held))} (the body of a higher-order operator, a tensor "
            "or a module), which is not part of this text"
        )
    gm = _module(graph)
    found = re.search(r"^class (\w+)\(", graph_text(graph), re.M)
    assert found is not None
    name = found[1]
    call, counts = FLAT.format(name=name), argument_counts(gm)
    if counts is not None:
        (returned,) = graph.output_node().args
        call = LISTS.format(name=name, counts=counts, outputs=len(cast("list[Any]", returned)))
    placeholders = graph.find_nodes(op="placeholder")
    lines = [
        f"        {_input(k, node, rows)},  # {node.name}\n" for k, node in enumerate(placeholders)
    ]
    return PROLOGUE + _imports(graph), EPILOGUE.format(inputs="".join(lines), call=call)


def _input(index: int, node: fx.Node, rows: Rows) -> str:
    """The code that makes one input."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, torch.SymInt):
        return str(_size(value, node))
    if not isinstance(value, Tensor):
        raise _NotRunnable(f"its input {node.name} is no tensor")
    shape = tuple(_size(size, node) for size in value.shape)
    position = input_position(node)
    where = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    selection = rows.get(index if position is None else position)
    if selection is not None and value.dtype == torch.int64:
        return f"random_rows({shape}, size={selection[0]}, block={selection[1]}{where})"
    strides = tuple(_size(stride, node) for stride in value.stride())
    grad = ", requires_grad=True" if value.requires_grad and "val" not in node.meta else ""
    return f"random_tensor({shape}, {strides}, {value.dtype}{where}{grad})"


def _size(size: Any, node: fx.Node) -> int:
    number = size.node.hint if isinstance(size, torch.SymInt) else size
    if not isinstance(number, int):
        raise _NotRunnable(f"the size {size} of {node.name} is not known before it runs")
    return number


def _imports(graph: fx.Graph) -> str:
    """Imports of the Python functions in a graph, under the names that its code uses."""
    lines = []
    for name, value in graph.python_code("self").globals.items():
        if re.search(rf"\b{name}\b", PROLOGUE) or hasattr(builtins, name):
            continue
        module = getattr(value, "__module__", None)
        known = getattr(value, "__name__", "")
        if module is None or getattr(importlib.import_module(module), known, None) is not value:
            raise _NotRunnable(f"it calls {name}, which cannot be imported")
        lines.append(f"from {module} import {known} as {name}\n")
    return "".join(lines)
