"""A load is whole or not at all: damaged state dicts, hooks that raise, numbers of old versions."""

import copy

import pytest
import torch
from loading import Stack, WrappedAdamW, begin, everything, refused, same, train

import grass_fx
from grass_fx.errors import GrassWarning, OptionError, StateError
from grass_fx.state.registry import registry
from helpers import Captured, mlp


def with_momentum(p, lr):
    return grass_fx.subspace(torch.optim.SGD)(p, lr, momentum=0.9)


# --- damage ---------------------------------------------------------------------------------------


def put(entry, place, value):
    def damage(state):
        state[entry][place] = value

    return damage


def change(entry, new):
    def damage(state):
        state[entry] = new(state[entry])

    return damage


DAMAGES = {  # of a compact state: what is done to it, and what the message says
    "out of range": (put("subspace_indices", -1, 10**6), "damaged: rows 0 to 1000000"),
    "negative row": (put("subspace_indices", 0, -3), "damaged: rows -3"),
    "unsorted": (change("subspace_indices", lambda t: t.flip(0)), "not in ascending order"),
    "repeated": (change("subspace_indices", lambda t: t[[0, 0, 2, 3, 4, 5]]), "selected twice"),
    "rows of floats": (change("subspace_indices", torch.Tensor.float), "no list of integers"),
    "no permutation": (put("subspace_order", 0, 1), "no permutation"),
    "order too short": (change("subspace_order", lambda t: t[:5]), "subspace_order has 5 units"),
    "order missing": (lambda s: s.pop("subspace_order"), "subspace_order is missing"),
    "counters missing": (lambda s: s.pop("subspace_counters"), "counters is missing"),
    "few counters": (change("subspace_counters", lambda t: t[:4]), "has 4 numbers"),
    "step": (put("subspace_counters", 0, -1), "step is -1"),
    "period": (put("subspace_counters", 1, -2), "period is -2"),
    "its generation": (put("subspace_counters", 2, -1), "generation is -1"),
    "position": (put("subspace_counters", 3, 13), "position is 13 in a permutation of 12"),
    "dim": (put("subspace_counters", 7, 5), "along dimension 5"),
    "parts": (put("subspace_counters", 9, 5), "12 rows in 5 parts"),
    "moments out of range": (put("indices", -1, 10**6), "state is damaged: rows 0 to 1000000"),
    "moments unsorted": (change("indices", lambda t: t.flip(0)), "not in ascending order"),
    "moments of fewer": (change("indices", lambda t: t[:4]), r"indices has shape \(4,\)"),
    "no age": (lambda s: s.pop("age"), "age is missing"),
    "negative age": (put("age", 0, -1), "an age is negative"),
    "other ages": (change("age", lambda t: t[:4]), r"age has shape \(4,\)"),
    "generation": (change("generation", lambda t: t - 99), "generation is negative"),
    "no generation": (lambda s: s.pop("generation"), "generation is missing"),
    "a scale": (lambda s: s.update(scale=torch.ones(6)), "scale is not of its selection"),
    "moment missing": (lambda s: s.pop("exp_avg_sq"), "it holds exp_avg.*, and AdamW keeps"),
    "moment too many": (lambda s: s.update(third=torch.zeros(1)), "holds .*third.*, and AdamW"),
    "moment's shape": (change("exp_avg", lambda t: t[:5]), r"exp_avg has shape \(5, 6\)"),
    "moment a list": (change("exp_avg", torch.Tensor.tolist), "exp_avg is a list"),
    "moment of integers": (change("exp_avg", torch.Tensor.long), "exp_avg is of torch.int64"),
}
OF_SCALES = {
    "not grouped": (lambda s: [s[e].copy_(torch.tensor([0, 2, 0, 1, 1, 1])) for e in
                               ("subspace_indices",)], "not in ascending order"),
    "infinite": (put("subspace_scale", 1, float("inf")), "scale is not finite"),
    "nan": (put("scale", 1, float("nan")), "scale is not finite"),
    "too few": (change("subspace_scale", lambda t: t[:2]), r"scale has the shape \(2,\)"),
    "missing": (lambda s: s.pop("scale"), "scale is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wholes():
    """Whole state dicts, without and with replacement."""
    made = []
    for options in ({}, {"selection": "uniform", "replacement": True}):
        for make in (grass_fx.AdamW, WrappedAdamW):
            model, compiled, optimizer = begin(make, **options)
            train(model, compiled, optimizer, 4)
            made.append(copy.deepcopy(optimizer.state_dict()))
    return made


@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
@pytest.mark.parametrize("scales", [False, True], ids=["", "replacement"])
def test_a_damaged_state_is_refused_at_load_and_nothing_changes(wholes, make, scales):
    """In the second weight, so that half of it would have been loaded."""
    options = {"selection": "uniform", "replacement": True} if scales else {}
    unused, trained = begin(make, **options), begin(make, **options)
    train(*trained, 2)
    waiting = begin(make, **options)
    waiting[2].load_state_dict(wholes[2 * scales + (make is WrappedAdamW)])
    for damage, message in (OF_SCALES if scales else DAMAGES).values():
        saved = copy.deepcopy(wholes[2 * scales + (make is WrappedAdamW)])
        damage(saved["state"][2])
        for model, _, optimizer in (unused, trained, waiting):
            refused(model, optimizer, saved, rf"(2\.weight|weight_1|parameter 2)\b.*{message}")
    train(*trained, 2)  # it goes on


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(exp_avg=[0.0] * 12), "exp_avg is a list"),
        (lambda s: s.update(exp_avg_sq=torch.zeros(5)), r"exp_avg_sq has shape \(5,\)"),
        (lambda s: s.update(step=-1.0), "step is -1.0"),
        (lambda s: s.update(step=torch.ones(3)), r"step is a tensor of shape \(3,\)"),
        (lambda s: s.update(step="many"), "step is a str"),
        (lambda s: s.pop("step"), "it holds exp_avg, exp_avg_sq, and AdamW keeps"),
    ],
)
@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
def test_a_damaged_state_of_a_dense_parameter_is_refused_at_load(wholes, make, damage, message):
    model, compiled, optimizer = begin(make)
    train(model, compiled, optimizer, 1)
    saved = copy.deepcopy(wholes[make is WrappedAdamW])
    damage(saved["state"][1])
    refused(model, optimizer, saved, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("step"), "per_row_step has no step"),
        (lambda s: s.update(per_row_step=s["per_row_step"][:2]), r"per_row_step has shape \(2,\)"),
        (lambda s: s["per_row_step"].neg_(), "per_row_step is negative"),
    ],
)
def test_damaged_counts_of_rows_are_refused_at_load(wholes, damage, message):
    model, _, optimizer = begin(WrappedAdamW)
    saved = copy.deepcopy(wholes[1])
    damage(saved["state"][2])
    refused(model, optimizer, saved, f"parameter 2.*(another optimizer's|{message})")


def test_of_a_stack_each_matrix_has_a_permutation_and_rows_of_its_own():
    model, compiled, optimizer = begin(model=Stack(), rank=4)
    train(model, compiled, optimizer, 2)
    place = [name for name, _ in model.named_parameters()].index("w")
    for entry in ("subspace_order", "subspace_indices", "indices"):
        saved = copy.deepcopy(optimizer.state_dict())
        value = saved["state"][place][entry]
        if entry == "subspace_order":  # units of the one in the other: a permutation of all
            value[0], value[-1] = value[-1].clone(), value[0].clone()
            if value[:12].unique().numel() == 12:
                value[0] = value[1]
        else:  # the first row of the second matrix in the first
            value[: value.numel() // 2 + 1] = torch.arange(9, 9 + value.numel() // 2 + 1)
        refused(model, optimizer, saved, "^w: its saved .* is damaged: ")


@pytest.mark.parametrize("used", [False, True], ids=["waiting", "used"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda past: past.pop("history_open"),
        lambda past: past["history_numbers"].fill_(float("nan")),
        lambda past: past["history_numbers"].fill_(-5),
        lambda past: past.update(history_ever=past["history_ever"][:3]),
        lambda past: past.update(history_closed=[1, 2]),
    ],
)
def test_a_damaged_history_is_dropped_with_a_warning(wholes, damage, used):
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, int(used))
    saved = copy.deepcopy(wholes[0])
    damage(saved["selection_history"][2])
    message = r"(2\.weight|weight_1|parameter 2): the saved history .* damaged"
    with pytest.warns(GrassWarning, match=message) as warned:
        optimizer.load_state_dict(saved)
    assert warned[0].filename == __file__
    train(model, compiled, optimizer, 4)
    stats = list(optimizer.stats().values())
    assert stats[0]["coverage"] >= stats[1]["coverage"] > 0


@pytest.mark.parametrize(
    ("rank", "message"), [(4, "^0.weight: .* 6 rows of 8"), (0.75, "^2.weight: .* 6 rows of 12")]
)
def test_what_does_not_fit_a_graph_waits_on_unharmed(wholes, rank, message):
    model, compiled, _ = begin(rank=rank)
    optimizer = grass_fx.AdamW(model.named_parameters())
    optimizer.load_state_dict(wholes[0])
    before = everything(model, optimizer)
    for _ in range(2):
        with pytest.raises(StateError, match=message):
            compiled(torch.randn(2, 8)).sum().backward()
    assert same(everything(model, optimizer)[0], before[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Captured(rank=6, refresh_every=3))
    train(model, compiled, optimizer, 1)
    assert [registry.get(layer.weight).step for layer in (model[0], model[2])] == [5, 5]


# --- as torch's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "fused"), [(float, False), (int, True)])
@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
def test_steps_that_are_plain_numbers_become_tensors_as_torch_makes_them(
    wholes, make, fused, number
):
    finals = []
    for convert in (lambda step: step, lambda step: number(step.item())):
        torch.manual_seed(0)
        model, compiled, optimizer = begin(make)
        saved = copy.deepcopy(wholes[make is WrappedAdamW])
        saved["param_groups"][0]["fused"] = fused
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = convert(state["step"])
        optimizer.load_state_dict(saved)
        train(model, compiled, optimizer, 4)
        for state in optimizer.state.values():
            if "step" in state:
                assert isinstance(state["step"], torch.Tensor)
                assert state["step"].dtype == torch.float32
        finals.append(list(model.parameters()))
    assert same(*finals)


@pytest.mark.parametrize("used", [False, True], ids=["waiting", "used"])
@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW, with_momentum])
def test_a_load_keeps_nothing_of_the_callers_tensors(make, used):
    model, compiled, optimizer = begin(make, selection="uniform", replacement=True)
    train(model, compiled, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    again, compiled, second = begin(make, selection="uniform", replacement=True)
    train(again, compiled, second, int(used))
    second.load_state_dict(saved)
    want = everything(again, second)[0]
    for part in (*saved["state"].values(), *saved["selection_history"].values()):
        for value in part.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    assert same(everything(again, second)[0], want)


def test_a_state_dict_shares_no_memory_with_the_current_selection():
    model, compiled, optimizer = begin(selection="uniform", replacement=True)
    train(model, compiled, optimizer, 1)
    before = copy.deepcopy(registry.get(model[0].weight).selection)
    for name, value in optimizer.state_dict()["state"][0].items():
        if name.startswith("subspace_"):
            value.zero_()
    after = registry.get(model[0].weight).selection
    assert torch.equal(before.indices, after.indices) and torch.equal(before.scale, after.scale)


def test_hooks_before_a_load_see_all_of_it_and_decide(wholes):
    model, compiled, optimizer = begin(rank=4)

    def without_taken(_, state_dict):
        kept = {k: v for k, v in state_dict["state"].items() if "subspace_order" not in v}
        return {**state_dict, "state": kept}

    optimizer.register_load_state_dict_pre_hook(without_taken)
    optimizer.load_state_dict(wholes[0])
    train(model, compiled, optimizer, 1)
    assert registry.get(model[0].weight).step == 1
    assert optimizer.state[model[0].bias]["step"] == 5


@pytest.mark.parametrize("used", [False, True])
def test_an_exception_in_a_hook_after_a_load_changes_nothing(wholes, used):
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, int(used))

    def fail(_):
        raise ZeroDivisionError("by a hook")

    optimizer.register_load_state_dict_post_hook(fail)
    refused(model, optimizer, wholes[0], "by a hook", ZeroDivisionError)


@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
def test_hooks_after_a_load_find_the_state_as_it_stays(wholes, make):
    model, _, optimizer = begin(make)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state.update(note=True))
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[model[0].bias].clear())
    optimizer.load_state_dict(wholes[make is WrappedAdamW])
    assert optimizer.state["note"] is True and not optimizer.state[model[0].bias]


class OwnLoad(torch.optim.SGD):
    """Loads without torch's hooks, as bitsandbytes does."""

    def load_state_dict(self, state_dict):
        state_dict = copy.deepcopy(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [{**g, "params": o["params"]} for g, o in
                  zip(state_dict["param_groups"], self.param_groups, strict=True)]  # fmt: skip
        keys = [key for g in state_dict["param_groups"] for key in g["params"]]
        state = {p: state_dict["state"][key] for p, key in zip(params, keys, strict=True)
                 if key in state_dict["state"]}  # fmt: skip
        self.__setstate__({"state": state, "param_groups": groups})


def test_a_class_with_a_load_of_its_own_is_checked_as_well():
    wrapped = grass_fx.subspace(OwnLoad)

    def make(p, lr):
        return wrapped(p, lr, momentum=0.9)

    model, compiled, optimizer = begin(make)
    train(model, compiled, optimizer, 4)
    weights, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, compiled, optimizer, 3, seed=1)
    again, compiled, second = begin(make)
    again.load_state_dict(weights)
    second.load_state_dict(saved)
    train(again, compiled, second, 3, seed=1)
    assert same(again.state_dict(), model.state_dict())
    saved["state"][2]["momentum_buffer"] = torch.zeros(3)
    refused(again, second, saved, r"momentum_buffer has shape \(3,\)")


@pytest.mark.parametrize("make", [grass_fx.AdamW, WrappedAdamW])
def test_another_number_of_parameters_is_torchs_error_and_changes_nothing(wholes, make):
    model, compiled, optimizer = begin(make, model=mlp(8, 12, 6, 6))
    train(model, compiled, optimizer, 1)
    refused(model, optimizer, wholes[make is WrappedAdamW], "parameter group", ValueError)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("amsgrad", True, r"amsgrad=True: .* grass_fx\.subspace\(torch\.optim\.AdamW\)"),
        ("capturable", True, "capturable=True: .*reduce-overhead"),
        ("differentiable", True, "differentiable=True: .* torch.optim.AdamW"),
        ("eps", (None, 1e-3), "eps=.* is out of range"),
        ("betas", 0.9, "betas=0.9 is out of range"),
        ("scale", True, "scale=True is no number"),
        ("scale", 0.0, "scale=0.0 is out of range"),
    ],
)
def test_a_group_that_cannot_be_is_refused_at_load(wholes, option, value, message):
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, 1)
    saved = copy.deepcopy(wholes[0])
    saved["param_groups"][0][option] = value
    refused(model, optimizer, saved, r"param_groups\[0\] of the state dict: .*?" + message,
            OptionError)  # fmt: skip


def test_a_rate_that_a_schedule_has_left_just_below_zero_loads(wholes):
    saved = copy.deepcopy(wholes[0])
    saved["param_groups"][0]["lr"] = -1e-20
    _, _, optimizer = begin()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == -1e-20
