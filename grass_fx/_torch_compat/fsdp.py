"""torch's own FSDP2 (``torch.distributed.fsdp.fully_shard``): the parameters that it gathers.

A compiled graph is given the gathered Parameter; the optimizer has the sharded one. FSDP2 makes the
gathered one once, at its first gathering, and keeps the object: only its memory comes and goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

_KNOWN = "_grass_fx_fsdp"

OF_A_PARAM = (
    "sharded_param", "mesh_info", "reduce_dtype", "is_dtensor", "fsdp_placement", "offload_to_cpu",
    "_sharded_local_tensor",
)  # fmt: skip
OF_A_GROUP = ("gradient_divide_factor", "reduce_grads", "all_reduce_grads")
"""The private attributes that are read. If a torch lacks one, the weight trains dense."""


@dataclass(frozen=True, eq=False)
class FSDPWeight:
    """One parameter under FSDP2: its FSDPParam and the group that it is gathered with."""

    param: Any
    group: Any

    @property
    def sharded(self) -> Tensor:
        """What the optimizer has, a DTensor; ``load_state_dict(assign=True)`` exchanges it."""
        parameter: Tensor = self.param.sharded_param
        return parameter

    @property
    def mesh(self) -> Any:
        """The mesh: of one dimension, or (replicate, shard)."""
        return self.param.mesh_info.mesh

    @property
    def shards_rows(self) -> bool:
        """Whether it is sharded along dimension 0; known before the first gathering."""
        mesh_dim = getattr(self.param.mesh_info, "shard_mesh_dim", None)
        return mesh_dim is not None and self.param.fsdp_placement == Shard(0)

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """The dtype in which gradients travel; None: their own."""
        dtype: torch.dtype | None = self.param.reduce_dtype
        return dtype

    @property
    def factor(self) -> float:
        """FSDP2 reduces a gradient to the average over processes times this."""
        divide = self.group.gradient_divide_factor
        return 1.0 if divide is None else self.mesh.size() / float(divide)

    @property
    def reduces(self) -> bool:
        """Whether this backward reduces gradients: over shards (``set_requires_gradient_sync``)
        and, where there are replicas, over these (``set_requires_all_reduce``)."""
        replicated = self.mesh.ndim > 1
        return bool(self.group.reduce_grads and (self.group.all_reduce_grads or not replicated))

    @property
    def conflict(self) -> str | None:
        """The setting, also of later, that does not work with a compact gradient, or None."""
        if getattr(self.group, "reduce_scatter_unused_params", False):
            return "set_reduce_scatter_unused_params(True) makes FSDP2 add zeros to its gradient"
        if getattr(self.group, "_all_reduce_hook", None) is not None:
            return "the hook of set_all_reduce_hook would not see its gradient"
        return None

    def refusal(self) -> str | None:
        """Why its gradient cannot be compact, or None."""
        missing = [name for name in OF_A_PARAM if not hasattr(self.param, name)]
        missing += [name for name in OF_A_GROUP if not hasattr(self.group, name)]
        if missing:
            return f"the FSDP2 of torch {torch.__version__} lacks {', '.join(missing)}"
        if getattr(self.param.mesh_info, "shard_mesh_dim", None) is None:
            return "replicated and not sharded"
        if self.param.is_dtensor:
            return "a DTensor before fully_shard, as of tensor parallelism"
        if self.param.fsdp_placement != Shard(0):
            return f"sharded along another dimension, {self.param.fsdp_placement}"
        if self.param.offload_to_cpu:
            return "offloaded to the CPU"
        if hasattr(self.param._sharded_local_tensor, "fsdp_pre_all_gather"):
            return "its shard has a gathering of its own, as of float8"
        return self.conflict


def fsdp_weights(values: Sequence[Tensor]) -> list[FSDPWeight | None] | None:
    """:func:`fsdp_weight` of each; None if FSDP2 has gathered none of them."""
    if not _states():
        return None
    weights = [fsdp_weight(value) for value in values]
    return weights if any(weights) else None


def fsdp_weight(gathered: Tensor) -> FSDPWeight | None:
    """The weight that FSDP2 has gathered into this Parameter; None if it is no such Parameter."""
    known = gathered.__dict__.get(_KNOWN)
    if known is None:
        if not _states():
            return None
        known = gathered.__dict__[_KNOWN] = _looked_up(gathered)
    param, group = (ref() for ref in known) if known else (None, None)
    return None if param is None else FSDPWeight(param, group)


def _looked_up(gathered: Tensor) -> tuple[weakref.ref[Any], ...]:
    for weight in _weights():
        if getattr(weight.param, "_unsharded_param", None) is gathered:
            return weakref.ref(weight.param), weakref.ref(weight.group)
    return ()


def fsdp_weight_of_shard(parameter: Tensor) -> FSDPWeight | None:
    """The weight of which FSDP2 has given the optimizer this parameter; None if it is none."""
    return next((each for each in _weights() if each.param.sharded_param is parameter), None)


def _states() -> Mapping[Any, Any]:
    """Module -> weak reference to the state that FSDP2 and its like keep of it."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:  # then no weight is found, and each trains dense with that reason
        return {}
    return _module_state_mapping


def _weights() -> Iterator[FSDPWeight]:
    """All of the process."""
    for ref in list(_states().values()):
        state = ref()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before there were several of one module
            groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
        for group in groups:
            for param in group.fsdp_params:
                yield FSDPWeight(param, group)
