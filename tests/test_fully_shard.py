"""Full sharding: several processes hold parts of each weight and train as one."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_data_parallel import EXACT, STEPS, Model, batch, loss_of, options
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import grass_fx
from grass_fx.distributed import fully_shard
from grass_fx.errors import DistributedError, OptionError
from grass_fx.testing.traffic import Traffic
from helpers import Captured
from ranks import one_process, spawn


class Experts(nn.Module):
    """A stack of matrices, and a head that two processes cannot divide."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(4, 16, 8)), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.bmm(x, self.experts.transpose(1, 2))
        return self.head(torch.bmm(hidden, self.experts)).square().mean()


OTHERS = {  # of another model, or with other options
    "stack": (Experts, {"rank": 8}),
    "blocks": (Model, {"rank": 16, "block": 2}),
    "replacement": (Model, {"rank": 8, "selection": "uniform", "replacement": True}),
    "drawn by scores": (
        Model,
        {
            "rank": 8,
            "selection": "multinomial_norm",
            "replacement": True,
            "score_sync": "gradient",
        },
    ),
}
CASES = [("cyclic", "norms", "auto"), ("top", "gradient", "auto"), ("uniform", "norms", "in")]


def train(rule, score_sync, side, mesh=None, compiler="aot_eager"):
    torch._dynamo.reset()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = Model().double()
    fully_shard(model, mesh)
    given = options(rank=8, selection=rule, score_sync=score_sync, side=side, compiler=compiler)
    compiled = torch.compile(model, backend="grass", options=given)
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)
    for step in range(STEPS):
        loss_of(compiled, batch(step).chunk(ranks)[rank]).backward()
        for name, p in model.named_parameters():
            taken = name in ("up.weight", "down.weight")
            assert isinstance(p.grad, grass_fx.CompactGrad) == taken, name
            assert isinstance(p, DTensor)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() for p in model.parameters()], norm.full_tensor()


def train_other(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, more = OTHERS[name]
    model = fully_shard(build().double())
    compiled = torch.compile(model, backend="grass", options=options(side="auto", **more))
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        gen = torch.Generator().manual_seed(step)
        whole = torch.randn(4, 8, 8, generator=gen, dtype=torch.float64)
        if build is Experts:
            compiled(whole.chunk(dist.get_world_size(), 1)[dist.get_rank()]).backward()
        else:
            part = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            loss_of(compiled, part).backward()
        assert any(isinstance(p.grad, grass_fx.CompactGrad) for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() for p in model.parameters()]


def run(rank, folder):
    ranks = dist.get_world_size()
    for k, (rule, score_sync, side) in enumerate(CASES):
        got = train(rule, score_sync, side)
        if ranks == 1:
            torch.save(got, f"{folder}/{k}.pt")
            continue
        for value, want in zip(got[0], torch.load(f"{folder}/{k}.pt")[0], strict=True):
            torch.testing.assert_close(value, want, **EXACT, msg=lambda m, k=k: f"{CASES[k]}: {m}")
        torch.testing.assert_close(got[1], torch.load(f"{folder}/{k}.pt")[1], **EXACT)
    for name in OTHERS:
        got = train_other(name)
        if ranks == 1:
            torch.save(got, f"{folder}/{name}.pt")
        torch.testing.assert_close(got, torch.load(f"{folder}/{name}.pt"), **EXACT)


def advance(model, compiled, optimizer, steps):
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for step in steps:
        loss_of(compiled, batch(step).chunk(ranks)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()


def built(side="auto", rule="cyclic"):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fully_shard(Model().double())
    given = options(rank=8, side=side, selection=rule)
    compiled = torch.compile(model, backend="grass", options=given)
    return model, compiled, grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)


def resume(rank, folder):
    """Two processes save, and any number goes on to the same numbers."""
    for side in ("auto", "in"):
        model, compiled, optimizer = parts = built(side)
        if dist.get_world_size() == 2:
            advance(*parts, range(6))
            states = get_state_dict(model, optimizer)
            up = states[1]["state"]["up.weight"]
            assert isinstance(up["exp_avg"], DTensor)
            assert tuple(up["exp_avg"].shape) == ((32, 8) if side == "in" else (32, 8))
            dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{side}")
            advance(*parts, range(6, 11))
            weights = [p.detach().full_tensor() for p in model.parameters()]
            if rank == 0:
                torch.save(weights, f"{folder}/{side}.pt")
            continue
        loss_of(compiled, batch(0)).backward()  # which weights are taken is known from here on
        optimizer.zero_grad()
        states = get_state_dict(model, optimizer)
        both = {"model": states[0], "optimizer": states[1]}
        dcp.load(both, checkpoint_id=f"{folder}/{side}")
        set_state_dict(
            model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
        )
        advance(*parts, range(6, 11))
        for p, want in zip(model.parameters(), torch.load(f"{folder}/{side}.pt"), strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), want, **EXACT)


def count(rank, reshard):
    """Collectives move what is compact, and shards."""
    torch._dynamo.reset()
    model = fully_shard(Model(), reshard_after_forward=reshard)
    compiled = torch.compile(model, backend="grass", options=options(rank=8))
    loss_of(compiled, batch(0)).backward()
    compact = [p.grad.compact for p in model.parameters() if hasattr(p.grad, "compact")]
    dense = [p.grad for p in model.parameters() if not hasattr(p.grad, "compact")]
    want = sum(each.numel() for each in (*compact, *dense)) * 4
    model.zero_grad()
    loss = loss_of(compiled, batch(1))
    with Traffic() as traffic:
        loss.backward()
    assert len(compact) == 2
    assert traffic.bytes["reduce_scatter"] == want
    assert (traffic.calls["all_gather"] > 0) == reshard


def refuse(rank):
    model, compiled, _ = built()
    loss_of(compiled, batch(0)).backward()
    optimizer = grass_fx.subspace(torch.optim.SGD)(model.parameters(), lr=0.1)
    with pytest.raises(OptionError, match=r"weight is sharded .* Use grass_fx.AdamW"):
        optimizer.step()
    with pytest.raises(OptionError, match="Call explain before fully_shard"):
        grass_fx.explain(model, batch(0))
    with pytest.raises(DistributedError, match="is a DTensor already"):
        fully_shard(model)
    torch._dynamo.reset()
    model = Model()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    backend = Captured(rank=8)
    loss_of(torch.compile(model, backend=backend), batch(0)).backward()
    reasons = backend.only.found.left
    assert "fully_shard has not made" in reasons["up.weight"] == reasons["down.weight"]
    assert isinstance(model.head.weight.grad, grass_fx.CompactGrad)


def two(rank, folder):
    run(rank, folder)
    resume(rank, folder)
    for reshard in (True, False):
        count(rank, reshard)
    refuse(rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process trains; then two do the same, save a checkpoint and go on."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    with one_process(folder, "first"):
        run(0, folder)
    spawn(two, 2, folder)
    return folder


@pytest.mark.slow
def test_one_process_resumes_what_two_saved(folder):
    with one_process(folder, "second"):
        resume(0, folder)
