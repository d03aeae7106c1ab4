"""State dicts of other optimizers: converted, or refused before anything has changed."""

import copy
import io
import re

import pytest
import torch
from loading import Stack, WrappedAdamW, begin, refused, same, train
from torch.optim.optimizer import register_optimizer_step_pre_hook

import grass_fx
from grass_fx.errors import OptionError, StateError
from helpers import Captured, mlp

KINDS = {
    "AdamW": grass_fx.AdamW,
    "S(AdamW)": WrappedAdamW,
    "S(Adam, amsgrad)": lambda p, lr: grass_fx.subspace(torch.optim.Adam)(p, lr, amsgrad=True),
    "S(SGD)": grass_fx.subspace(torch.optim.SGD),
    "S(SGD, momentum)": lambda p, lr: grass_fx.subspace(torch.optim.SGD)(p, lr, momentum=0.9),
    "S(Adafactor)": grass_fx.subspace(torch.optim.Adafactor),
    "S(NAdam)": grass_fx.subspace(torch.optim.NAdam),
    "torch.AdamW": torch.optim.AdamW,
    "torch.SGD, momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
}


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["to wrapped", "from wrapped"])
@pytest.mark.parametrize(
    ("what", "options", "steps"),
    [("mlp", {}, 0), ("mlp", {}, 1), ("mlp", {"selection": "uniform", "replacement": True}, 0),
     ("stack", {}, 0)],
    ids=["cyclic", "after a step", "replacement", "stack"],
)  # fmt: skip
def test_adamw_and_the_wrapped_one_go_on_from_each_other(what, options, steps, there):
    def settled(make):
        return lambda p, lr: make(p, lr, weight_decay=0.1, warmup_steps=0, eps=1e-3, scale=0.7)

    def fresh():
        return (Stack() if what == "stack" else mlp(8, 12, 6)).double()

    kinds = [settled(grass_fx.AdamW), settled(WrappedAdamW)]
    source, target = kinds if there else kinds[::-1]
    model, compiled, optimizer = begin(source, model=fresh(), **options)
    train(model, compiled, optimizer, 5)
    ages = {len(s["age"].unique()) for s in optimizer.state.values() if "age" in s}
    assert what == "stack" or options or 2 in ages  # rows that came in at different times
    torch.save((model.state_dict(), optimizer.state_dict()), buffer := io.BytesIO())
    train(model, compiled, optimizer, 7, seed=1)  # over two refreshes
    buffer.seek(0)
    weights, saved = torch.load(buffer, weights_only=True)
    kept = copy.deepcopy(saved)
    again, compiled, second = begin(target, model=fresh(), **options)
    train(again, compiled, second, steps, seed=2)
    again.load_state_dict(weights)
    second.load_state_dict(saved)
    assert same(saved, kept)
    train(again, compiled, second, 7, seed=1)
    for got, want in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        assert same(optimizer.state[want].get("age"), second.state[got].get("age"))


def test_a_converted_state_is_one_that_the_class_itself_would_have_saved():
    saved = []
    for make in (grass_fx.AdamW, WrappedAdamW):
        torch.manual_seed(0)
        model, compiled, optimizer = begin(make, torch.float64)
        train(model, compiled, optimizer, 5)
        saved.append((optimizer.state_dict(), model))
    for (theirs, _), (own, _), make in (
        (saved[0], saved[1], WrappedAdamW),
        (saved[1], saved[0], grass_fx.AdamW),
    ):
        _, _, optimizer = begin(make, torch.float64)
        optimizer.load_state_dict(theirs)
        got = optimizer.state_dict()["state"]
        for key, state in own["state"].items():
            assert got[key].keys() == state.keys()
            for name, value in state.items():
                torch.testing.assert_close(got[key][name], value)


def test_steps_that_are_not_the_ages_are_not_converted():
    model, compiled, optimizer = begin(WrappedAdamW)
    train(model, compiled, optimizer, 2)
    saved = optimizer.state_dict()
    saved["state"][0]["per_row_step"] = saved["state"][0]["per_row_step"] + 1
    refused(*begin()[::2], saved, "parameter 0: .* it holds exp_avg, exp_avg_sq, step, and AdamW")


@pytest.mark.filterwarnings("ignore:no compact gradient")
@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
def test_dense_parameters_go_on_from_a_checkpoint_of_torchs_adamw(make):
    model = mlp(8, 12, 6)
    before = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, None, before, 3)
    twin = copy.deepcopy(model)
    saved = copy.deepcopy(before.state_dict())
    train(model, None, before, 3, seed=1)
    optimizer = make(twin.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved)
    train(twin, twin, optimizer, 3, seed=1)
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.fixture(scope="module")
def states():
    """A state dict of each kind after some steps."""
    made = {}
    for name, make in KINDS.items():
        model, compiled, optimizer = begin(make)
        train(model, compiled, optimizer, 4)
        made[name] = copy.deepcopy(optimizer.state_dict())
    return made


ALIKE = {
    ("AdamW", "S(AdamW)"),
    ("S(AdamW)", "AdamW"),
    ("torch.AdamW", "AdamW"),
    ("torch.AdamW", "S(AdamW)"),
    ("torch.SGD, momentum", "S(SGD, momentum)"),
    # With the groups come the options, and with them amsgrad and momentum.
    ("S(SGD)", "S(SGD, momentum)"),
    ("S(SGD, momentum)", "S(SGD)"),
    ("torch.SGD, momentum", "S(SGD)"),
    ("AdamW", "S(Adam, amsgrad)"),
    ("S(AdamW)", "S(Adam, amsgrad)"),
    ("torch.AdamW", "S(Adam, amsgrad)"),
    ("S(Adam, amsgrad)", "S(AdamW)"),
}


@pytest.mark.filterwarnings("ignore:.*has trained dense until now")
@pytest.mark.parametrize("target", [kind for kind in KINDS if "torch" not in kind])
def test_a_state_of_another_class_loads_only_if_its_entries_are_those_of_this_one(states, target):
    model, compiled, optimizer = begin(KINDS[target])
    good = {source: source == target or (source, target) in ALIKE for source in states}
    for _ in ("not used yet", "stepped"):
        for source in [source for source, loads in good.items() if not loads]:
            if (source, target) == ("S(Adam, amsgrad)", "AdamW"):
                message, error = r"param_groups\[0\].*amsgrad=True", OptionError
            else:
                error, message = (
                    StateError,
                    (
                        r"(0\.weight|l__self___0_weight|parameter 0)\b.* the state is another "
                        rf"optimizer's: it holds [\w, ]+, and {optimizer._kind} keeps [\w, ]+\."
                    ),
                )
            refused(model, optimizer, states[source], message, error)
        train(model, compiled, optimizer, 1)
    for source in [source for source, loads in good.items() if loads]:
        optimizer.load_state_dict(states[source])
        train(model, compiled, optimizer, 1)


class Late(torch.optim.SGD):
    """Keeps slow weights from its fifth step on."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                if state["count"] >= 5:
                    state["slow"] = p.detach().clone()


class Sized(torch.optim.SGD):
    """Keeps one number for each 16 of a large parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel() >= 32:
                    self.state[p]["blocks"] = torch.ones(p.numel() // 16)
                else:
                    self.state[p]["whole"] = torch.ones_like(p)
        return super().step(closure)


@pytest.mark.parametrize("wrapped", [Late, Sized])
def test_entries_that_come_late_or_hang_on_the_size_are_known(wrapped):
    make = grass_fx.subspace(wrapped)
    model, compiled, optimizer = begin(lambda p, lr: make(p, lr, momentum=0.9), refresh_every=99)
    for steps in (2, 4):
        train(model, compiled, optimizer, steps)
        saved = optimizer.state_dict()
        again, compiled_again, second = begin(lambda p, lr: make(p, lr, momentum=0.9))
        second.load_state_dict(saved)
        train(again, compiled_again, second, 1)
        torch._dynamo.reset()
    saved["state"][0] = {**saved["state"][0], "exp_avg": torch.zeros(12, 6)}
    refused(*begin(lambda p, lr: make(p, lr, momentum=0.9))[::2], saved, "it holds .*exp_avg")


def test_an_entry_of_an_option_that_was_switched_off_is_kept_as_torch_does():
    make = KINDS["S(SGD, momentum)"]
    model, compiled, optimizer = begin(make)
    train(model, compiled, optimizer, 2)
    optimizer.param_groups[0]["momentum"] = 0.0
    again, compiled, second = begin(make)
    second.load_state_dict(optimizer.state_dict())
    train(again, compiled, second, 1)


@pytest.mark.slow
def test_quantised_moments_are_no_moments_of_adamw():
    torchao = pytest.importorskip("torchao.optim")
    kind = grass_fx.subspace(torchao.AdamW8bit)
    saved, targets = None, []
    for make in (kind, kind, grass_fx.AdamW, WrappedAdamW):
        torch._dynamo.reset()
        model = mlp(64, 128, 6)
        compiled = torch.compile(model, backend=Captured(rank=64, include=["0.weight"]))
        targets.append((model, make(model.parameters(), lr=1e-2)))
        if saved is None:
            gen = torch.Generator().manual_seed(0)
            compiled(torch.randn(7, 64, generator=gen)).square().mean().backward()
            targets[0][1].step()
            saved = targets[0][1].state_dict()
    assert type(saved["state"][0]["exp_avg"]) is not torch.Tensor
    targets[1][1].load_state_dict(saved)
    for _, optimizer in targets[2:]:
        before = optimizer.state_dict()
        with pytest.raises(StateError, match="parameter 0 .* exp_avg is of OptimState8bit"):
            optimizer.load_state_dict(saved)
        assert same(optimizer.state_dict(), before) and not optimizer.state


def test_asking_a_class_what_it_keeps_runs_no_hooks_and_draws_no_random_numbers(states):
    calls = []
    hook = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    before = torch.get_rng_state()
    begin(WrappedAdamW)  # which draws the weights
    torch.set_rng_state(before)
    _, _, optimizer = begin(WrappedAdamW)
    before = torch.get_rng_state()
    optimizer.load_state_dict(states["S(AdamW)"])
    hook.remove()
    assert not calls and torch.equal(torch.get_rng_state(), before)


def test_the_message_names_the_parameter_by_its_name():
    model = mlp(8, 12, 6)
    saved = grass_fx.subspace(torch.optim.SGD)(model.named_parameters(), 0.1, momentum=0.9)
    train(model, torch.compile(model, backend=Captured(rank=6)), saved, 1)
    second = grass_fx.AdamW(mlp(8, 12, 6).named_parameters())
    with pytest.raises(StateError, match=re.escape(
        "0.weight: the state is another optimizer's: it holds momentum_buffer, and AdamW "
        "keeps exp_avg, exp_avg_sq. Load it into"
    )):  # fmt: skip
        second.load_state_dict(saved.state_dict())
