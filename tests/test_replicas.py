"""What real training does, with a model that two processes train together."""

import math

import pytest
import torch
import torch.distributed as dist
from test_data_parallel import EXACT, Model, batch, loss_of, options
from torch import nn

import grass_fx
from grass_fx.distributed import data_parallel
from grass_fx.errors import GrassWarning
from ranks import spawn

STEPS = 8


class Experts(nn.Module):
    """A stack of matrices."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 16, 8) / 4)

    def forward(self, x):
        return torch.bmm(torch.bmm(x, self.experts.transpose(1, 2)), self.experts)


def together():
    """Whether this is one of several processes."""
    return dist.is_initialized()


def part(whole):
    """This process's part of a batch."""
    return whole.chunk(dist.get_world_size())[dist.get_rank()] if together() else whole


def built(build=Model, dtype=torch.float64, **more):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build().to(dtype)
    if together():
        data_parallel(model)
    compiled = torch.compile(model, backend="grass", options=options(**more))
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)
    return model, compiled, optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def advance(compiled, optimizer, steps):
    for step in steps:
        loss_of(compiled, part(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_replacement():
    model, compiled, optimizer = built(selection="uniform", replacement=True)
    advance(compiled, optimizer, range(STEPS))
    return weights(model)


def blocks():
    model, compiled, optimizer = built(rank=8, block=4, selection="top", score_sync="gradient")
    advance(compiled, optimizer, range(STEPS))
    return weights(model)


def a_stack():
    model, compiled, optimizer = built(Experts)
    gen = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = part(torch.randn(8, 4, 6, 8, generator=gen, dtype=torch.float64))
        (compiled(x.transpose(0, 1).flatten(1, 2)) - 1).square().mean().backward()
        assert isinstance(model.experts.grad, grass_fx.CompactGrad)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def a_wrapped_optimizer_that_clips():
    model, compiled, _ = built()
    optimizer = grass_fx.subspace(torch.optim.SGD)(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        loss_of(compiled, part(batch(step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def a_loss_from_outside_the_graph():
    """A dense gradient of each process alone meets a compact one that is averaged already."""
    model, compiled, optimizer = built()
    with pytest.warns(GrassWarning, match="came dense"):
        for step in range(STEPS):
            optimizer.zero_grad()
            penalty = part(torch.arange(1.0, 9, dtype=torch.float64)).mean()
            loss = loss_of(compiled, part(batch(step)))
            (loss + penalty * model.up.weight.square().mean()).backward()
            optimizer.step()
    return weights(model)


def a_scaler_that_skips():
    """A gradient that is infinite on one process alone: no process takes the step."""
    model, compiled, optimizer = built(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    taken = []
    for step in range(STEPS):
        before = weights(model)
        loss = loss_of(compiled, part(batch(step)))
        bad = step == 3 and (not together() or dist.get_rank() == 1)
        scaler.scale(loss * math.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(
            any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        )
    assert taken == [step != 3 for step in range(STEPS)]
    return weights(model)


def scores_too_large_on_one_process():
    """A squared norm that is no float32 on one process: all keep their rows and score again."""
    model, compiled, optimizer = built(selection="top")
    chosen = []
    for step in range(STEPS):
        bad = step == 4 and (not together() or dist.get_rank() == 1)
        loss = loss_of(compiled, part(batch(step)))
        (loss * 1e30 if bad else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        indices = optimizer.state[model.up.weight]["indices"]
        chosen.append(indices.tolist())
    changes = [k for k in range(1, STEPS) if chosen[k] != chosen[k - 1]]
    assert 4 not in changes  # the period's end, whose scores are not finite
    if together():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, chosen)
        assert everyones[0] == everyones[1]


def explained():
    """A model that is averaged is explained as any other; its gradients are all-reduced compact."""
    report = grass_fx.explain(built()[0], batch(0), options=options())
    assert [w.name for w in report.weights if w.status == "pushed"] == ["up.weight", "down.weight"]
    up = report["up.weight"]
    assert "all_reduce" in {node.label for node in up.pictures["after"]}
    assert up.after.all_reduce == up.before.all_reduce // 4


def bfloat16():
    model, compiled, optimizer = built(dtype=torch.bfloat16)
    advance(compiled, optimizer, range(STEPS))
    for p in model.parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(p, first)
    return weights(model)


LIKE_ONE = [
    with_replacement,
    blocks,
    a_stack,
    a_wrapped_optimizer_that_clips,
    a_loss_from_outside_the_graph,
]


def several(rank, folder):
    for case in LIKE_ONE:
        for got, want in zip(case(), torch.load(f"{folder}/{case.__name__}.pt"), strict=True):
            torch.testing.assert_close(got, want, **EXACT, msg=lambda m, c=case: f"{c}: {m}")
    a_scaler_that_skips()
    scores_too_large_on_one_process()
    explained()
    bfloat16()


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path):
    for case in LIKE_ONE:
        torch.save(case(), tmp_path / f"{case.__name__}.pt")
    spawn(several, 2, str(tmp_path))


def save(rank, folder):
    model, compiled, optimizer = built(selection="top", score_sync="gradient")
    advance(compiled, optimizer, range(6))
    if rank == 0:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, f"{folder}/six.pt")
    advance(compiled, optimizer, range(6, 12))
    if rank == 0:
        torch.save(weights(model), f"{folder}/twelve.pt")


def resume(rank, folder):
    model, compiled, optimizer = built(selection="top", score_sync="gradient")
    states = torch.load(f"{folder}/six.pt")
    model.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    advance(compiled, optimizer, range(6, 12))
    for got, want in zip(model.parameters(), torch.load(f"{folder}/twelve.pt"), strict=True):
        torch.testing.assert_close(got.detach(), want, **EXACT)


@pytest.mark.slow
def test_one_process_resumes_what_two_saved(tmp_path):
    spawn(save, 2, str(tmp_path))
    resume(0, str(tmp_path))
