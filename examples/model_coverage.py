"""Which linear weights of which models the backend takes and pushes, and why not the others.

    python examples/model_coverage.py              # print the table; exit 1 if the page differs
    python examples/model_coverage.py --update     # write it into docs/coverage.md
    python examples/model_coverage.py llama gpt2   # one line per weight of these models

The models are those of examples/zoo.py. tests/test_coverage.py checks the page, and the gradients.
"""

import argparse
import copy
import fnmatch
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from grass_fx.backend import grass
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.errors import GrassWarning
from grass_fx.passes.facts import DynamoFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.observers import PushReport
from zoo import ZOO, Case

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
OPTIONS = {"compiler": "aot_eager", "rank": 0.25}

INTRODUCTION = """\
# Coverage

Which linear weights the backend takes, and of how many it pushes the selection below the product
that makes the gradient, so that the full gradient is never formed. The models are tiny, with random
weights: [zoo.py](../examples/zoo.py) builds them,
[model_coverage.py](../examples/model_coverage.py) runs one forward and one backward of each and
writes this page (`python examples/model_coverage.py --update`).

*Linear weights* are counted without the backend's help, by walking the modules: `nn.Linear`,
`Conv1D` of GPT-2, `nn.MultiheadAttention`, and the parameters that a model multiplies by itself,
stacks of expert weights included. A weight with several names counts once. What is not taken trains
dense, and what is not pushed is selected from a full gradient: tests/test_coverage.py compares the
gradients of every model with those of a copy that is not compiled.

"""


@dataclass
class Weight:
    """A linear weight, and what the backend did with it."""

    name: str
    parameter: nn.Parameter
    taken: bool = False
    pushed: bool = False
    reason: str = ""
    """Why it was not taken, or not pushed."""


@dataclass
class Coverage:
    """One model after one compiled and one plain step."""

    case: Case
    weights: list[Weight]
    gradients: dict[str, Tensor | None]
    """By the parameters' names. They are no longer on the model: no optimizer waits for them."""
    plain: dict[str, Tensor | None]
    """Those of a copy that was not compiled: full ones."""
    graphs: int
    """How many graphs with parameters Dynamo made of it."""


@dataclass
class Watched:
    """A backend that is ``grass`` and notes which parameters each graph gets when it runs.

    Names in reports are relative to a region and can repeat; parameters are told by identity.
    """

    options: dict[str, Any]
    reasons: dict[Tensor, list[str]] = field(default_factory=dict)
    """Parameter -> for each graph that uses it: "" if taken and pushed, else why not."""
    taken: set[Tensor] = field(default_factory=set)
    graphs: set[int] = field(default_factory=set)

    def __call__(self, gm: fx.GraphModule, inputs: list, **kwargs) -> Callable:
        found = find_linear_weights_pass(
            gm.graph, DynamoFacts(GrassConfig.from_options(self.options), inputs)
        )  # a graph of which nothing is taken does not tell what it left
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GrassWarning)
            compiled = grass(gm, inputs, options=self.options, **kwargs)
        report = compiled.report if isinstance(compiled, GrassCallable) else PushReport()
        taken = {weight.position: weight.name for weight in found.taken}

        def run(*args: Any) -> Any:
            left = iter(found.left.values())  # in the order of the graph's inputs
            for position, arg in enumerate(args):
                if not isinstance(arg, nn.Parameter) or not arg.requires_grad or arg.dim() < 2:
                    continue
                self.graphs.add(id(gm))
                if position not in taken:
                    self.reasons.setdefault(arg, []).append(next(left))
                    continue
                self.taken.add(arg)
                stopped = report.stopped.get(taken[position])
                pushed = taken[position] in report.pushed
                reason = "" if pushed else f"full gradient formed: {stopped or 'not in the graph'}"
                self.reasons.setdefault(arg, []).append(reason)
            return compiled(*args)

        return run


def linear_weights(case: Case) -> Iterator[tuple[str, nn.Parameter]]:
    """The linear weights of a model, by what its modules are and what the case declares."""
    seen: set[nn.Parameter] = set()
    for path, module in case.model.named_modules():
        names: list[str] = []
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            names = ["weight"]
        elif isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            declared = any(fnmatch.fnmatchcase(full, pattern) for pattern in case.declared)
            if (name in names or declared) and parameter.dim() >= 2 and parameter not in seen:
                seen.add(parameter)
                yield full, parameter


@cache
def covered(name: str, compiler: str = OPTIONS["compiler"], rest: str = "none") -> Coverage:
    """One step of a model of the zoo, compiled and plain."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = ZOO[name]()
    dtype = case.dtype
    model = case.model.train().to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.inputs.items()}
    plain = copy.deepcopy(model)
    backend = Watched({**OPTIONS, "compiler": compiler, "rest": rest})
    case.loss(torch.compile(model, backend=backend, **case.how)(**inputs)).backward()
    case.loss(plain(**inputs)).backward()
    weights = [Weight(*found) for found in linear_weights(case)]
    for weight in weights:
        reasons = backend.reasons.get(weight.parameter, ["in no compiled graph"])
        weight.taken = weight.parameter in backend.taken
        weight.pushed = weight.taken and not any(reasons)
        weight.reason = "; ".join(dict.fromkeys(filter(None, reasons)))
    gradients = {path: p.grad for path, p in model.named_parameters()}
    model.zero_grad()
    full = {path: p.grad for path, p in plain.named_parameters()}
    return Coverage(case, weights, gradients, full, len(backend.graphs))


def row(name: str) -> str:
    """A model's line of the table."""
    weights = covered(name).weights
    groups: dict[str, Counter[str]] = {}
    for weight in weights:
        if weight.reason:
            path = re.sub(r"\b\d+\b", "*", weight.name)
            groups.setdefault(weight.reason, Counter())[path] += 1
    notes = []
    for reason, paths in groups.items():
        listed = (f"{n} × `{path}`" if n > 1 else f"`{path}`" for path, n in paths.items())
        notes.append(f"{', '.join(listed)}: {reason}")
    taken, pushed = sum(w.taken for w in weights), sum(w.pushed for w in weights)
    return f"| {name} | {len(weights)} | {taken} | {pushed} | {'; '.join(notes)} |"


def page() -> str:
    """docs/coverage.md as it should be."""
    head = [
        "| model | linear weights | taken | pushed | not taken or not pushed, and why |",
        "|---|---|---|---|---|",
    ]
    return INTRODUCTION + "\n".join([*head, *map(row, ZOO)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to show weight by weight")
    parser.add_argument("--update", action="store_true", help="write docs/coverage.md")
    args = parser.parse_args()
    for name in args.names:
        print(f"{name}: {covered(name).graphs} graphs")
        for weight in covered(name).weights:
            state = "pushed" if weight.pushed else "taken" if weight.taken else "left"
            shape = tuple(weight.parameter.shape)
            print(f"  {state:<7}{weight.name} {shape} {weight.reason}".rstrip())
    if args.names:
        return 0
    text = page()
    if args.update:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    print(text)
    return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)


if __name__ == "__main__":
    sys.exit(main())
