"""Checkpoints: a resumed run is the uninterrupted run to the last bit, and what does not fit is an
error that names the weight."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import grass_fx
from grass_fx.errors import GrassWarning, SelectionChangedError, StateError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.subspace import graph_inputs
from helpers import Captured, mlp
from resuming import CASES, SAVED


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What a second process reports that resumes everything a first one has saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).with_name("resuming.py")
    for part in ("whole", "resumed"):
        command = [sys.executable, str(script), part, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
        assert run.returncode == 0, run.stderr
    return dict(line.rsplit(maxsplit=1) for line in run.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_run(resumed, case):
    assert {done: resumed[f"{case.name} {done}"] for done in SAVED} == dict.fromkeys(
        SAVED, "identical"
    )


def train(model, compiled, optimizer, steps, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(7, 8, generator=gen), torch.randn(7, 6, generator=gen)
        optimizer.zero_grad()
        (compiled(x) - y).square().mean().backward()
        optimizer.step()


def begin(sizes=(8, 12, 6), make=grass_fx.AdamW, named=True, **options):
    model = mlp(*sizes)
    compiled = torch.compile(model, backend=Captured(**{"rank": 2, "refresh_every": 3, **options}))
    params = model.named_parameters() if named else model.parameters()
    return model, compiled, make(params, lr=1e-2)


def trained(**kwargs):
    model, compiled, optimizer = begin(**kwargs)
    train(model, compiled, optimizer, 4)
    torch._dynamo.reset()
    return model, optimizer


def assert_same(got, want):
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.SGD)])
def test_a_state_dict_holds_plain_tensors_and_numbers_only(make):
    _, optimizer = trained(make=make, selection="uniform", replacement=True)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(
            type(value) in (torch.Tensor, int, float, type(None)) for value in state.values()
        )
    plain = (int, float, bool, str, type(None), tuple, list)
    for group in saved["param_groups"]:
        assert all(isinstance(value, plain) for value in group.values())


def test_loading_before_the_first_compiled_call_is_adopted_by_it():
    model, optimizer = trained(selection="top")
    want = registry.get(model[0].weight)
    again, compiled, second = begin(selection="top")
    again.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert registry.get(again[0].weight) is None
    compiled(torch.randn(2, 8)).sum().backward()
    got = registry.get(again[0].weight)
    assert torch.equal(got.selection.indices, want.selection.indices)
    assert (got.step, got.period) == (want.step, want.period) == (4, 3)


@pytest.mark.parametrize("when", ["before the first call", "after a step"])
@pytest.mark.parametrize(
    "other",
    [{"rank": 4}, {"side": "out"}, {"selection": "uniform", "replacement": True}, {"block": 2}],
    ids=str,
)
def test_a_selection_that_does_not_fit_names_the_weight(when, other):
    _, optimizer = trained(side="in")
    model, compiled, second = begin(**{"side": "in", **other})
    if when == "after a step":
        train(model, compiled, second, 1)
        before = copy.deepcopy(second.state_dict()["state"])
        with pytest.raises(StateError, match=r"^0\.weight: the saved selection has 2 rows of 8"):
            second.load_state_dict(optimizer.state_dict())
        torch.testing.assert_close(second.state_dict()["state"], before, rtol=0, atol=0)
    else:
        second.load_state_dict(optimizer.state_dict())
        with pytest.raises(StateError, match=r"^0\.weight: the saved selection has 2 rows of 8"):
            train(model, compiled, second, 1)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_a_weight_of_another_shape_is_named(make):
    _, optimizer = trained(make=make)
    _, _, second = begin(sizes=(8, 20, 6), make=make)
    with pytest.raises(StateError, match=r"^0\.weight has shape \(20, 8\).* shape \(12, 8\)"):
        second.load_state_dict(optimizer.state_dict())
    assert not second.state


def test_a_dense_parameter_of_another_shape_is_named():
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(5)
    _, _, second = begin()
    with pytest.raises(StateError, match=r"^0\.bias has shape \(12,\).* shape \(5,\)"):
        second.load_state_dict(saved)


def test_parameters_in_another_order_are_named():
    model, optimizer = trained()
    reordered = list(model.named_parameters())[::-1]
    second = grass_fx.AdamW(reordered)
    with pytest.raises(StateError, match=r"^2\.bias: .* saved for 0\.weight"):
        second.load_state_dict(optimizer.state_dict())


def test_names_from_the_compiled_model_are_the_models():
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, 2)
    again = grass_fx.AdamW(compiled.named_parameters())  # "_orig_mod.0.weight", ...
    again.load_state_dict(optimizer.state_dict())
    assert again.state[model[0].weight]["age"].tolist() == [2, 2]


def test_a_state_dict_is_not_changed_by_training_on():
    model, compiled, optimizer = begin(make=grass_fx.subspace(torch.optim.AdamW))
    train(model, compiled, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    second = grass_fx.subspace(torch.optim.AdamW)(model.parameters())
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    train(model, compiled, second, 3)
    torch.testing.assert_close(saved["state"], kept["state"], rtol=0, atol=0)


def test_moving_a_checkpoint_to_another_rank_as_the_docs_say():
    """Taken weights start anew, all other parameters go on."""
    model, optimizer = trained()
    again, compiled, second = begin(rank=4)
    again.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    for key, state in list(saved["state"].items()):
        if "indices" in state:
            del saved["state"][key]
    second.load_state_dict(saved)
    train(again, compiled, second, 1)
    assert second.state[again[0].weight]["exp_avg"].shape == (12, 4)
    assert second.state[again[0].bias]["step"] == 5


def test_schedule_and_rule_may_change_at_a_resume():
    model, optimizer = trained()
    again, compiled, second = begin(refresh_every=5, selection="uniform", seed=3)
    again.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    train(again, compiled, second, 2)
    subspace = registry.get(again[0].weight)
    assert (subspace.step, subspace.period) == (6, 3)  # refreshed at 3 by K = 3, at 5 by K = 5


def test_another_checkpoint_replaces_one_that_was_not_used_yet():
    _, optimizer = trained(rank=4)
    saved = optimizer.state_dict()
    model, compiled, optimizer = begin(rank=2)
    optimizer.load_state_dict(saved)  # of another rank, as the first forward would tell
    taken = [key for key, state in saved["state"].items() if "indices" in state]
    optimizer.load_state_dict(
        {**saved, "state": {k: v for k, v in saved["state"].items() if k not in taken}}
    )
    train(model, compiled, optimizer, 1)
    assert isinstance(model[0].weight.grad, CompactGrad)


MAKERS = [grass_fx.AdamW, grass_fx.subspace(torch.optim.Adam)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rule", ["cyclic", "top", "uniform"])
def test_a_state_of_before_the_first_step_takes_the_run_back_there(make, rule):
    model, compiled, optimizer = begin(make=make, selection=rule)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, compiled, optimizer, 4)  # as a finder of learning rates does
    want, coverage = copy.deepcopy(model), optimizer.stats()["0.weight"]["coverage"]
    train(model, compiled, optimizer, 2, seed=1)
    model.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    train(model, compiled, optimizer, 4)
    assert_same(model, want)
    assert optimizer.stats()["0.weight"]["coverage"] == coverage


def test_a_gradient_of_before_such_a_state_is_not_taken_for_one_of_after():
    model, compiled, optimizer = begin()
    empty = optimizer.state_dict()
    train(model, compiled, optimizer, 1)
    loss = compiled(torch.randn(2, 8)).sum()
    optimizer.load_state_dict(empty)
    with pytest.raises(SelectionChangedError, match=r"^0\.weight: its selection changed"):
        loss.backward()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rule", ["cyclic", "top"])
@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(make, rule, way, steps):
    model, compiled, optimizer = begin(make=make, selection=rule)
    train(model, compiled, optimizer, steps)
    if way == "deepcopy":
        other, second = copy.deepcopy((model, optimizer))
    else:
        torch.save((model, optimizer), buffer := io.BytesIO())
        buffer.seek(0)
        other, second = torch.load(buffer, weights_only=False)
    again = torch.compile(other, backend=Captured(rank=2, refresh_every=3, selection=rule))
    train(model, compiled, optimizer, 4, seed=1)
    train(other, again, second, 4, seed=1)
    assert_same(other, model)
    assert second.stats() == optimizer.stats()


def test_a_frozen_selection_thaws_under_another_rule():
    _, optimizer = trained(selection="frozen_top", refresh_every=1)
    model, compiled, other = begin(selection="top", refresh_every=1)
    other.load_state_dict(optimizer.state_dict())
    train(model, compiled, other, 1)
    first = registry.get(model[0].weight).period
    train(model, compiled, other, 2)
    assert registry.get(model[0].weight).period == first + 2


@pytest.mark.parametrize("back", [False, True])
def test_scales_are_as_exact_as_the_weight_is_now(back):
    model = mlp(8, 6).to(torch.float64 if back else torch.float32)
    compiled = torch.compile(model, backend=Captured(rank=2, selection="uniform", replacement=True))
    for dtype in (model[0].weight.dtype, torch.float32 if back else torch.float64):
        model.to(dtype)
        compiled(torch.randn(3, 8, dtype=dtype)).sum().backward()
        scales = [graph_inputs([registry.get(model[0].weight)], [torch.device("cpu")])[0][1]]
        scales.append(model[0].weight.grad.selection.scale)
        assert {scale.dtype for scale in scales} == {dtype}
        model.zero_grad()


def test_state_in_a_subspace_without_a_compiled_graph_is_an_error():
    model, optimizer = trained()
    again = mlp(8, 12, 6)
    second = grass_fx.AdamW(again.named_parameters())
    second.load_state_dict(optimizer.state_dict())
    with pytest.raises(StateError, match=r"^0\.weight: .* no compiled graph has taken it"):
        train(again, again, second, 1)


# --- torch.distributed.checkpoint -----------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_a_flattened_state_that_lost_the_selection_is_an_error(make):
    """torch asks a state of before for the names of its entries, and drops all others."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained(make=make)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    again, compiled, second = begin(make=make)
    compiled(torch.randn(2, 8))
    with pytest.raises(StateError, match=r"^0\.weight: .* flatten_optimizer_state_dict"):
        set_optimizer_state_dict(again, second, saved, options=flat)


def test_rolling_back_twice_asks_for_nothing_new(tmp_path):
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, 2)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path)
    for _ in range(2):
        states = get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path)
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    train(model, compiled, optimizer, 1)
    assert registry.get(model[0].weight).step == 3


@pytest.mark.parametrize(
    "make",
    [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW), grass_fx.subspace(torch.optim.Adagrad)],
)
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_distributed_checkpoint_saves_and_loads_it(tmp_path, make, rule):
    options = {"make": make, "selection": rule, "named": False}
    model, compiled, optimizer = begin(**options)
    train(model, compiled, optimizer, 4)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    train(model, compiled, optimizer, 5, seed=1)

    torch._dynamo.reset()
    again, compiled, second = begin(**options)
    compiled(torch.randn(2, 8))  # from now on it is known which weights are taken
    weights, state = get_state_dict(again, second)
    assert state["state"]["0.weight"]["indices"].shape == (2,)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(again, second, model_state_dict=weights, optim_state_dict=state)
    train(again, compiled, second, 5, seed=1)
    assert_same(again, model)


@pytest.mark.parametrize(
    "make",
    [grass_fx.AdamW, grass_fx.subspace(torch.optim.Adam), grass_fx.subspace(torch.optim.SGD)],
)
def test_laying_out_an_empty_optimizer_advances_nothing(make):
    model, compiled, optimizer = begin(make=make, named=False)
    compiled(torch.randn(2, 8))
    subspace = registry.get(model[0].weight)
    selection, before = subspace.selection, copy.deepcopy(model)
    state = get_state_dict(model, optimizer)[1]["state"]
    shapes = [v.shape for v in state["0.weight"].values() if isinstance(v, torch.Tensor)]
    assert torch.Size([12, 8]) not in shapes
    assert (subspace.step, subspace.period, subspace.selection) == (0, 1, selection)
    assert not optimizer.state[model[0].weight]["age"].any()
    assert_same(model, before)


def test_a_full_state_dict_is_set_before_the_first_compiled_call():
    model, compiled, optimizer = begin(named=False)
    train(model, compiled, optimizer, 4)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, compiled, optimizer, 3, seed=1)
    torch._dynamo.reset()
    again, compiled, second = begin(named=False)
    set_state_dict(again, second, model_state_dict=weights, optim_state_dict=state)
    train(again, compiled, second, 3, seed=1)
    assert_same(again, model)


def test_laying_out_before_the_first_compiled_call_makes_no_state_and_says_so():
    model, _, optimizer = begin(named=False)
    with pytest.warns(GrassWarning, match="run one forward"):
        state = get_state_dict(model, optimizer)[1]
    assert not optimizer.state and not state["state"]
    with pytest.raises(StateError, match="nothing to load.*lay_out_from"):  # and no fresh start
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))


@pytest.mark.parametrize("damage", ["counters", "file", "folder"])
def test_a_damaged_checkpoint_to_lay_out_from_is_a_state_error(damage, tmp_path):
    model, compiled, optimizer = begin()
    train(model, compiled, optimizer, 2)
    state = get_optimizer_state_dict(model, optimizer)
    if damage == "counters":
        del state["state"]["0.weight"]["subspace_counters"]
    if damage == "folder":
        dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
        for file in tmp_path.glob("*.distcp"):
            file.unlink()
    else:
        torch.save(state, tmp_path / "saved.pt")
    saved = tmp_path if damage == "folder" else tmp_path / "saved.pt"
    if damage == "file":
        saved.write_bytes(saved.read_bytes()[:100])
    model, _, optimizer = begin()
    grass_fx.lay_out_from(optimizer, saved, model)
    with pytest.raises(StateError, match="damaged|no optimizer state can be read"):
        get_optimizer_state_dict(model, optimizer)


def test_a_first_step_at_rate_zero_is_a_step():
    """A learning rate that warms up from 0 is no lay-out: the gradients are not zero."""
    model, compiled, optimizer = begin()
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model)
    train(model, compiled, optimizer, 1)
    assert isinstance(model[0].weight.grad, CompactGrad)
    assert optimizer.state[model[0].weight]["age"].tolist() == [1, 1]
    assert optimizer.state[model[0].weight]["exp_avg"].abs().sum() > 0
    assert_same(model, before)
