"""The checks that torch makes of its own optimizers: see test_torchs_optimizer_tests.py."""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import grass_fx
from grass_fx.state.gradient import CompactGrad
from optimizer_database import ADDED_LATER

OPTIONS = {"rank": 4, "refresh_every": 2, "selection": "uniform", "compiler": "aot_eager"}
OURS = "grass_fx.AdamW"


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up = nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 6, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def loss_of(model, x):
    return (model(x) - x[:, :6]).square().mean()


compiled_loss = torch.compile(loss_of, backend="grass", options=OPTIONS)


@dataclass
class Case:
    """An optimizer class with options, and what it trains: "torch", "dense" or "compact"."""

    name: str
    options: dict[str, Any]
    kind: str

    def model(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Net(bias=self.name != "Muon")  # which takes matrices alone

    def optimizer(self, params, **changes):
        if isinstance(params, nn.Module):
            params = params.parameters()
        options = {**copy.deepcopy(self.options), **changes}
        if self.name == OURS and self.kind != "torch":
            return grass_fx.AdamW(params, **options)
        wrapped = getattr(torch.optim, "AdamW" if self.name == OURS else self.name)
        return (wrapped if self.kind == "torch" else grass_fx.subspace(wrapped))(params, **options)

    def both(self, **changes):
        model = self.model()
        return model, self.optimizer(model, **changes)

    def backward(self, model, x):
        """Gradients of a batch, or of that which a seed makes; returns the loss."""
        if not isinstance(x, torch.Tensor):
            x = torch.randn(10, 8, generator=torch.Generator().manual_seed(x))
        loss = (compiled_loss if self.kind == "compact" else loss_of)(model, x)
        loss.backward()
        compact = isinstance(model.up.weight.grad, CompactGrad)
        assert compact == (self.kind == "compact")
        return loss.item()

    def train(self, model, optimizer, steps=3, seed=0):
        for k in range(steps):
            optimizer.zero_grad()
            self.backward(model, seed + k)
            optimizer.step()

    @property
    def group(self):
        """Options by which a test may tell groups apart: their names and values."""
        return {"lr": 0.5} if self.name == "Rprop" else {"lr": 0.5, "weight_decay": 0.0}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(got, want):
    """To the last bit, tensors in whatever they are in."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for k, value in want.items():
            assert_same(got[k], value)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    else:
        assert type(got) is type(want) and got == want


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# --- steps ----------------------------------------------------------------------------------------


@check
def it_goes_in_the_right_direction(case):
    """Under schedulers, one of which looks at the loss."""
    sign = -1 if case.options.get("maximize") else 1
    x = torch.ones(10, 8) / 2
    for by_loss in (False, True):
        model, optimizer = case.both()
        scheduler = (
            lr_scheduler.ReduceLROnPlateau(optimizer)
            if by_loss
            else lr_scheduler.StepLR(optimizer, step_size=3)
        )
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            losses.append(case.backward(model, x))
            optimizer.step()
            scheduler.step(*losses[-1:] if by_loss else [])
        assert sign * (losses[-1] - losses[0]) < 0


@check
def a_rate_as_a_tensor_is_the_rate(case):
    if case.options.get("foreach"):
        return  # torch refuses it
    finals = []
    for lr in (1e-2, torch.tensor(1e-2)):
        model, optimizer = case.both(lr=lr)
        case.train(model, optimizer)
        finals.append(weights(model))
    torch.testing.assert_close(*finals)


@check
def implementations_are_alike(case):
    """Also where the state of weights starts anew at a refresh, and that of biases does not."""
    if "foreach" not in case.options and "fused" not in case.options:
        return
    for own in (
        ({"on_refresh": "carry"}, {"on_refresh": "reset"}) if case.kind != "torch" else ({},)
    ):
        finals = []
        for way in ({}, {k: None for k in ("foreach", "fused") if k in case.options}):
            model, optimizer = case.both(**way, **own)
            case.train(model, optimizer, 5)
            finals.append(weights(model))
        torch.testing.assert_close(*finals)


@check
def groups_have_their_own_options(case):
    """Not a hair's breadth at a rate of almost zero, next to a group that moves."""
    model, still = case.model(), nn.Parameter(torch.ones(3, 2))
    low = {"lr": 1e-28}
    if case.name == "Rprop":
        low["step_sizes"] = (0, 50)
    optimizer = case.optimizer([{"params": [*model.parameters()]}, {"params": [still], **low}])
    before = weights(model)
    for k in range(4):
        optimizer.zero_grad()
        case.backward(model, k)
        still.grad = torch.rand_like(still)
        optimizer.step()
    assert_same(still.detach(), torch.ones(3, 2))
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@check
def without_gradients_a_step_does_nothing(case):
    model, optimizer = case.both()
    before = weights(model)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1
    assert_same(weights(model), before)
    case.train(model, optimizer)
    before = weights(model)
    for to_none in (True, False):
        optimizer.zero_grad(set_to_none=to_none)
        for p in model.parameters():
            grad = p.grad.compact if isinstance(p.grad, CompactGrad) else p.grad
            assert grad is None if to_none else not grad.any()
        if to_none:
            optimizer.step()
            assert_same(weights(model), before)
            case.backward(model, 9)


@check
def zeros_as_gradients_move_nothing(case):
    changes = {} if case.name == "Rprop" else {"weight_decay": 0.0}
    if case.name == "ASGD":
        changes["lambd"] = 0.0  # a decay of its own
    model, optimizer = case.both(**changes)
    before = weights(model)
    case.backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_same(weights(model), before)


@check
def some_parameters_may_lack_a_gradient(case):
    model, optimizer = case.both()
    case.train(model, optimizer, 2)
    optimizer.zero_grad()
    case.backward(model, 2)
    model.up.weight.grad = None
    before = weights(model)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)]
    assert moved == [p is not model.up.weight for p in model.parameters()]
    case.train(model, optimizer, 2)


@check
def it_can_be_printed(case):
    model, optimizer = case.both()
    assert type(optimizer).__name__ in repr(optimizer) and "lr: " in repr(optimizer)


@check
def what_trains_dense_steps_as_torchs_to_the_last_bit(case):
    """Beside taken weights too: strided, empty, scalar and complex parameters."""
    finals = []
    for each in (case, Case(case.name, case.options, "torch")):
        model = each.model()
        beside = [torch.ones(4, 6)[:, ::2], torch.ones(0, 3), torch.full((2, 3), 1 + 2j)]
        if case.name != "Muon":  # which takes matrices alone
            beside.append(torch.tensor(2.0))
        if case.name in ("Adafactor", "Muon") or case.options.get("fused"):
            del beside[2]  # they refuse complex ones
        if case.name == "Adafactor":
            del beside[1]  # its means are over all elements
        beside = [nn.Parameter(t) for t in beside]
        optimizer = each.optimizer([*model.parameters(), *beside])
        for k in range(3):
            optimizer.zero_grad()
            each.backward(model, k)
            for p in beside:
                p.grad = torch.ones_like(p) * (k + 1)
            optimizer.step()
        own = weights(model) if case.kind == "dense" else []
        finals.append([*own, *(p.detach() for p in beside)])
    assert_same(*finals)


@check
def gradients_may_be_sparse_where_torchs_may(case):
    """Of what trains dense: an embedding."""
    finals = []
    for kind in (case.kind, "torch"):
        each = Case(case.name, case.options, kind)
        table = nn.Embedding(7, 4, sparse=True)
        nn.init.ones_(table.weight)
        optimizer = each.optimizer(table)
        for k in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, k, k])).square().sum().backward()
            optimizer.step()
        finals.append(table.weight.detach())
    assert_same(*finals)


@check
def it_may_be_differentiated_where_torchs_may(case):
    """Parameters that are results of others, as in meta-learning."""
    if case.options.get("foreach") or case.options.get("fused") or case.name == OURS:
        return
    options = {k: v for k, v in case.options.items() if k not in ("foreach", "fused")}
    slopes = []
    for kind in (case.kind, "torch"):
        given = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
        p = given * 2
        p.grad = given * 3
        Case(case.name, options, kind).optimizer([p], differentiable=True).step()
        slopes.append(torch.autograd.grad(p.square().sum(), given)[0])
    torch.testing.assert_close(*slopes)


@check
def bad_input_is_the_error_that_it_is_for_torchs(case):
    p, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    wrong = [
        ((TypeError, "iterable of Tensors or dicts"), p, {}),
        ((ValueError, "more than one parameter group"), [{"params": p}, {"params": p}], {}),
        ((ValueError, "with/without names"), [("weight", p), other], {}),
        ((ValueError, None), [p], {"lr": -1.0}),
        ((ValueError, None), [p], {"lr": torch.tensor([0.1, 0.1])}),
        ((ValueError, None), [], {}),
    ]
    for (kind, words), params, options in wrong:
        with pytest.raises(kind, match=words):
            case.optimizer(params, **options)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case.optimizer([p, p])


# --- hooks ----------------------------------------------------------------------------------------


@check
def hooks_of_steps_run_once_a_step_and_in_order(case):
    """Global ones, the optimizer's own, and then no more."""
    model, optimizer = case.both()
    seen = []

    def note(what):
        return lambda one, args, kwargs: seen.append((what, one is optimizer))

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        case.train(model, optimizer)
    finally:
        for handle in handles:
            handle.remove()
    case.train(model, optimizer, 1)
    once = ["global before", "before", "after", "global after"]
    assert seen == [(what, True) for what in once] * 3


@check
def hooks_of_state_dict_see_and_change_it(case):
    model, optimizer = case.both()
    case.train(model, optimizer)
    optimizer.register_state_dict_pre_hook(lambda one: one.state.update(test=1))
    assert optimizer.state_dict()["state"]["test"] == 1

    def after(one, found):
        return {**found, "seen": found["state"].pop("test")}

    optimizer.register_state_dict_post_hook(after)
    found = optimizer.state_dict()
    assert found["seen"] == 1 and "test" not in found["state"]


@check
def hooks_of_load_state_dict_see_and_change_it(case):
    model, optimizer = case.both()
    case.train(model, optimizer)
    saved = optimizer.state_dict()

    def first(one, given):
        given["param_groups"][0]["lr"] = 0.002

    def second(one, given):
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] = 0.003
        return given

    optimizer.register_load_state_dict_pre_hook(first)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(second, prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the first one's came last
    optimizer.register_load_state_dict_post_hook(lambda one: one.state.update(loaded=True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state.pop("loaded") is True
    case.train(model, optimizer, 1)


# --- checkpoints and copies -----------------------------------------------------------------------


@check
def a_state_dict_goes_on_to_the_last_bit_and_is_not_used_up(case):
    """With parameters that have names, where it is saved or where it is loaded."""
    for named in ((True, False), (False, True)):
        model = case.model()
        whole = case.optimizer(model.named_parameters() if named[0] else model)
        case.train(model, whole)
        saved = copy.deepcopy(whole.state_dict())
        kept = copy.deepcopy(saved)
        twin = copy.deepcopy(model)
        again = case.optimizer(twin.named_parameters() if named[1] else twin)
        again.load_state_dict(saved)
        assert_same(without_names(again.state_dict()), without_names(kept))
        case.train(model, whole, seed=7)
        case.train(twin, again, seed=7)
        assert_same(weights(twin), weights(model))
        assert_same(without_names(again.state_dict()), without_names(whole.state_dict()))
        assert_same(saved, kept)
        given = [name for name, _ in model.named_parameters()]
        assert again.state_dict()["param_groups"][0]["param_names"] == given


def without_names(state_dict):
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@check
def saved_with_torch_it_is_the_same(case):
    model, optimizer = case.both()
    case.train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), optimizer.state_dict())


@check
def a_state_dict_of_an_older_torch_loads(case):
    """Its groups lack the arguments that came later; its counts may be numbers."""
    model, optimizer = case.both()
    case.train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for later in ADDED_LATER:
            group.pop(later, None)
    optimizer.load_state_dict(saved)
    case.train(model, optimizer, 1)


@check
def a_count_that_is_a_number_loads(case):
    model, optimizer = case.both()
    case.train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].item()
    twin = copy.deepcopy(model)
    again = case.optimizer(twin)
    again.load_state_dict(saved)
    case.train(model, optimizer, 3, seed=7)
    case.train(twin, again, 3, seed=7)
    assert_same(weights(twin), weights(model))


@check
def groups_load_with_their_differences_and_other_groups_do_not(case):
    def groups(model):
        return [{"params": [model.up.weight], **case.group}, {"params": [model.down.weight]}]

    model = case.model()
    optimizer = case.optimizer(groups(model))
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda k: 1 / (1 + k)])
    case.train(model, optimizer)
    scheduler.step()
    saved = optimizer.state_dict()
    twin = case.model()
    again = case.optimizer([{"params": [p]} for p in (twin.up.weight, twin.down.weight)])
    again.load_state_dict(saved)
    for got, want in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert_same({**got, "params": 0}, {**want, "params": 0})
    assert again.param_groups[0]["lr"] == 0.25 and "initial_lr" in again.param_groups[1]
    other = case.optimizer([twin.up.weight, twin.down.weight])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError):
        other.load_state_dict(saved)
    assert_same(other.state_dict(), before)


@check
def a_copy_has_all_attributes_and_goes_on_by_itself(case):
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, optimizer = case.both()
        case.train(model, optimizer)
        twin, again = duplicate((model, optimizer))
        public = [{k for k in vars(o) if k[0] != "_"} for o in (again, optimizer)]
        assert public[0] == public[1] and type(again) is type(optimizer)
        assert [*again.param_groups[0]["params"]] == [*twin.parameters()]
        before = weights(twin)
        case.train(model, optimizer, 3, seed=7)
        assert_same(weights(twin), before)
        case.train(twin, again, 3, seed=7)
        assert_same(weights(twin), weights(model))
