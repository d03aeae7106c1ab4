"""``options={"dump_dir": ...}``: the graphs of every stage as text files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx


def graph_text(graph: fx.Graph) -> str:
    """A graph as readable code with shapes."""
    owner = graph.owning_module
    gm = fx.GraphModule(owner if owner is not None else torch.nn.Module(), graph)
    return gm.print_readable(print_output=False, expanded_def=True)


class Dump:
    """Numbered files ``03_joint_regular.txt`` in one directory; nothing without a directory."""

    def __init__(self, directory: str | None) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, graph: fx.Graph) -> None:
        """Write ``graph`` under the next number."""
        if self.directory is None:
            return
        number = len(list(self.directory.glob("*.txt")))
        header = f"# grass_fx: {stage}, torch {torch.__version__}, {len(graph.nodes)} nodes\n"
        path = self.directory / f"{number:02d}_{stage}.txt"
        path.write_text(header + graph_text(graph) + "\n", encoding="utf-8")
