"""The same promises on a real GPU: skipped where there is none."""

import copy

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.compile import lowering
from grass_fx.config import GrassConfig
from grass_fx.ops import MM_SIGNS, SELECTED_MM
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.gradient.votes import Votes
from grass_fx.state.transfers import STAGED, reading, send, to_device
from grass_fx.testing.reference import Reference
from helpers import mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize(
    ("b", "m", "n", "r"), [(512, 256, 384, 64), (1000, 264, 136, 72), (8192, 64, 64, 16)]
)
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_selected_products_are_those_of_float64(dtype, dim, block, b, m, n, r, mode):
    lowering.register()
    d, x = (torch.randn(b, k, device="cuda", dtype=dtype) for k in (m, n))
    units = torch.randperm((m, n)[dim] // block)[: r // block].sort().values
    indices = (units[:, None] * block + torch.arange(block)).flatten().cuda()
    scale = torch.rand(r, device="cuda") + 0.5
    run = torch.compile(lambda *args: SELECTED_MM(args[0].t(), *args[1:], dim, block), mode=mode)
    got = run(d, x, indices, scale).double()
    want = (d.double().t() @ x.double()).index_select(dim, indices)
    want = want * (scale.double()[:, None] if dim == 0 else scale.double())
    assert (got - want).norm() < TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize(("b", "m", "n"), [(512, 256, 384), (1000, 264, 136), (77, 40, 2048)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_signs_are_those_of_float64_where_these_are_clear(dtype, dim, b, m, n):
    lowering.register()
    d, x = (torch.randn(b, k, device="cuda", dtype=dtype) for k in (m, n))
    (d, x)[dim][:, 20] = 0  # a column of what is packed, all of which has no sign
    indices = torch.arange(0, (m, n)[dim], 4, device="cuda")
    run = torch.compile(lambda d, x: MM_SIGNS(d.t(), x, indices, None, dim))
    compact, bits = run(d, x)
    exact = d.double().t() @ x.double()
    assert (compact.double() - exact.index_select(dim, indices)).norm() < (
        TOLERANCE[dtype] * exact.norm()
    )
    exact = exact if dim == 1 else exact.t()
    votes = Votes((bits,))
    got = torch.cat([votes.majority(k, *exact.shape, torch.float64) for k in votes.parts(128)])
    clear = (exact.abs() > TOLERANCE[dtype] * exact.abs().max()) | (exact == 0)
    assert torch.equal(got[clear], exact[clear].sign()) and clear.float().mean() > 0.9


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_training_is_the_references_training(rule, block, mode):
    model = mlp(64, 128, 48).cuda()
    twin = copy.deepcopy(model).double()
    options = {"rank": 16, "refresh_every": 3, "selection": rule, "block": block, "side": "out"}
    compiled = torch.compile(model, backend="grass", options={**options, "mode": mode})
    settings = {"lr": 1e-3, "warmup_steps": 2}
    optimizer = grass_fx.AdamW(model.parameters(), **settings)
    taken = {name: 0 for name, p in model.named_parameters() if p.dim() == 2}
    reference = Reference(twin, taken, GrassConfig(**options), **settings)
    for _ in range(8):
        x, y = torch.randn(96, 64, device="cuda"), torch.randn(96, 48, device="cuda")
        optimizer.zero_grad()
        (compiled(x) - y).square().mean().backward()
        assert all(isinstance(p.grad, CompactGrad) for p in model.parameters() if p.dim() == 2)
        optimizer.step()
        reference.step([lambda m, x=x, y=y: (m(x.double()) - y.double()).square().mean()])
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_moves_between_devices_and_resumes():
    model = mlp(16, 32, 8).cuda()
    options = {"rank": 4, "refresh_every": 2}
    compiled = torch.compile(model, backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.named_parameters())
    x = torch.randn(24, 16, device="cuda")
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    saved = {
        k: {n: v.cpu() for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()
    }
    again = copy.deepcopy(model)
    second = grass_fx.AdamW(again.named_parameters())
    second.load_state_dict({**optimizer.state_dict(), "state": saved})
    states = [second.state[p] for p in again.parameters() if "generation" in second.state[p]]
    assert states and all(state["generation"].device.type == "cpu" for state in states)
    for net, stepper in ((model, optimizer), (again, second)):
        torch._dynamo.reset()
        stepper.zero_grad()
        torch.compile(net, backend="grass", options=options)(x).square().mean().backward()
        stepper.step()
    for got, want in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_a_step_waits_for_the_gpu_only_to_read_scores_and_then_once(rule, dtype):
    """With biases and a head that train dense, and in bfloat16 rounded stochastically."""
    model = mlp(64, 128, 128, 48).to("cuda", dtype)
    options = {"rank": 16, "refresh_every": 4, "selection": rule, "exclude": ["4*"]}
    compiled = torch.compile(model, backend="grass", options=options)
    rounds = dtype == torch.bfloat16
    optimizer = grass_fx.AdamW(model.parameters(), stochastic_rounding=rounds)
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(96, 64, device="cuda", dtype=dtype)
        compiled(x).square().mean().backward()
        scored = any(getattr(p.grad, "scores", None) is not None for p in model.parameters())
        cuda = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=cuda) as profiler:
            try:
                torch.cuda.set_sync_debug_mode("default" if scored or step < 5 else "error")
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        read = [event for event in profiler.events() if "DtoH" in event.name]
        assert len(read) == scored or step < 5  # until then state is made and code compiled


def test_a_step_that_reads_nothing_returns_while_the_gpu_is_busy():
    """Through refreshes of so many rows that their copies are too large for CUDA to take in."""
    model = nn.Sequential(*(nn.Linear(1536, 1536) for _ in range(8))).to("cuda", torch.bfloat16)
    compiled = torch.compile(model, backend="grass", options={"rank": 1152, "refresh_every": 2})
    optimizer = grass_fx.AdamW(model.parameters())
    x = torch.randn(64, 1536, device="cuda", dtype=torch.bfloat16)
    assert STAGED < 8 * 1152 * 8
    for step in range(10):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9 if step >= 6 else 1)  # until then code and buffers are made
        awake = torch.cuda.Event()
        awake.record()
        optimizer.step()
        assert not awake.query() or step < 6
        torch.cuda.synchronize()


@pytest.mark.parametrize("count", [1, 1000, 100_000])
def test_what_is_sent_may_go_at_once(count):
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda._sleep(10**8)
    sent = send(torch.arange(count), device)
    others = [torch.zeros(count, dtype=torch.int64).pin_memory() for _ in range(4)]
    assert torch.equal(sent.cpu(), torch.arange(count)) and not any(map(torch.any, others))


def test_many_tensors_travel_in_order():
    cpu = [torch.randn(k) for k in (3, 1, 7)]
    device = torch.device("cuda", torch.cuda.current_device())
    moved = to_device(cpu, device)
    assert all(each.device == device for each in moved)
    mixed = [moved[0], cpu[1], moved[2].view(7, 1)]
    for back, sent in zip(reading(mixed)(), cpu, strict=True):
        assert back.device.type == "cpu" and torch.equal(back, sent)
