"""Optimizer classes that cannot be wrapped: they keep or ask for what a subspace cannot give."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import grass_fx
from grass_fx.errors import OptionError, StateError
from helpers import Captured


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, which keeps its buffers where ``kept`` says."""

    kept = "state"
    given: Iterator[float] = iter(())

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "bufs": {}})
        self.buffers, self.by_id = {}, {}
        self.helper, self.rates = SimpleNamespace(buffers={}), self.given

    def buffer(self, group, p):
        zeros = torch.zeros_like(p)
        if self.kept == "attribute of the optimizer":
            return self.buffers.setdefault(p, zeros)
        if self.kept == "attribute of the optimizer by id":
            return self.by_id.setdefault(id(p), [zeros])[0]
        if self.kept == "an object":
            return self.helper.buffers.setdefault(p, zeros)
        if self.kept == "group":
            return group["bufs"].setdefault(len(group["bufs"]), zeros)
        if self.kept == "attribute of the parameter":
            p.momentum = getattr(p, "momentum", zeros)
            return p.momentum
        return self.state[p].setdefault("momentum", zeros)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(self.buffer(group, p).mul_(0.9).add_(p.grad), alpha=-group["lr"])


def begin(cls, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    compiled = torch.compile(model, backend=Captured(**{"rank": 4, "refresh_every": 2, **options}))
    return model, compiled, grass_fx.subspace(cls)(model.parameters(), warmup_steps=0)


@pytest.mark.parametrize(
    "kept",
    ["state", "attribute of the optimizer", "attribute of the optimizer by id", "group",
     "an object", "attribute of the parameter"],
)  # fmt: skip
def test_tensors_that_would_not_follow_a_weight_are_refused(kept):
    cls = type("Momentum", (Momentum,), {"kept": kept, "given": iter([0.1])})
    model, compiled, optimizer = begin(cls)
    before = model.weight.detach().clone()
    compiled(torch.ones(4, 8)).square().mean().backward()
    if kept == "state":
        optimizer.step()
        assert next(optimizer.given) == 0.1  # looked at, not used up
        assert not torch.equal(model.weight, before)
        return
    with pytest.raises(OptionError, match=r"subspace\(Momentum\).* outside of its state"):
        optimizer.step()
    assert torch.equal(model.weight, before)


class Twice(torch.optim.Optimizer):
    """Evaluates its closure at two points, or at one."""

    times = 2

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        loss = None
        for _ in range(self.times):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
        return loss


@pytest.mark.parametrize("times", [1, 2])
def test_a_closure_is_evaluated_once(times):
    model, compiled, optimizer = begin(type("Twice", (Twice,), {"times": times}), rank=8, seed=1)
    plain, calls = copy.deepcopy(model), []
    reference = type("Twice", (Twice,), {"times": times})(plain.parameters())

    def closure(module, optimizer):
        optimizer.zero_grad()
        calls.append(loss := module(torch.ones(4, 8)).square().mean())
        loss.backward()
        return loss

    if times == 2:
        before = model.weight.detach().clone()
        with pytest.raises(OptionError, match="evaluates the closure again"):
            optimizer.step(lambda: closure(compiled, optimizer))
        assert torch.equal(model.weight, before)
        return
    for _ in range(3):
        got = optimizer.step(lambda: closure(compiled, optimizer))
        want = reference.step(lambda: closure(plain, reference))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(model.weight, plain.weight)
    assert len(calls) == 6


DAMAGE = {
    "per_row_step is missing": lambda entry: entry.pop("per_row_step"),
    "per_row_step is None": lambda entry: entry.update(per_row_step=None),
    "generation is no number": lambda entry: entry.update(generation=torch.tensor(float("nan"))),
    "weight_shape is a number": lambda entry: entry.update(weight_shape=3),
    "one moment is double": lambda entry: entry.update(exp_avg_sq=entry["exp_avg_sq"].double()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_a_damaged_state_lacks_is_an_error_at_load(damage):
    model, compiled, optimizer = begin(torch.optim.AdamW)
    for _ in range(5):
        optimizer.zero_grad()
        compiled(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()
    assert len(state["state"][0]["age"].unique()) == 1 or "per_row_step" in state["state"][0]
    damaged = copy.deepcopy(state)
    entry = damaged["state"][0]
    entry["age"][0] += 1  # rows of two ages
    entry["per_row_step"] = entry["age"].float()
    DAMAGE[damage](entry)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(StateError, match="weight|parameter 0"):
        optimizer.load_state_dict(damaged)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"])
    optimizer.load_state_dict(state)


class OutOfMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails once, at the second moment of a bias."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.zeros_like.default and args[0].dim() == 1:
            self.seen += 1
            if self.seen == 2:
                raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:optimizer.step")
def test_a_dense_state_is_made_whole_or_not_at_all():
    runs = []
    for fails in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        compiled = torch.compile(model, backend=Captured(rank=4))
        optimizer = grass_fx.AdamW(model.parameters(), lr=0.01)
        compiled(torch.ones(4, 8)).square().mean().backward()
        if fails:
            with pytest.raises(torch.OutOfMemoryError), OutOfMemory():
                optimizer.step()
        optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
        assert all(len(state) >= 3 for state in optimizer.state.values())
    torch.testing.assert_close(*runs, rtol=0, atol=0)
