"""What the tests share: models, capture of graphs, and their text."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx, nn

from grass_fx.backend import grass
from grass_fx.compile.runtime import GrassCallable


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    """Linear layers of the given sizes with GELUs between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Captured:
    """A backend that is ``grass`` and keeps what it returned."""

    def __init__(self, **options) -> None:
        self.options, self.graphs = {"compiler": "aot_eager", **options}, []

    def __getstate__(self) -> dict:
        # Lightning, once imported, puts a copy of torch.compile's arguments on every model.
        return {"options": self.options, "graphs": []}

    def __call__(self, gm: fx.GraphModule, inputs: list, **kwargs) -> Callable:
        self.graphs.append(grass(gm, inputs, options=self.options, **kwargs))
        return self.graphs[-1]

    @property
    def only(self) -> GrassCallable:
        (graph,) = self.graphs
        assert isinstance(graph, GrassCallable)
        return graph


def taken_and_left(model: nn.Module, *inputs: torch.Tensor, **options):
    """The names of the weights taken, and the reasons of those left, of one forward call."""
    backend = Captured(**options)
    torch.compile(model, backend=backend)(*inputs)
    found = backend.only.found
    return [weight.name for weight in found.taken], found.left


@contextmanager
def uncached() -> Iterator[None]:
    """Inside, every graph goes through the passes, though an earlier run compiled the same.

    Cheaper than a cache directory of its own, in which C++ headers are compiled anew.
    """
    graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with graphs, torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def interpreted_by_triton(cases: list) -> list:
    """As ``grass_fx.testing.interpret.interpret``, where Triton's interpreter can."""
    pytest.importorskip("triton", "3.7", reason="triton's interpreter, before 3.7, fails on numpy")
    from grass_fx.testing.interpret import interpret

    return interpret(cases)


def text(graph: fx.Graph) -> str:
    """A graph as code: one statement a line, without comments, types and deletions."""
    code = graph.python_code("self").src
    lines = []
    for line in code.splitlines():
        line = re.sub(r"\s*#.*$|;  .* = None", "", line)
        line = re.sub(r"(\w+) : [^=]+ = ", r"\1 = ", line)
        line = re.sub(r" -> .*:$|(\w+) ?: [\"\w\[\], \.]+(?=[,)])", r"\1", line)
        if line.strip() and not line.startswith(("import", "from", "torch.fx._symbolic")):
            lines.append(line.rstrip())
    return "\n".join(lines) + "\n"
