"""Models on paper: of the same structure and shapes, without data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextmanager
def without_data(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Yield a copy of the model and its inputs on the CPU, in which no tensor has data.

    Such a step is traced as on a CPU. The meta device lacks parts of that: torch differentiates no
    cross_entropy there.
    """
    from grass_fx import _torch_compat as compat  # loads Inductor

    tensors = [value for _, _, value in _tensors(model)]
    structure = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    known: dict[int, Tensor] = {}

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            plain = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if isinstance(value, nn.Parameter):
                known[id(value)] = nn.Parameter(plain, value.requires_grad)
            else:
                known[id(value)] = plain.requires_grad_(value.requires_grad)
        return known[id(value)]

    with compat.without_data("cpu"):
        for holder, name, value in _tensors(structure):
            holder[name] = drawn(value)
        yield structure, tuple(tree_map(drawn, [*args])), tree_map(drawn, {**kwargs})


def _tensors(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter, buffer and other tensor of a module, with the dict that holds it."""
    return [
        (holder, name, value)
        for module in model.modules()
        for holder in (module._parameters, module._buffers, vars(module))
        for name, value in holder.items()
        if isinstance(value, Tensor)
    ]
