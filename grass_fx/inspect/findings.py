"""The findings of :func:`grass_fx.explain` about a model's weights: amounts before and after."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from grass_fx.config import nearest

Amount = Any
"""A number or, with dynamic shapes, a sympy expression in the names of the sizes."""


def folded(name: str) -> str:
    """A name with "*" for its numbers, such as layers' indices."""
    return re.sub(r"\b\d+\b", "*", name)


@dataclass(frozen=True)
class Cost:
    """The cost of weights in one training step: FLOPs and traffic of products, and bytes held.

    Costs can be added. A multiplication and its addition count as two FLOPs. Traffic is the bytes
    that a product has to read and write once. Amounts are numbers or sympy expressions.
    """

    forward_flops: Amount = 0
    """Products with the weight in the forward, including those that checkpointing recomputes."""
    input_gradient_flops: Amount = 0
    weight_gradient_flops: Amount = 0
    """For a rule with scores, the mean over a period of K steps with one scoring step. For
    "frozen_top", which stops scoring, that of a regular step."""
    forward_bytes: Amount = 0
    input_gradient_bytes: Amount = 0
    weight_gradient_bytes: Amount = 0
    gradient: Amount = 0
    """Bytes of ``weight.grad``."""
    state: Amount = 0
    """Bytes of AdamW's state."""
    all_reduce: Amount = 0
    """Bytes that each process sends in a data-parallel step, with a ring all-reduce."""

    def __add__(self, other: Cost) -> Cost:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Cost(*(a + b for a, b in pairs))

    def map(self, change: Callable[[Amount], Amount]) -> Cost:
        """The cost with ``change`` applied to every amount."""
        return Cost(*(change(getattr(self, f.name)) for f in fields(self)))

    @property
    def flops(self) -> Amount:
        """FLOPs of all three kinds of products."""
        return self.forward_flops + self.input_gradient_flops + self.weight_gradient_flops

    @property
    def bytes(self) -> Amount:
        """Traffic of all three kinds of products."""
        return self.forward_bytes + self.input_gradient_bytes + self.weight_gradient_bytes


@dataclass(frozen=True)
class GraphNode:
    """A node of a picture of a graph."""

    name: str
    """As in the graph."""
    kind: str
    """"op" for an operation, "input" for a graph input, "rest" for an operation whose own inputs
    are not shown."""
    label: str
    """The operation, or the role of an input: "weight", "indices", "scale"."""
    shape: str
    inputs: tuple[str, ...]
    """Names of other nodes of the picture."""


@dataclass(frozen=True)
class Weight:
    """A trainable parameter, and what the backend does with it."""

    name: str
    """As in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    dtype: str
    status: str
    """"pushed": its full gradient is never formed. "taken": its gradient is compact, but it is
    selected from a full gradient. "dense": it trains as it would without grass."""
    reason: str
    """Why it is not pushed; empty if it is."""
    side: str | None = None
    """"out" or "in": whether output or input features are selected; None if dense."""
    rank: int | None = None
    """r, the number of selected columns or rows; for a stack, the number in each matrix."""
    selects: str | None = None
    """"columns" or "rows" of the weight as it is stored; None if dense."""
    kernel: str | None = None
    """How the compact gradient is computed: "gather + mm", "triton template" or "autotuned", or
    several of them if the weight has several uses. "mm, then gather" if it is not pushed."""
    before: Cost = Cost()
    """At full rank."""
    after: Cost = Cost()
    pictures: Mapping[str, tuple[GraphNode, ...]] = field(default_factory=dict, repr=False)
    """The graph around the weight's gradient, "before" and "after", in the order of execution."""

    @property
    def taken(self) -> bool:
        """Whether its gradient is compact."""
        return self.status != "dense"


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward saves for the backward of what one module made."""

    module: str | None
    """As in ``model.named_modules()``, "" for the model itself; None for what no module made, or a
    module that is not known."""
    before: Amount
    """At full rank."""
    after: Amount


@dataclass(frozen=True)
class Subject:
    """What was explained, when, and with which versions."""

    model: str
    """The name of the model's class, or what made it on the command line."""
    inputs: tuple[str, ...]
    """Shape and dtype of each input, such as "(4, 64) int64"."""
    device: str
    """Of the model's parameters."""
    date: str
    """As "2026-11-30"."""
    versions: Mapping[str, str]
    """Of "grass-fx" and "torch"."""


@dataclass(frozen=True)
class Findings:
    """Everything that :func:`grass_fx.explain` found, and its totals."""

    subject: Subject
    weights: tuple[Weight, ...]
    """Every trainable parameter."""
    weight_bytes: int
    """Bytes of all parameters (frozen ones too) and buffers."""
    activations: tuple[Amount, Amount]
    """Bytes that the graphs save for the backward, before and after. Parameters, buffers and the
    model's inputs are not counted."""
    saved: tuple[Saved, ...]
    """The same by the module that made it, in the model's order; the sums are ``activations``."""
    scoring_step: Amount
    """Extra bytes in a scoring step: the largest full gradient that it forms, and all scores."""
    graphs: int
    """The number of compiled training graphs; graph breaks make it more than one."""
    options: Mapping[str, Any]
    """The options passed to explain."""
    symbols: Mapping[str, int | None]
    """With dynamic shapes: the symbols in amounts, and their values in the given inputs."""

    @property
    def before(self) -> Cost:
        """The cost of all weights at full rank."""
        return sum((weight.before for weight in self.weights), Cost())

    @property
    def after(self) -> Cost:
        """The cost of all weights as compiled with grass."""
        return sum((weight.after for weight in self.weights), Cost())

    @property
    def flops(self) -> Amount:
        """FLOPs of the weights' products in a step; use ``.subs({"s0": 8})`` if it is symbolic."""
        return self.after.flops

    @property
    def full_flops(self) -> Amount:
        """The same at full rank."""
        return self.before.flops

    @property
    def memory(self) -> tuple[Amount, Amount]:
        """Bytes of weights, gradients, state and activations before and after."""
        before, after = (
            cost.gradient + cost.state + self.weight_bytes for cost in (self.before, self.after)
        )
        return before + self.activations[0], after + self.activations[1]

    def __getitem__(self, name: str) -> Weight:
        """The trainable parameter with this name; otherwise a KeyError with the nearest name."""
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(f"{name}: {nearest(name, list(self))}")

    def __iter__(self) -> Iterator[str]:
        """The names of the weights."""
        return (weight.name for weight in self.weights)

    def __contains__(self, name: object) -> bool:
        """Whether a trainable parameter has this name."""
        return any(name == known for known in self)

    def rows(self) -> list[tuple[str, Amount, Amount, str]]:
        """The totals as (name, before, after, unit); the unit is "FLOPs" or "bytes"."""
        before, after = self.before, self.after
        rows: list[tuple[str, Amount, Amount, str]] = []
        for kind in ("forward", "input_gradient", "weight_gradient"):
            pair = getattr(before, f"{kind}_flops"), getattr(after, f"{kind}_flops")
            rows.append((f"{kind.replace('_', ' ')} products", *pair, "FLOPs"))
        rows.append(("all products", before.flops, after.flops, "FLOPs"))
        rows.append(("traffic of products", before.bytes, after.bytes, "bytes"))
        rows.append(("gradients", before.gradient, after.gradient, "bytes"))
        rows.append(("optimizer state", before.state, after.state, "bytes"))
        rows.append(("all-reduce", before.all_reduce, after.all_reduce, "bytes"))
        rows.append(("activations", *self.activations, "bytes"))
        rows.append(("weights", self.weight_bytes, self.weight_bytes, "bytes"))
        rows.append(("memory in all", *self.memory, "bytes"))
        return rows

    def evaluated(self, amount: Amount) -> float | None:
        """An amount as a number, with its symbols' values in the given inputs.

        None if a symbol has no value; sizes that depend on data have none.
        """
        if not hasattr(amount, "subs"):
            return float(amount)
        value = amount.subs({k: v for k, v in self.symbols.items() if v is not None})
        return float(value) if value.is_number else None

    def groups(self) -> list[tuple[str, list[Weight]]]:
        """(name, weights) of weights whose names differ only in numbers, such as layers' indices.

        Weights of one group also agree in shape, status, reason, rank and kernel.
        """
        found: dict[Any, list[Weight]] = {}
        for weight in self.weights:
            name = folded(weight.name)
            key = name, weight.shape, weight.status, weight.reason, weight.rank, weight.kernel
            found.setdefault(key, []).append(weight)
        return [(key[0] if len(g) > 1 else g[0].name, g) for key, g in found.items()]

    def saved_groups(self) -> list[tuple[str | None, list[Saved]]]:
        """(name, rows) of modules whose names differ only in numbers."""
        found: dict[str | None, list[Saved]] = {}
        for row in self.saved:
            found.setdefault(row.module and folded(row.module), []).append(row)
        return [(name if len(g) > 1 else g[0].module, g) for name, g in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON; symbolic amounts become strings."""

        def plain(value: Any) -> Any:
            if hasattr(value, "free_symbols"):
                return float(value) if value.is_number else str(value)
            if value in (math.inf, -math.inf):  # JSON has no infinity
                return str(value)
            if isinstance(value, Mapping):
                return {str(key): plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            if hasattr(value, "__dataclass_fields__"):
                return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
            return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

        totals = {name: {"before": a, "after": b, "unit": unit} for name, a, b, unit in self.rows()}
        return {**plain(self), "totals": plain(totals)}

    def to_json(self) -> str:
        """The result of :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)
