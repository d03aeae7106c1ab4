"""Counts the collectives that reach the dispatcher, and their bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


class Traffic(TorchDispatchMode):
    """Counts the bytes that this process hands to collectives: ``with Traffic() as t``.

    ``bytes`` maps a kind to a sum over its collectives of the larger of input and output: the
    tensor of an all-reduce, the input of a reduce-scatter, the output of an all-gather. How much of
    it a network moves depends on the algorithm: with a ring of p processes each sends 2 (p − 1)/p
    of it for an all-reduce, and (p − 1)/p for the others. Use it around the ``backward()`` of
    something that is compiled already, because Dynamo compiles again under a mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The bytes of all kinds."""
        return sum(self.bytes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__.replace("allreduce", "all_reduce")
            name = name.replace("allgather", "all_gather")
            kind = next((kind for kind in _NAMES if name.strip("_").startswith(kind)), None)
            if kind is not None:
                self.calls[kind] += 1
                self.bytes[kind] += max(_bytes(args[0]), _bytes(args[1:]), _bytes(result))
        return result


def _bytes(tree: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))
