"""What a wrapped optimizer's state holds: moments, weights, counts; and methods that look at it."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import grass_fx
from grass_fx.errors import GrassWarning, OptionError
from grass_fx.ops import select
from grass_fx.optim import probe
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, mlp


class Averaging(torch.optim.Optimizer):
    """As schedule-free SGD: z and its average x, and weights between them while it trains."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "training": True})

    def _all(self):
        return [(g, p, self.state[p]) for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def eval(self):
        assert all(g["training"] for g in self.param_groups)
        for group, p, state in self._all():
            if "z" in state:
                p.lerp_(state["z"], 1 - 1 / group["beta"])
            group["training"] = False
        return "evaluating"

    @torch.no_grad()
    def train(self):
        for group, p, state in self._all():
            if "z" in state:
                p.lerp_(state["z"], 1 - group["beta"])
            group["training"] = True

    @torch.no_grad()
    def step(self, closure=None):
        assert all(g["training"] for g in self.param_groups)
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - share)))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Anchored(torch.optim.Optimizer):
    """Pulls weights to where they started, with or without a count in its state."""

    def __init__(self, params, lr=0.1, pull=0.1, counting=False):
        super().__init__(params, {"lr": lr, "pull": pull, "counting": counting})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "first" not in state:
                    state["first"] = p.clone()
                    if group["counting"]:
                        state["step"] = 0
                if group["counting"]:
                    state["step"] += 1
                p.lerp_(state["first"], group["pull"]).sub_(p.grad, alpha=group["lr"])


class Accumulating(torch.optim.Optimizer):
    """An accumulator that starts at one half, and no count."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("total", torch.full_like(p, 0.5))
                total.add_(p.grad.square())
                p.sub_(p.grad / total.sqrt(), alpha=group["lr"])


def batches(steps, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(7, 8, generator=gen, dtype=torch.float64)


def train(compiled, optimizer, steps, seed=0):
    for x in batches(steps, seed):
        optimizer.zero_grad()
        (compiled(x) - x).square().mean().backward()
        optimizer.step()


def model_of(make, bias=True, hidden=12, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mlp(8, hidden, 8, bias=bias).double()
    return model, torch.compile(model, backend=Captured(**options)), make(model.parameters())


def test_at_full_rank_averaging_is_averaging_with_its_methods():
    make = grass_fx.subspace(Averaging)

    def made(params):
        return make(params, warmup_steps=0)

    model, compiled, optimizer = model_of(made, hidden=8, rank=8, refresh_every=2)
    twin, _, plain = model_of(Averaging, hidden=8)
    for seed in range(2):
        for which, call, o in ((model, compiled, optimizer), (twin, twin, plain)):
            train(call, o, 3, seed)
            assert o.eval() == "evaluating"
            o.evaluated = [p.detach().clone() for p in which.parameters()]
            o.train()
        torch.testing.assert_close(optimizer.evaluated, plain.evaluated, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    assert isinstance(model[0].weight.grad, CompactGrad)
    assert optimizer.param_groups[0]["k"] == 6


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
def test_weights_do_not_jump_where_state_holds_weights(on_refresh, replacement):
    def make(params):
        return grass_fx.subspace(Averaging)(params, lr=1e-9, on_refresh=on_refresh)

    options = {"rank": 6, "refresh_every": 1, "selection": "uniform", "replacement": replacement}
    model, compiled, optimizer = model_of(make, **options)
    before = copy.deepcopy(model.state_dict())
    train(compiled, optimizer, 6)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-7)
    ages = optimizer.state[model[0].weight]["age"]
    assert on_refresh == "reset" or len(ages.unique()) > 1


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
def test_weights_among_the_state_start_from_the_weight_and_stay(counting, replacement):
    def make(params):
        return grass_fx.subspace(Anchored)(params, counting=counting, warmup_steps=0)

    options = {"rank": 5, "refresh_every": 2, "selection": "uniform", "replacement": replacement}
    model, compiled, optimizer = model_of(make, **options)
    weight = model[0].weight  # (12, 8), side "in"
    first, kept = {}, 0
    for _ in range(8):
        before = weight.detach().clone()
        train(compiled, optimizer, 1)
        state = optimizer.state[weight]
        rows = state["indices"].tolist()
        kept += sum(row in first for row in rows)
        first = {row: first.get(row, before[:, row]) for row in rows}
        # As the stand-in has it: times ρ.
        wanted = torch.stack([first[row] for row in rows], 1)
        wanted *= state.get("scale", torch.ones(5))
        torch.testing.assert_close(state["first"], wanted, rtol=1e-6, atol=1e-7)
    assert kept > 5 * 4  # after some refresh rows had stayed


def test_state_that_starts_elsewhere_starts_there_for_new_rows():
    make = grass_fx.subspace(Accumulating)
    model, compiled, optimizer = model_of(make, rank=5, refresh_every=2, selection="uniform")
    weight, sums = model[0].weight, {}
    for _ in range(6):
        train(compiled, optimizer, 1)
        squares = weight.grad.compact.square()
        rows = optimizer.state[weight]["indices"].tolist()
        sums = {r: sums.get(r, 0.5) + squares[:, k] for k, r in enumerate(rows)}
        wanted = torch.stack([sums[row] for row in rows], 1)
        torch.testing.assert_close(optimizer.state[weight]["total"], wanted)
    assert len(optimizer.state[weight]["age"].unique()) > 1


def test_weights_among_the_state_move_as_far_as_the_weight():
    """So an average of weights is one of weights that there have been, and α is kept to."""

    def make(params):
        return grass_fx.subspace(Averaging)(params, scale=0.5, warmup_steps=4)

    model, compiled, optimizer = model_of(make, rank=4, refresh_every=math.inf)
    weight = model[0].weight
    z = None
    for step in range(1, 6):
        before = weight.detach().clone()
        train(compiled, optimizer, 1, seed=step)
        rows = weight.grad.selection.indices
        z = before[:, rows] if z is None else z
        z = z - 0.1 * 0.5 * min(1, step / 4) * weight.grad.compact
        torch.testing.assert_close(optimizer.state[weight]["z"], z, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("replacement", [False, True])
def test_methods_that_swap_weights_swap_the_selected_rows(replacement):
    make = grass_fx.subspace(Averaging)
    options = {"rank": 3, "refresh_every": 3, "selection": "uniform", "replacement": replacement}
    model, compiled, optimizer = model_of(make, **options)
    weight = model[0].weight
    optimizer.eval()  # there is no state yet
    optimizer.train()
    train(compiled, optimizer, 3)  # the selection has just changed, the state has not yet
    before, state = copy.deepcopy(model), optimizer.state[weight]
    rows, z = state["indices"], state["z"].clone()
    optimizer.eval()
    others = torch.ones(8, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(weight[:, others], before[0].weight[:, others])
    y, scale = before[0].weight[:, rows], state.get("scale", torch.ones(3))
    torch.testing.assert_close(weight[:, rows], y.lerp(z / scale, 1 - 1 / 0.9), rtol=1e-6, atol=0)
    assert not torch.equal(weight[:, rows], y)
    # Resumed where it was saved, before anything has been compiled.
    resumed, _, again = model_of(make, **options)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for o, m in ((optimizer, model), (again, resumed)):
        o.train()
        torch.testing.assert_close(m.state_dict(), before.state_dict(), rtol=1e-6, atol=1e-9)
    train(compiled, optimizer, 2)


def test_a_method_that_fails_changes_nothing():
    class Failing(Averaging):
        def eval(self):
            super().eval()
            raise ZeroDivisionError

    model, compiled, optimizer = model_of(grass_fx.subspace(Failing), bias=False, rank=3)
    train(compiled, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(ZeroDivisionError):
        optimizer.eval()
    after = (model.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)
    assert after[1]["param_groups"] == before[1]["param_groups"]


def test_an_optimizer_that_holds_another_is_refused():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})
            self.fast = torch.optim.SGD(self.param_groups, lr=lr)

    with pytest.raises(OptionError, match=r"subspace\(Lookahead\).*its fast.*whole weights"):
        grass_fx.subspace(Lookahead)(nn.Linear(2, 2).parameters())


class Averaged(torch.optim.Optimizer):
    """Keeps an average that starts from zero, and its count in the group or for each parameter."""

    def __init__(self, params, lr=0.1, each=False):
        super().__init__(params, {"lr": lr, "each": each, "step": 0})
        self.state["total"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.state["total"] += 1
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state = self.state[p]
                if group["each"]:
                    state["step"] = state.get("step", 0) + 1
                p.sub_(p.grad, alpha=group["lr"])
                state.setdefault("average", torch.zeros_like(p)).lerp_(p, 0.1)


def test_averages_that_a_group_counts_are_refused_before_anything_moves():
    make = grass_fx.subspace(Averaged)
    model, compiled, optimizer = model_of(make, rank=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=r"subspace\(Averaged\): its state entry average is an"):
        train(compiled, optimizer, 1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def counting(params):
        return make(params, each=True, warmup_steps=0)

    options = {"rank": 4, "refresh_every": 2, "selection": "uniform"}
    model, compiled, optimizer = model_of(counting, **options)
    train(compiled, optimizer, 7)
    state = optimizer.state[model[0].weight]
    assert optimizer.state["total"] == 7 and len(state["age"].unique()) > 1
    share = 1 - 0.9 ** state["age"].double()
    rows = model[0].weight.detach()[:, state["indices"]]
    torch.testing.assert_close(state["average"] / share, rows, rtol=0, atol=0.05)


def test_counts_of_a_group_that_correct_second_moments_are_told_once():
    class Group(torch.optim.Optimizer):
        def __init__(self, params, lr=0.01, step=0):
            super().__init__(params, {"lr": lr, "step": 0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] += 1
                for p in group["params"]:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.lerp_(p.grad.square(), 0.01)
                    corrected = v / (1 - 0.99 ** group["step"])
                    p.sub_(p.grad / corrected.sqrt().add(1e-8), alpha=group["lr"])

    _, compiled, optimizer = model_of(grass_fx.subspace(Group), rank=4, refresh_every=2)
    train(compiled, optimizer, 2)
    with pytest.warns(GrassWarning, match=r"subspace\(Group\) counts steps.*in its group's step"):
        train(compiled, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(compiled, optimizer, 3)


MOMENTS = {"exp_avg": ("zero", 1), "exp_avg_sq": ("zero", 2)}


@pytest.mark.parametrize(
    ("wrapped", "settings", "wanted"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer": ("zero", 1)}),
        (torch.optim.SGD, {"momentum": 0.0}, {}),
        (torch.optim.AdamW, {"amsgrad": True}, {**MOMENTS, "max_exp_avg_sq": ("zero", 2)}),
        (torch.optim.Adam, {"weight_decay": 0.5, "fused": True}, MOMENTS),
        (torch.optim.NAdam, {}, MOMENTS),
        # Its momentum is of steps, which do not grow with the gradient.
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True},
         {"square_avg": ("zero", 2), "grad_avg": ("zero", 1), "momentum_buffer": ("zero", 0)}),
        (torch.optim.Adadelta, {}, {"square_avg": ("zero", 2), "acc_delta": ("zero", 0)}),
        (torch.optim.Adagrad, {}, {"sum": ("zero", 2)}),
        (torch.optim.ASGD, {}, {"ax": ("weight", 1)}),
        (Averaging, {}, {"z": ("weight", 1)}),
        (Anchored, {}, {"first": ("weight", 1)}),
    ],
)  # fmt: skip
def test_what_entries_are_is_found_out(wrapped, settings, wanted):
    optimizer = grass_fx.subspace(wrapped)([nn.Parameter(torch.ones(2, 2))], **settings)
    found = optimizer._x.ask(probe.entries, optimizer.param_groups[0])
    assert {name: (entry.start, entry.power) for name, entry in found.items()} == wanted


def test_moments_follow_the_scale_by_what_they_are_not_by_their_name():
    """A row that stays has ρ′ for ρ: RMSprop's momentum does not change by that, Adam's does."""
    options = {"rank": 5, "refresh_every": 2, "selection": "multinomial_norm", "replacement": True}
    for wrapped, name, power in (
        (torch.optim.RMSprop, "momentum_buffer", 0),
        (torch.optim.SGD, "momentum_buffer", 1),
    ):

        def make(params, wrapped=wrapped):
            return grass_fx.subspace(wrapped)(params, lr=0.0, momentum=1.0)

        model, compiled, optimizer = model_of(make, **options)
        weight, stayed = model[0].weight, 0
        for seed in range(6):
            former = dict(optimizer.state.get(weight, {}))
            optimizer.zero_grad()
            compiled(next(batches(1, seed))).sum().backward()
            weight.grad.compact.zero_()  # nothing but the refresh changes a moment then
            if not former:
                weight.grad.compact.fill_(1.0)
            optimizer.step()
            state = optimizer.state[weight]
            if not former or torch.equal(former["indices"], state["indices"]):
                continue
            for k, row in enumerate(state["indices"].tolist()):
                for j in (former["indices"] == row).nonzero().flatten().tolist()[:1]:
                    ratio = (state["scale"][k] / former["scale"][j]) ** power
                    stayed += 1
                    wanted = former[name][:, j] * ratio
                    torch.testing.assert_close(state[name][:, k], wanted, check_dtype=False)
        assert stayed


class Doubly(torch.optim.RMSprop):
    """Calls a step around which torch has put its hooks."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("wrapped", [torch.optim.RMSprop, Doubly, Averaging])
def test_nobody_notices_what_is_tried_on_weights_of_one_number(wrapped):
    plain = wrapped([nn.Parameter(torch.ones(1))])  # from now on torch's hooks are in place
    make = grass_fx.subspace(wrapped)
    settings = {"weight_decay": 0.1, "momentum": 0.9} if wrapped is not Averaging else {}

    def made(params):
        return make(params, **settings)

    _, compiled, optimizer = model_of(made, rank=4, refresh_every=1, selection="uniform")
    calls = {"global": [], "own": []}
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls["global"].append(o)),
        register_optimizer_step_post_hook(lambda o, *_: calls["global"].append(o)),
    ]
    try:
        plain.param_groups[0]["params"][0].grad = torch.ones(1)
        plain.step()  # how often torch calls them by itself: a step of a base class is one more
        in_torch, calls["global"] = len(calls["global"]), []
        optimizer.register_step_pre_hook(lambda o, *_: calls["own"].append(o))
        numbers = torch.get_rng_state()
        make._known.clear()
        train(compiled, optimizer, 1)
        assert torch.equal(torch.get_rng_state(), numbers)
        assert make._known
    finally:
        for handle in handles:
            handle.remove()
    assert len(calls["global"]) == in_torch and calls["own"] == [optimizer]


def test_what_was_found_out_serves_the_next_optimizer_of_the_class():
    class Counting(torch.optim.SGD):
        made = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Counting.made += 1

    make = grass_fx.subspace(Counting)
    _, compiled, optimizer = model_of(
        lambda params: make(params, lr=0.1, momentum=0.9, weight_decay=0.1), rank=4
    )
    train(compiled, optimizer, 1)
    tried = Counting.made
    assert tried > 1
    _, compiled, optimizer = model_of(
        lambda params: make(params, lr=0.2, momentum=0.8, weight_decay=0.2), rank=4
    )
    train(compiled, optimizer, 1)
    assert Counting.made == tried + 1
    for group in optimizer.param_groups:
        group["lr"] = 0.3  # as a schedule does
    train(compiled, optimizer, 1)
    assert Counting.made == tried + 1


def test_stand_ins_are_what_select_makes():
    """The weight a method of X sees is PᵀW, scaled with replacement."""
    seen = []

    class Looking(torch.optim.SGD):
        def look(self):
            seen.extend(p.detach().clone() for g in self.param_groups for p in g["params"])

    options = {"rank": 3, "selection": "uniform", "replacement": True}
    model, compiled, optimizer = model_of(grass_fx.subspace(Looking), bias=False, **options)
    train(compiled, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    optimizer.look()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for p, got in zip(model.parameters(), seen, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(got, select(p.detach(), state["indices"], state["scale"], 1))
