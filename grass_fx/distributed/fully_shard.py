"""Full sharding: every process holds a part of each parameter; the graph gathers the parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from grass_fx.distributed.data_parallel import ModelReplicas
from grass_fx.errors import DistributedError
from grass_fx.state.replicas import replicas_of
from grass_fx.state.sharding import Sharding, sharding_of


def fully_shard(
    model: nn.Module, mesh: DeviceMesh | None = None, reshard_after_forward: bool = True
) -> nn.Module:
    """Shard every parameter of ``model`` over the processes of a mesh, in place.

    Call it before the optimizer is built and before the model is compiled. Each parameter becomes a
    DTensor sharded along dimension 0. On a two-dimensional mesh it is replicated over the mesh's
    first dimension and sharded over the second. A parameter whose dimension 0 the processes do not
    divide evenly is replicated. Reading ``module.weight`` gathers it, so that the collectives of a
    compiled model are operators of its graph: the gradient of a taken weight is first selected and
    then reduce-scattered, m·r numbers. Names, hooks and ``state_dict()`` keys stay. Values become
    those of the mesh's first process.

    Args:
        model: the model; it must be the same on every process, except for its values.
        mesh: a mesh with one or two dimensions; None means one dimension with all processes.
        reshard_after_forward: gather the weights again in the backward instead of keeping them.

    Returns:
        ``model`` itself; its modules now have subclasses of their original classes.

    Raises:
        DistributedError: there is no process group, the processes' models differ, or the model is
            sharded already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            "fully_shard: there is no process group. Call "
            "torch.distributed.init_process_group(...) first, in a process that torchrun started."
        )
    named = dict(model.named_parameters())
    if mesh is None:
        device = next(iter(named.values())).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    if mesh.ndim > 2:
        raise DistributedError(
            f"fully_shard: a mesh of {mesh.ndim} dimensions. Use one dimension to shard over, or "
            'two, (replicate, shard), such as mesh["replicate", "shard"].'
        )
    for name, p in named.items():
        if isinstance(p, DTensor):
            raise DistributedError(
                f"fully_shard: {name} is a DTensor already. Shard a model once, before anything "
                "else distributes it; tensor parallelism is not combined with it."
            )
    replicas = ModelReplicas(model, _group_of(mesh))
    described = [f"{name}: {tuple(p.shape)} {p.dtype}" for name, p in named.items()]
    replicas.agree("parameters", described, "Build the same model on every process.")
    sharding = Sharding(mesh, reshard_after_forward)
    sharded: dict[int, nn.Parameter] = {}  # by the original's id, so shared parameters stay shared
    for module in list(model.modules()):
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            if id(p) not in sharded:
                sharded[id(p)] = _shard(p, sharding)
                sharding_of[sharded[id(p)]] = sharding
                replicas_of[sharded[id(p)]] = replicas
            module._parameters[name] = sharded[id(p)]
        if own:
            cls: Any = type(module)
            module.__class__ = _gathering(cls, tuple(own))
    for buffer in model.buffers():
        dist.broadcast(buffer, dist.get_global_rank(replicas.group, 0), replicas.group)
    return model


def _group_of(mesh: DeviceMesh) -> Any:
    """The process group of all processes in a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)


def _shard(p: nn.Parameter, sharding: Sharding) -> nn.Parameter:
    even = p.dim() > 0 and p.shape[0] % sharding.shards.ranks == 0
    # Uneven parts would make the processes' graphs, and so the order of collectives, differ.
    placements = sharding.placements if even else [Replicate()] * sharding.mesh.ndim
    value = distribute_tensor(p.detach(), sharding.mesh, placements)
    return nn.Parameter(value, requires_grad=p.requires_grad)


@cache
def _gathering(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` in which reading one of these parameters gathers it.

    It is cached, so that Dynamo sees the same class in every layer.
    """
    properties = {name: property(_gather(name)) for name in names}
    return type(f"Sharded{cls.__name__}", (cls,), {**properties, "__module__": cls.__module__})


def _gather(name: str) -> Any:
    def gather(module: nn.Module) -> Tensor:
        p: Any = module._parameters[name]
        ndim = p.device_mesh.ndim
        whole = p.redistribute(placements=[Replicate()] * ndim)
        gathered: Tensor = whole.to_local(grad_placements=[Partial("avg")] * ndim)
        return gathered

    return gather
