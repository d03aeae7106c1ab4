"""A wrapped optimizer's steps: rows of several ages, new beside old, and whole or not at all."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import grass_fx
from grass_fx.errors import GrassWarning
from grass_fx.optim.rowwise import cohorts_of, cut, joined
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.history import _bins
from grass_fx.state.registry import registry
from helpers import Captured, mlp


def train(compiled, optimizer, steps, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(7, 8, generator=gen, dtype=torch.float64)
        optimizer.zero_grad()
        (compiled(x) - x).square().mean().backward()
        optimizer.step()


def model_of(make, bias=True, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mlp(8, 8, 8, bias=bias).double()
    return model, torch.compile(model, backend=Captured(**options)), make(model.parameters())


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Tallying(torch.optim.Optimizer):
    """Counts in numbers of Python's, of which rows of different ages make lists."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.sub_(p.grad, alpha=group["lr"] / state["step"])


@pytest.mark.parametrize("wrapped", [torch.optim.AdamW, Tallying])
def test_a_step_takes_as_many_operations_however_many_rows_there_are(wrapped):
    taken = {}
    for rank in (8, 64, 1024):
        torch._dynamo.reset()
        _bins.cache_clear()  # of the records that reports are made of
        model = nn.Linear(2 * rank, 4)  # half of the rows stay, half of those the next time, ...
        options = {"rank": rank, "refresh_every": 2, "selection": "uniform"}
        compiled = torch.compile(model, backend=Captured(**options))
        optimizer = grass_fx.subspace(wrapped)(model.parameters(), lr=1e-3, warmup_steps=2)
        for step in range(7):
            optimizer.zero_grad()
            compiled(torch.ones(2, 2 * rank)).sum().backward()
            with Calls() as calls:
                optimizer.step()
            ages = len(optimizer.state[model.weight]["age"].unique())
            taken[rank, step] = ages, calls.count
    for step in range(7):
        assert taken[64, step] == taken[1024, step]  # the first rank is the one at which X is tried
        ages, count = taken[64, step]
        assert ages == 1 + step // 2 and count <= 80 + 25 * ages


def test_state_comes_apart_by_age_and_together_again():
    age = torch.tensor([3, 0, 7, 3, 7])
    cohorts = cohorts_of(age)
    assert cohorts.ages == (0, 3, 7) and cohorts.firsts == (1, 0, 2)
    shape = torch.Size([4, 5])
    moment, steps = torch.randn(shape), age.float()
    tally = age.tolist()
    state = {"m": moment, "step": torch.tensor(7.0), "per_row_step": steps, "tally": 7,
             "per_row_tally": tally, "nothing": None}  # fmt: skip
    young, *others = cut(state, cohorts, shape, 1)
    assert young == {}
    assert [each["step"].item() for each in others] == [3, 7]
    assert [each["tally"] for each in others] == [3, 7]
    torch.testing.assert_close(others[0]["m"], moment[:, [0, 3]])
    young = {"m": moment[:, [1]], "step": torch.tensor(0.0), "tally": 0, "nothing": None}
    together = joined([young, *others], cohorts, shape, 1)
    assert together.pop("per_row_tally") == state.pop("per_row_tally")
    torch.testing.assert_close(together, state)
    # One of them makes an entry that the others do not have: there is no telling what it means.
    others[0]["late"] = 1
    assert joined([young, *others], cohorts, shape, 1) == {}


def test_rows_of_one_age_that_had_several_have_their_own_counts():
    """All copies may be of a young row, and older ones gone."""
    age = torch.tensor([2, 2, 2])
    state = {"step": torch.tensor(8.0), "per_row_step": torch.tensor([2.0, 2.0, 2.0]), "tally": 8,
             "per_row_tally": [2, 2, 2]}  # fmt: skip
    [mine] = cut(state, cohorts_of(age), torch.Size([3, 4]), 0)
    assert mine == {"step": torch.tensor(2.0), "tally": 2}


@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
def test_fused_sgd_steps_new_rows_beside_old_ones(on_refresh):
    """torch's takes momentum either for all parameters or for none."""
    trained = []
    for fused in (True, None):

        def make(params, fused=fused):
            settings = {"momentum": 0.9, "dampening": 0.2, "nesterov": False, "fused": fused}
            return grass_fx.subspace(torch.optim.SGD)(
                params, lr=0.05, on_refresh=on_refresh, **settings
            )

        model, compiled, optimizer = model_of(make, rank=3, refresh_every=2)
        train(compiled, optimizer, 7)
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-11, atol=1e-13)


class Uniform(torch.optim.Optimizer):
    """Takes no parameters with state beside such without, and counts in its group."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            moments = [self.state[p].get("m") for p in group["params"]]
            assert all(m is None for m in moments) or all(m is not None for m in moments)
            group["k"] += 1
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(m.lerp_(p.grad, 0.1), alpha=group["lr"])


def test_steps_in_two_parts_count_once():
    def make(params):
        return grass_fx.subspace(Uniform)(params, on_refresh="reset")

    model, compiled, optimizer = model_of(make, rank=3, refresh_every=2)
    train(compiled, optimizer, 5)
    assert optimizer.param_groups[0]["k"] == 5
    assert optimizer.state[model[0].weight]["age"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("wrapped", [torch.optim.Adafactor, torch.optim.AdamW, torch.optim.SGD])
def test_a_selection_that_does_not_change_is_no_refresh(wrapped):
    """A reset at each refresh is what one asks for by on_refresh="reset"."""
    trained = []
    for refresh_every in (2, math.inf):

        def make(params):
            return grass_fx.subspace(wrapped)(params, lr=0.05)

        model, compiled, optimizer = model_of(make, rank=8, refresh_every=refresh_every)
        train(compiled, optimizer, 6)
        assert isinstance(model[0].weight.grad, CompactGrad)
        assert optimizer.state[model[0].weight]["age"].tolist() == [6] * 8
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained, rtol=0, atol=0)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_a_reset_starts_rows_anew_that_are_selected_again(make):
    def made(params):
        return make(params, lr=0.05, on_refresh="reset")

    model, compiled, optimizer = model_of(made, rank=8, refresh_every=2)
    train(compiled, optimizer, 6)
    assert optimizer.state[model[0].weight]["age"].tolist() == [2] * 8


@pytest.mark.parametrize("post", [False, True])
def test_hooks_may_put_anything_into_the_state(post):
    model, compiled, optimizer = model_of(grass_fx.subspace(torch.optim.AdamW), rank=3)
    train(compiled, optimizer, 2)
    if post:
        optimizer.register_load_state_dict_post_hook(lambda o: o.state.update(note=True))
    else:
        optimizer.state["note"] = True
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["note"] is True
    train(compiled, optimizer, 2)
    assert optimizer.state["note"] is True
    assert optimizer.state[model[0].weight]["age"].tolist() == [4, 4, 4]
    assert copy.deepcopy((model, optimizer))[1].state["note"] is True


class Fails(torch.optim.AdamW):
    """Steps all parameters, or has moved some moments, and then fails."""

    fail = None

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail == "before the weights move":
            for state in self.state.values():
                state["exp_avg"].add_(1)
                state["step"].add_(1)
            self.param_groups[0]["lr"] = 7.0
            raise torch.OutOfMemoryError("simulated")
        super().step()
        if self.fail == "at the end":
            self.steps = 1
            raise torch.OutOfMemoryError("simulated")


@pytest.mark.parametrize("fail", ["before the weights move", "at the end"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_step_in_which_the_wrapped_class_fails_moves_no_taken_weight(fail, at):
    """Also right after a refresh; and its options and attributes are as before."""
    options = {"rank": 5, "refresh_every": 2, "selection": "uniform", "bias": False}
    model, compiled, optimizer = model_of(grass_fx.subspace(Fails), **options)
    train(compiled, optimizer, at)
    weights, groups = copy.deepcopy(model.state_dict()), optimizer.param_groups
    groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    optimizer.fail = fail
    failed = pytest.warns(GrassWarning, match="no taken weight has moved")
    with failed, pytest.raises(torch.OutOfMemoryError):
        train(compiled, optimizer, 1, seed=1)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert optimizer.fail and not hasattr(optimizer, "steps")
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == before
    assert set(optimizer.state) <= set(model.parameters())
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [at, at]
    optimizer.fail = None
    optimizer.step()
    train(compiled, optimizer, 4, seed=2)
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [at + 5, at + 5]


def test_what_is_prepared_has_moved_nothing_and_may_be_prepared_again():
    options = {"rank": 5, "refresh_every": 2, "selection": "uniform"}
    trained = []
    for times in (0, 2):
        model, compiled, optimizer = model_of(grass_fx.subspace(torch.optim.AdamW), **options)
        train(compiled, optimizer, 2)
        optimizer.zero_grad()
        compiled(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
        before = copy.deepcopy(model.state_dict())
        dense = copy.deepcopy(optimizer.state[model[0].bias])
        for _ in range(times):
            optimizer._prepare(optimizer._plan(optimizer._parameters()))
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            torch.testing.assert_close(optimizer.state[model[0].bias], dense, rtol=0, atol=0)
        optimizer.step()
        trained.append((model.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_what_an_optimizer_knows_beside_its_state_is_kept():
    """Attributes, methods it holds by name, options of groups."""

    class Busy(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr=lr)
            self.steps, self.update = 0, self._update

        def _update(self, p, lr):
            assert any(p is q for g in self.param_groups for q in g["params"])
            p.sub_(p.grad, alpha=lr)

        @torch.no_grad()
        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                group["seen"] = group.get("seen", 0) + len(group["params"])
                for p in group["params"]:
                    self.update(p, group["lr"])

    model, compiled, optimizer = model_of(grass_fx.subspace(Busy), rank=3)
    before = copy.deepcopy(model)
    train(compiled, optimizer, 2)
    assert optimizer.steps == 2 and optimizer.param_groups[0]["seen"] == 8
    assert not torch.equal(model[0].weight, before[0].weight)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, model.parameters()))
