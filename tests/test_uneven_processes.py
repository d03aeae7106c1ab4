"""What goes on in one process only, or later, or in a copy: processes stay one training run."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from test_data_parallel import Model, batch, loss_of, options
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import grass_fx
from grass_fx.distributed import data_parallel
from grass_fx.errors import OptionError
from grass_fx.state.registry import registry
from ranks import spawn


def gathered(tensor):
    """What each process has of ``tensor``."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    everyones = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, whole.contiguous())
    return everyones


def assert_same_everywhere(tensors):
    for tensor in tensors:
        first, *others = gathered(tensor)
        assert all(torch.equal(first, other) for other in others)


def gradients(model):
    return [getattr(p.grad, "compact", p.grad) for p in model.parameters() if p.grad is not None]


def up_of(model):
    return dict(model.named_parameters())["up.weight"]


def compiled(model, **more):
    return torch.compile(model, backend="grass", options=options(rank=8, **more))


def another_size(rank):
    """One process compiles again and the other does not."""
    model = data_parallel(Model())
    call = compiled(model)
    for rows in (8, 8 if rank == 0 else 5):
        model.zero_grad()
        loss_of(call, batch(rank)[:rows]).backward()
    assert isinstance(model.up.weight.grad, grass_fx.CompactGrad)
    assert_same_everywhere(gradients(model))


def thawed(rank):
    """A layer that trains only later."""
    model = Model()
    model.up.requires_grad_(False)
    call = compiled(data_parallel(model))
    loss_of(call, batch(rank)).backward()
    assert model.up.weight.grad is None
    model.up.requires_grad_(True)
    model.zero_grad()
    loss_of(call, batch(rank)).backward()
    assert isinstance(model.up.weight.grad, grass_fx.CompactGrad)
    assert_same_everywhere(gradients(model))


def stepped_in_backward(rank):
    """Would be with gradients of one process: an error, in whatever order they are combined."""
    model = data_parallel(Model())
    optimizer = grass_fx.AdamW(model.parameters())
    with pytest.raises(OptionError, match="step_in_backward and data_parallel"):
        grass_fx.step_in_backward(optimizer)
    model = Model()
    optimizer = grass_fx.AdamW(model.parameters())
    grass_fx.step_in_backward(optimizer)
    call = compiled(data_parallel(model))
    with pytest.raises(OptionError, match="step_in_backward and data_parallel"):
        loss_of(call, batch(rank)).backward()


def copied(rank):
    """A DistributedDataParallel of a copy averages all of it."""
    other = DistributedDataParallel(copy.deepcopy(data_parallel(Model())))
    loss_of(other, batch(rank)).backward()
    assert len(gradients(other)) == len(list(other.parameters()))
    assert_same_everywhere(gradients(other))


def scaled(rank):
    """An infinity in one process's part of a gradient: all skip the step."""
    model = fully_shard(Model())
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2)
    call, scaler = compiled(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    scales = []
    for step in range(3):
        scaler.scale(loss_of(call, batch(step).chunk(2)[rank])).backward()
        if step == 1 and rank == 1:
            up_of(model).grad.compact.to_local()[0, 0] = torch.inf
        before = [p.full_tensor() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        now = [p.full_tensor() for p in model.parameters()]
        moved = [not torch.equal(a, b) for a, b in zip(now, before, strict=True)]
        assert not any(moved) if step == 1 else all(moved)
        scales.append(scaler.get_scale())
        optimizer.zero_grad(set_to_none=step == 0)
    assert scales == [4.0, 2.0, 2.0]
    subspace = registry.get(up_of(model))
    assert subspace.step == 2
    assert_same_everywhere([p.detach() for p in model.parameters()])


def clipped(rank):
    """By functions of lists, as tensor by tensor."""
    norms = []
    for foreach in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = fully_shard(Model().double())
        grass_fx.AdamW(model.parameters())  # which keys the draws
        loss_of(compiled(model), batch(0).chunk(2)[rank]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach)
        norms.append([norm.full_tensor(), *(each.full_tensor() for each in gradients(model))])
        torch._foreach_zero_([p.grad for p in model.parameters()])
        assert not any(each.full_tensor().any() for each in gradients(model))
        assert up_of(model).grad.zeroed
    torch.testing.assert_close(norms[0], norms[1])


def rounded(rank):
    """Stochastic rounding of what is sharded and trains dense."""
    model = fully_shard(Model().bfloat16())
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, stochastic_rounding=True)
    call = compiled(model)
    for step in range(2):
        before = [p.full_tensor() for p in model.parameters()]
        loss_of(call, batch(step).chunk(2)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(p.full_tensor(), old)
    assert_same_everywhere([p.detach() for p in model.parameters()])


def sharded_frozen(rank):
    """What trains only later is taken then."""
    model = fully_shard(Model())
    frozen = up_of(model).requires_grad_(False)
    call = compiled(model)
    loss_of(call, batch(rank)).backward()
    frozen.requires_grad_(True)
    loss_of(call, batch(rank)).backward()
    assert isinstance(frozen.grad, grass_fx.CompactGrad)


def saved_before_the_first_call(rank):
    """A state that was loaded and not used yet is saved as it came."""
    makes = grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW), grass_fx.subspace(torch.optim.SGD)
    for make, side in itertools.product(makes, ("in", "out")):
        torch._dynamo.reset()
        model = fully_shard(Model())
        optimizer = make(model.named_parameters(), lr=1e-2)
        call = compiled(model, side=side, refresh_every=2)
        for step in range(3):  # rows of two ages
            optimizer.zero_grad()
            loss_of(call, batch(step)).backward()
            assert isinstance(up_of(model).grad, grass_fx.CompactGrad)
            optimizer.step()
        saved = optimizer.state_dict()
        again = fully_shard(Model())
        other = make(again.named_parameters(), lr=1e-2)
        other.load_state_dict(saved)
        for key, state in other.state_dict()["state"].items():
            for name, value in state.items():
                assert type(value) is type(saved["state"][key][name]), name
                torch.testing.assert_close(value, saved["state"][key][name], rtol=0, atol=0)


CASES = (
    another_size, thawed, stepped_in_backward, copied, scaled, clipped, rounded, sharded_frozen,
    saved_before_the_first_call,
)  # fmt: skip


# On 2.11 torch.compile, with any backend, does not notice what trains only later.
UNNOTICED = (thawed, sharded_frozen) if torch.__version__ < "2.12" else ()


def run(rank):
    for case in CASES:
        if case in UNNOTICED:
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        case(rank)
        dist.barrier()


@pytest.mark.slow
def test_two_processes():
    spawn(run, 2)
