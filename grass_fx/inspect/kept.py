"""What a graph saves for its backward, and which modules made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from grass_fx.inspect.sizes import size_expression


@dataclass
class Kept:
    """What a graph saves for its backward: bytes of intermediates, and positions of inputs."""

    made_by: dict[str, Any] = field(default_factory=dict)
    """The place of a module in the frame, such as "L['self'].mlp.up" -> bytes of what it made. The
    key "" has the bytes of what was made outside of modules."""
    inputs: list[int] = field(default_factory=list)

    def add(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        """Add what the forward saves for the backward.

        A tensor belongs to the module that made its memory, not to one that views it.
        """
        from grass_fx import _torch_compat as compat  # loads Inductor

        places = forward.graph.find_nodes(op="placeholder")
        of_inputs = {_storage(n): compat.input_position(n) for n in places if _storage(n)}
        makers: dict[Any, str] = {}
        for node in forward.graph.nodes:
            if (storage := _storage(node)) is not None and not makers.get(storage):
                makers[storage] = compat.module_source(node)
        inputs, seen = set(), set()
        for node in backward.graph.find_nodes(op="placeholder"):
            storage = _storage(node)
            if storage is None or node.name.startswith("tangents") or storage in seen:
                continue
            seen.add(storage)
            if storage in of_inputs:
                inputs.add(of_inputs[storage])
            else:
                maker = makers.get(storage, "")
                size = size_expression(node.meta["val"].untyped_storage().nbytes())
                self.made_by[maker] = self.made_by.get(maker, 0) + size
        self.inputs = sorted(place for place in inputs if place is not None)

    def map(self, change: Callable[[Any], Any]) -> None:
        """Change every amount."""
        self.made_by = {source: change(amount) for source, amount in self.made_by.items()}


def module_names(parameters: Mapping[str, Iterable[str]]) -> Callable[[str], str | None]:
    """A function from a module's place in a frame to its name in the model.

    ``parameters`` has the names of each parameter by its place: one graph may serve many layers,
    which only their parameters tell apart. The name is None if no parameter tells it.
    """
    known: dict[str, str] = {}
    for source, names in parameters.items():
        place = source.split(".")
        name = max((name.split(".") for name in names), key=lambda each: _common(place, each))
        for count in range(1, _common(place, name) + 1):
            known.setdefault(".".join(place[:-count]), ".".join(name[:-count]))

    def name_of(source: str) -> str | None:
        outer, inner = source or "L['self']", ""  # in a forward the module itself is no call
        while outer not in known:
            outer, dot, last = outer.rpartition(".")
            if not dot:
                return None
            inner = f".{last}{inner}"
        return (known[outer] + inner).removeprefix(".")

    return name_of


def _common(one: list[str], two: list[str]) -> int:
    """How many of the last parts are the same."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def _storage(node: fx.Node) -> Any:
    """A key that fake tensors have in common if they share memory; None if it is no tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
