"""Which weights of which models the backend takes and pushes, and why not the others.

    python examples/model_coverage.py              # print the page; exit 1 if docs/ has another
    python examples/model_coverage.py --update     # write it into docs/coverage.md
    python examples/model_coverage.py llama gpt2   # one line per weight of these models
    python examples/model_coverage.py --families --update   # trace the published models again

The models are those of examples/zoo.py, and the published ones of examples/families.py. Both tables
of the zoo are computed whenever the page is; that of the published models takes minutes and is read
from docs/families.json. tests/test_coverage.py checks the page, and the gradients.
"""

import argparse
import copy
import fnmatch
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import families
from grass_fx.backend import grass
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.errors import GrassWarning
from grass_fx.passes.facts import DynamoFacts
from grass_fx.passes.observers import PushReport
from grass_fx.passes.pipeline import find
from zoo import ZOO, Case

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
OPTIONS = {"compiler": "aot_eager", "rank": 0.25}
NOWHERE, VECTOR = "in no compiled graph", "vector"

INTRODUCTION = """\
# Coverage

This page shows which weights the backend takes, and of how many it pushes the selection below the
product that makes the gradient, so that the full gradient is never formed. The models of the first
two tables are tiny and have random weights: [zoo.py](../examples/zoo.py) builds them, and
[model_coverage.py](../examples/model_coverage.py) runs one forward and one backward of each to
write this page (`python examples/model_coverage.py --update`). tests/test_coverage.py compares all
gradients with those of a copy that is not compiled, without and with the option `lookups`.

## Linear weights

*Linear weights* are counted without the backend's help, by walking the modules: `nn.Linear`,
`Conv1D` of GPT-2, `nn.MultiheadAttention`, and the parameters that a model multiplies by itself,
stacks of expert weights included. A weight with several names counts once. What is not taken trains
dense, and what is not pushed is selected from a full gradient. The option
[`lookups`](options.md#lookups) is off here, as it is by default.
"""

HEAD = [
    "| model | linear weights | taken | pushed | not taken or not pushed, and why |",
    "|---|---|---|---|---|",
]

OF_PARAMETERS = """\
## All parameters

This table counts parameters instead of weights: the share that is taken by default, and with
`lookups=True`, which also takes embeddings. Only parameters that train are counted. The last column
has what `lookups=True` leaves, with the number of parameters. Vectors (biases, and scales of norms)
always train dense. In models as small as these their share is much larger than in real ones.
"""

HEAD_OF_PARAMETERS = [
    "| model | parameters | taken | with lookups | left with lookups |",
    "|---|---:|---:|---:|---|",
]

OF_FAMILIES = """\
## Published models

These models have the sizes of published ones. Nothing is downloaded, and nothing is trained:
[families.py](../examples/families.py) has their configurations, and [`explain`](explain.md) traces
them on the meta device, in bfloat16 and without their loss. Only the first two layers of a model
are traced, or of its encoder and its decoder. A parameter of a later layer counts like that of the
second layer, and it is checked that both have the same shape.

The last three columns have the gradients and AdamW's state together, in GB (10⁹ bytes), at full
rank and with `rank=0.125`. `explain` has computed them; they are not measured. Weights and
activations come in addition. Gradients and moments are in bfloat16, like the weights. This command
traces all models again: `python examples/model_coverage.py --families --update`.
"""

HEAD_OF_FAMILIES = [
    "| model | parameters | taken | with lookups | GB, full rank | GB | GB, with lookups |",
    "|---|---:|---:|---:|---:|---:|---:|",
]


OF_FUNCTIONS = """\
## Inside other functions

A weight inside of somebody's autograd function or operator is taken if
[the joint graph](architecture.md#asking-the-joint-graph) shows that products make its gradient.
[other_functions.py](../tests/other_functions.py) has these cases; tests/test_ask_joint_graph.py and
tests/test_float8.py compare their gradients with those of the functions uncompiled.
"""

HEAD_OF_FUNCTIONS = ["| a weight in | taken |", "|---|---|"]
FUNCTIONS = [
    "| `torch.autograd.Function` of either form, with mm, addmm or einsum in its backward, with a "
    "transposed copy of its input, with a gradient that it converts | yes |",
    "| cross entropy fused with the head, chunk by chunk: gradients that the forward makes (as "
    "Liger's), or tiles that the backward adds in place (as TRL's) | yes, and nothing has the "
    "shape of the head's gradient; both are stand-ins, see below |",
    "| torch's own `F.linear_cross_entropy` | yes as a whole; no in chunks, which are one opaque "
    "operator behind a warning that breaks the graph |",
    "| an operator of torch.library whose autograd formula is made of torch's operators | yes |",
    "| torchao's float8 training: tensorwise, rowwise, and rowwise with a weight gradient in high "
    "precision; emulated, and by `_scaled_mm` | yes, equal to the last bit; r a multiple of 16 |",
    "| `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`; with `torch._dynamo.config.allow_rnn` `nn.RNN`, "
    "`nn.GRU` and `nn.LSTM`, where torch computes them by products | yes |",
    "| a weight that is scaled, multiplied by a mask, added to something, or goes through a "
    "function of single elements; parametrizations of this kind | yes |",
    "| an operator whose backward is an opaque operator, such as oneDNN's LSTM | no |",
    "| normalised weights, weight norm, spectral norm, softmax, `torch.where`: the gradient needs "
    "sums over all of it, or has no rule | no |",
    "| an einsum of three factors, or of a weight (h, d, n) whose first two dimensions one product "
    "merges | no |",
    "| what is only added, such as learned positions; convolutions | no |",
]

REST_OF_FUNCTIONS = """
Each of the others names its use, and where the selection stopped. TRL's own function (1.16) is not
traced by torch 2.13, because it has an output without a gradient: torch then runs the whole frame
uncompiled, and a warning says so; compile the model's layers one by one. Liger's needs a GPU, and
has not been run. Adapters of peft (0.21) and layers beside a frozen one of bitsandbytes are plain
linear weights, and are taken as such.
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
class Fate:
    """What becomes of a parameter that trains."""

    size: int
    taken: bool
    """As compiled."""
    with_lookups: bool
    """Whether it is taken with the option ``lookups``."""
    reason: str
    """Why it is not taken with ``lookups``."""


@dataclass
class Coverage:
    """One model after one compiled and one plain step."""

    case: Case
    weights: list[Weight]
    """The linear weights; with the option ``lookups`` also the embeddings."""
    fates: dict[str, Fate]
    """By the names of the parameters that train."""
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
    with_lookups: dict[Tensor, list[str]] = field(default_factory=dict)
    """Parameter -> for each graph that uses it: "" if ``lookups`` takes it, else why not."""
    graphs: set[int] = field(default_factory=set)

    def __call__(self, gm: fx.GraphModule, inputs: list, **kwargs) -> Callable:
        config = GrassConfig.from_options(self.options)
        # A graph of which nothing is taken does not tell what it left, so the pass runs here, too.
        found, wider = (
            find(gm, DynamoFacts(each, inputs)) for each in (config, replace(config, lookups=True))
        )
        left, left_by_lookups = (
            {each.positions[name]: reason for name, reason in each.left.items()}
            for each in (found, wider)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GrassWarning)
            compiled = grass(gm, inputs, options=self.options, **kwargs)
        report = compiled.report if isinstance(compiled, GrassCallable) else PushReport()
        taken = {weight.position: weight.name for weight in found.taken}

        def run(*args: Any) -> Any:
            for position, arg in enumerate(args):
                if not isinstance(arg, nn.Parameter) or not arg.requires_grad or arg.dim() < 2:
                    continue
                self.graphs.add(id(gm))
                why = left_by_lookups.get(position, "")
                self.with_lookups.setdefault(arg, []).append(why)
                if position not in taken:
                    self.reasons.setdefault(arg, []).append(left[position])
                    continue
                self.taken.add(arg)
                stopped = report.stopped.get(taken[position])
                pushed = taken[position] in report.pushed
                reason = "" if pushed else f"full gradient formed: {stopped or 'not in the graph'}"
                self.reasons.setdefault(arg, []).append(reason)
            return compiled(*args)

        return run

    def fate(self, parameter: nn.Parameter) -> Fate:
        """What the graphs that ran have done with a parameter."""
        reasons = [VECTOR] if parameter.dim() < 2 else self.with_lookups.get(parameter, [NOWHERE])
        taken, reason = "" in reasons, "; ".join(dict.fromkeys(filter(None, reasons)))
        return Fate(parameter.numel(), parameter in self.taken, taken, reason)


def weights_of(case: Case, lookups: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """The linear weights of a model, by what its modules are and what the case declares.

    With ``lookups`` also those of embeddings, if they train.
    """
    whole = (nn.Linear, nn.Embedding) if lookups else nn.Linear
    seen: set[nn.Parameter] = set()
    for path, module in case.model.named_modules():
        names: list[str] = []
        if isinstance(module, whole) or type(module).__name__ == "Conv1D":
            names = ["weight"]
        elif isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            declared = any(fnmatch.fnmatchcase(full, pattern) for pattern in case.declared)
            wanted = (name in names or declared) and parameter.dim() >= 2
            if wanted and parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield full, parameter


@cache
def covered(name: str, **options: Any) -> Coverage:
    """One step of a model of the zoo, compiled with these options of the backend, and plain."""
    options = {**OPTIONS, **options}
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = ZOO[name]()
    dtype = case.dtype
    model = case.model.train().to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.inputs.items()}
    plain = copy.deepcopy(model)
    backend = Watched(options)
    case.loss(torch.compile(model, backend=backend, **case.how)(**inputs)).backward()
    case.loss(plain(**inputs)).backward()
    weights = [Weight(*found) for found in weights_of(case, options.get("lookups", False))]
    for weight in weights:
        reasons = backend.reasons.get(weight.parameter, [NOWHERE])
        weight.taken = weight.parameter in backend.taken
        weight.pushed = weight.taken and not any(reasons)
        weight.reason = "; ".join(dict.fromkeys(filter(None, reasons)))
    fates = {path: backend.fate(p) for path, p in model.named_parameters() if p.requires_grad}
    gradients = {path: p.grad for path, p in model.named_parameters()}
    model.zero_grad()
    full = {path: p.grad for path, p in plain.named_parameters()}
    return Coverage(case, weights, fates, gradients, full, len(backend.graphs))


def pattern(name: str) -> str:
    """The name of a parameter without the numbers of layers."""
    return re.sub(r"\b\d+\b", "*", name)


def row(name: str) -> str:
    """A model's line of the first table."""
    weights = covered(name).weights
    groups: dict[str, Counter[str]] = {}
    for weight in weights:
        if weight.reason:
            groups.setdefault(weight.reason, Counter())[pattern(weight.name)] += 1
    notes = []
    for reason, paths in groups.items():
        listed = (f"{n} × `{path}`" if n > 1 else f"`{path}`" for path, n in paths.items())
        notes.append(f"{', '.join(listed)}: {reason}")
    taken, pushed = sum(w.taken for w in weights), sum(w.pushed for w in weights)
    return f"| {name} | {len(weights)} | {taken} | {pushed} | {'; '.join(notes)} |"


def percent(part: int, whole: int) -> str:
    """A share, rounded down: only what is whole is 100 %."""
    return "100 %" if part == whole else f"{math.floor(10_000 * part / whole) / 100:.2f} %"


def row_of_parameters(name: str) -> str | None:
    """A model's line of the second table; None if only vectors are left, and also by default."""
    fates = covered(name).fates
    count = sum(fate.size for fate in fates.values())
    taken = sum(fate.size for fate in fates.values() if fate.taken)
    with_lookups = sum(fate.size for fate in fates.values() if fate.with_lookups)
    left: Counter[tuple[str, str]] = Counter()
    for path, fate in fates.items():
        if not fate.with_lookups:
            what = "vectors" if fate.reason == VECTOR else f"`{pattern(path)}`"
            left[what, fate.reason.partition(",")[0]] += fate.size
    if taken == with_lookups and all(reason == VECTOR for _, reason in left):
        return None
    notes = (
        f"{what} {size:,}" if reason == VECTOR else f"{what} {size:,}: {reason}"
        for (what, reason), size in left.most_common()
    )
    shares = f"{percent(taken, count)} | {percent(with_lookups, count)}"
    return f"| {name} | {count:,} | {shares} | {'; '.join(notes)} |"


def row_of_family(name: str, found: dict[str, Any]) -> str:
    """A published model's line of the third table; ``found`` is what families.trace returns."""
    count = found["parameters"]
    cells = [f"{count:,}", *(percent(taken, count) for taken in found["taken"])]
    cells += [f"{size / 1e9:#.3g}".rstrip(".") for size in found["bytes"]]
    return f"| {' | '.join([name, *cells])} |"


def page() -> str:
    """docs/coverage.md as it should be."""
    of_parameters = {name: row_of_parameters(name) for name in ZOO}
    rows = [row for row in of_parameters.values() if row]
    others = len(ZOO) - len(rows)
    rest = f"In the other {others} models everything but vectors is taken by default."
    sections = [
        (INTRODUCTION, [*HEAD, *map(row, ZOO)]),
        (OF_PARAMETERS, [*HEAD_OF_PARAMETERS, *rows, "", rest]),
        (OF_FUNCTIONS, [*HEAD_OF_FUNCTIONS, *FUNCTIONS, REST_OF_FUNCTIONS.rstrip()]),
        (OF_FAMILIES, [*HEAD_OF_FAMILIES, *starmap(row_of_family, families.saved().items())]),
    ]
    return "\n".join("\n".join([text, *lines, ""]) for text, lines in sections)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to show weight by weight")
    parser.add_argument("--update", action="store_true", help="write docs/coverage.md")
    parser.add_argument("--lookups", action="store_true", help="show them with the option lookups")
    parser.add_argument("--families", action="store_true", help="trace the published models again")
    args = parser.parse_args()
    for name in args.names:
        shown = covered(name, lookups=True) if args.lookups else covered(name)
        print(f"{name}: {shown.graphs} graphs")
        for weight in shown.weights:
            state = "pushed" if weight.pushed else "taken" if weight.taken else "left"
            shape = tuple(weight.parameter.shape)
            print(f"  {state:<7}{weight.name} {shape} {weight.reason}".rstrip())
    if args.names:
        return 0
    if args.families:
        found = families.trace_all()
        if not args.update:
            print("\n".join(starmap(row_of_family, found.items())))
            return int(found != families.saved())
        families.save(found)
    text = page()
    if args.update:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    print(text)
    return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)


if __name__ == "__main__":
    sys.exit(main())
