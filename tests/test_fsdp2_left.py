"""What cannot train compact under FSDP2 is left to it, dense and right, with the reason."""

import copy
import warnings

import pytest
import test_fsdp2 as fsdp2
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map_only

import grass_fx
from grass_fx._torch_compat import fsdp
from grass_fx.errors import CompactGradError, DistributedError, GrassWarning, OptionError
from ranks import spawn


class Gathers(torch.Tensor):
    """A tensor that says itself what is gathered, as the weights of float8 training do."""

    @staticmethod
    def __new__(cls, inner):
        how = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), requires_grad=inner.requires_grad, **how
        )

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Gathers(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = tree_map_only(Gathers, lambda tensor: tensor.inner, (args, kwargs or {}))
        result = tree_map_only(torch.Tensor, Gathers, func(*bare[0], **bare[1]))
        return args[0] if func._schema.is_mutable else result

    def fsdp_pre_all_gather(self, mesh):
        return (self.inner,), None

    def fsdp_post_all_gather(self, outputs, metadata, dtype, *, out=None):
        return None if out is not None else (outputs[0], outputs)


def with_class(model):
    for block in model.blocks:
        for layer in (block.up, block.down):
            layer.weight = nn.Parameter(Gathers(layer.weight.detach()))


def with_hooks(model):
    for block in model.blocks:
        block.set_all_reduce_hook(lambda output: None)


def with_what_is_not_taken(rank):
    """Left to FSDP2 with the reason, dense and right; and errors that name the weight."""
    mesh = init_device_mesh("cpu", (fsdp2.RANKS,))

    def trial(reason, set_up=lambda model: None, before=lambda model: None, **how):
        torch._dynamo.reset()
        model = fsdp2.build()
        plain = copy.deepcopy(model)
        before(model)
        fsdp2.shard(model, mesh=mesh, **how)
        set_up(model)
        fsdp2.compile_blocks(model, **fsdp2.options())
        optimizer, reference = (
            fsdp2.adamw(model),
            torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.1),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                model(fsdp2.batch(step, rank, fsdp2.RANKS)).square().mean().backward()
                assert fsdp2.taken(model) == 0
                optimizer.step()
                optimizer.zero_grad()
                plain(fsdp2.batch(step)).square().mean().backward()
                reference.step()
                reference.zero_grad()
        told = [str(each.message) for each in caught if each.category is GrassWarning]
        assert any(f"fsdp2: {reason}" in each for each in told), told
        fsdp2.check([v.cpu() for v in fsdp2.whole(model)], fsdp2.whole(plain), reason)

    unused = getattr(
        fully_shard(nn.Linear(2, 2), mesh=mesh), "set_reduce_scatter_unused_params", None
    )
    if unused is not None:
        trial(
            "set_reduce_scatter_unused_params",
            lambda m: m.set_reduce_scatter_unused_params(True),
        )
    trial("the hook of set_all_reduce_hook", with_hooks)
    trial("its shard has a gathering of its own", before=with_class)
    columns = {"shard_placement_fn": lambda p: Shard(1 if p.dim() == 2 else 0)}
    trial("sharded along another dimension", **columns)
    trial("offloaded to the CPU", offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.MonkeyPatch.context() as patch:  # as with a torch that has renamed what we read
        patch.setattr(fsdp, "OF_A_GROUP", (*fsdp.OF_A_GROUP, "of_another_torch"))
        trial(f"the FSDP2 of torch {torch.__version__} lacks of_another_torch")
    parallel = fsdp2.build()
    for block in parallel.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fsdp2.compile_blocks(parallel, **fsdp2.options())
    with pytest.warns(GrassWarning, match="a DTensor, as of tensor parallelism"):
        parallel(fsdp2.batch(0)).sum().backward()
        fsdp2.adamw(parallel).step()
    assert fsdp2.taken(parallel) == 0
    model = fsdp2.build()
    compiled, _ = fsdp2.compile_then_shard(model, fsdp2.options())
    compiled(fsdp2.batch(0, rank, fsdp2.RANKS)).sum().backward()
    for foreach in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
        with pytest.raises(CompactGradError, match=r"weight: .* grass_fx\.subspace\(X\)"):
            optimizer.step()
    with pytest.raises(OptionError, match="Call explain before fully_shard"):
        grass_fx.explain(model, fsdp2.batch(0, rank, fsdp2.RANKS))
    with_hooks(model)
    with pytest.raises(DistributedError, match=r"up\.weight .* set_all_reduce_hook"):
        compiled(fsdp2.batch(0, rank, fsdp2.RANKS))
    if unused is not None:
        model.set_reduce_scatter_unused_params(True)
        with pytest.raises(
            DistributedError, match=r"up\.weight .* set_reduce_scatter_unused_params"
        ):
            compiled(fsdp2.batch(0, rank, fsdp2.RANKS))
    model = fsdp2.build()
    eager = torch.compiler.disable(lambda module, args, out: out + module.down.weight.sum())
    model.blocks[0].register_forward_hook(eager)  # before FSDP2's own, which reshards
    compiled, _ = fsdp2.compile_then_shard(model, fsdp2.options())
    with pytest.raises(CompactGradError, match=r"down\.weight .* dense one from outside"):
        compiled(fsdp2.batch(0, rank, fsdp2.RANKS)).sum().backward()


@pytest.mark.slow
def test_two_processes():
    spawn(with_what_is_not_taken, fsdp2.RANKS, timeout=120)
