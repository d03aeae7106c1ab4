"""A step that an exception interrupts: calling it again finishes it, and nothing counts twice."""

import copy
import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import GrassWarning, OptionError
from grass_fx.optim import adamw, base, stand_in, update
from grass_fx.optim import wrap as wrapped
from grass_fx.state.registry import registry
from helpers import Captured, mlp

X = [
    torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    for k in range(7)
]


def begin(make, backend=None, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlp(8, 12, 6).double()
    options = {"rank": 4, "refresh_every": 2, **options}
    if backend is None:
        compiled = torch.compile(model, backend=Captured(**options))
    else:  # the helper keeps graphs, and they keep what is in them
        options["compiler"] = "aot_eager"
        compiled = torch.compile(model, backend=backend, options=options)
    return model, compiled, make(model.parameters(), lr=1e-2)


def backward(compiled, optimizer, x):
    optimizer.zero_grad()
    compiled(x).square().mean().backward()


def everything(model, optimizer):
    """Weights, state and subspaces, to be compared to the last bit."""
    weights = [p.detach().clone() for p in model.parameters()]
    states = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in model.parameters()
    ]
    taken = [registry.get(p) for p in model.parameters()]
    return weights, states, [None if s is None else {**s.state()} for s in taken]


def fails(monkeypatch, module, name, at):
    """The ``at``-th call of a function of ours runs out of memory, before it has done anything."""
    real, calls = getattr(module, name), []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, once)


ADAMW = grass_fx.AdamW
SUBSPACE = grass_fx.subspace
SGD = SUBSPACE(torch.optim.SGD)
PLACES = [
    (ADAMW, base, "finish_steps", 1),
    (ADAMW, update, "add_rows_", 1),
    (ADAMW, update, "add_rows_", 2),
    (ADAMW, adamw, "carried_rows", 2),
    (ADAMW, adamw, "carried_rows", 3),
    (ADAMW, adamw, "step_as_torch", 1),
    (SGD, base, "finish_steps", 1),
    (SGD, wrapped, "carried_state", 2),
    (SGD, stand_in, "add_to_rows_", 2),
]


@pytest.mark.filterwarnings("ignore:optimizer.step")
@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize(("make", "module", "name", "at"), PLACES)
def test_a_step_that_ran_out_of_memory_is_finished_by_calling_it_again(
    make, module, name, at, step, monkeypatch
):
    """At step 2 selections are new, and state follows them."""
    runs = []
    for interrupted in (True, False):
        model, compiled, optimizer = begin(make, selection="uniform")
        failed = False
        for k, x in enumerate(X):
            backward(compiled, optimizer, x)
            if interrupted and k == step:
                with monkeypatch.context() as patch:
                    fails(patch, module, name, at)
                    try:
                        optimizer.step()
                        continue  # it was not called as often
                    except torch.OutOfMemoryError:
                        failed = True
            optimizer.step()
        assert failed or not interrupted or "carried" in name
        runs.append(everything(model, optimizer))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_what_has_moved_is_told(monkeypatch):
    model, compiled, optimizer = begin(partial(ADAMW, weight_decay=0.0))
    backward(compiled, optimizer, X[0])
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        fails(patch, update, "add_rows_", 2)
        moved = pytest.warns(GrassWarning, match=r"interrupted .*: 0\.weight moved, 3 parameters")
        with pytest.raises(torch.OutOfMemoryError), moved as seen:
            optimizer.step()
    assert seen[0].filename == __file__
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert same == [False, True, True, True]
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [0, 0]


def test_a_step_that_is_not_finished_is_told_at_the_next_one(monkeypatch):
    model, compiled, optimizer = begin(ADAMW)
    backward(compiled, optimizer, X[0])
    with monkeypatch.context() as patch:
        fails(patch, update, "add_rows_", 2)
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(GrassWarning):
            optimizer.step()
    backward(compiled, optimizer, X[1])
    with pytest.warns(GrassWarning, match=r"interrupted when 0\.weight had moved"):
        optimizer.step()
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [1, 1]  # all change together
    assert [optimizer.state[model[k].bias]["step"].item() for k in (0, 2)] == [1, 1]


def test_loading_ends_an_interrupted_step(monkeypatch):
    """What is left of it would go on with the state of before."""
    model, compiled, optimizer = begin(ADAMW)
    backward(compiled, optimizer, X[0])
    optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    runs = []
    for interrupted in (True, False):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        if interrupted:
            backward(compiled, optimizer, X[1])
            with monkeypatch.context() as patch:
                fails(patch, update, "add_rows_", 2)
                with pytest.raises(torch.OutOfMemoryError), pytest.warns(GrassWarning):
                    optimizer.step()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        backward(compiled, optimizer, X[2])
        optimizer.step()
        runs.append(everything(model, optimizer))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.filterwarnings("ignore:no compact gradient", "ignore:Sparse invariant")
def test_a_sparse_gradient_steps_as_torchs(wrapped):
    """It has no memory of its own shape to be known by."""
    table = nn.Embedding(6, 3, sparse=True).double()
    twin = copy.deepcopy(table)
    steppers = SUBSPACE(wrapped)(table.parameters(), lr=0.1), wrapped(twin.parameters(), lr=0.1)
    for model, optimizer in zip((table, twin), steppers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1, 4, 1])).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(table.weight, twin.weight, rtol=0, atol=0)


def test_selections_change_all_or_none(monkeypatch):
    model, compiled, optimizer = begin(ADAMW, selection="top", refresh_every=1)
    backward(compiled, optimizer, X[0])
    before = [registry.get(model[k].weight).selection for k in (0, 2)]
    finished = [(registry.get(model[k].weight), model[k].weight.grad.scores) for k in (0, 2)]

    def disagree(changed):
        assert len(changed) == 2
        raise RuntimeError("processes differ")

    from grass_fx.state.refresh import finish_steps

    with pytest.raises(RuntimeError, match="processes differ"):
        finish_steps(finished, disagree)
    assert [registry.get(model[k].weight).selection for k in (0, 2)] == before
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [0, 0]
    finish_steps(finished)
    assert [registry.get(model[k].weight).step for k in (0, 2)] == [1, 1]


# --- what is known of a Parameter -----------------------------------------------------------------


@pytest.fixture
def swapping():
    """``module.to()`` exchanges what is in Parameters, as a future torch does always."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("make", [ADAMW, SGD])
def test_a_model_may_be_converted_by_exchange(make, swapping):
    runs = []
    for converts in (True, False):
        model, compiled, optimizer = begin(make, backend="grass")
        if converts:
            model.float()
            model.double()
        for k, x in enumerate(X):
            if converts and k == 3:
                subspaces = [registry.get(model[j].weight) for j in (0, 2)]
                model.to("cpu", torch.float64)  # nothing to do, and an exchange all the same
                assert [registry.get(model[j].weight) for j in (0, 2)] == subspaces
            backward(compiled, optimizer, x)
            optimizer.step()
        runs.append(everything(model, optimizer))
    torch.testing.assert_close(*runs)  # the model was float32 at first


def test_a_gradient_is_exchanged_too(swapping):
    model, compiled, optimizer = begin(ADAMW, backend="grass")
    backward(compiled, optimizer, X[0])
    want = model[0].weight.grad.compact.float()
    model.float()
    assert torch.equal(model[0].weight.grad.compact, want)


def test_what_is_known_is_no_part_of_a_saved_model(tmp_path):
    model, compiled, optimizer = begin(ADAMW)
    backward(compiled, optimizer, X[0])
    optimizer.step()
    for saved in (model[0].weight, model):
        torch.save(saved, tmp_path / "saved.pt")
        assert b"grass_fx.state.records" not in (tmp_path / "saved.pt").read_bytes()
    torch.save(model[0].weight, tmp_path / "weight.pt")
    again = torch.load(tmp_path / "weight.pt", weights_only=True)
    assert torch.equal(again, model[0].weight) and registry.get(again) is None
    assert registry.get(copy.deepcopy(model)[0].weight) is None


def test_a_model_ends_with_its_last_user():
    model, compiled, optimizer = begin(ADAMW)
    backward(compiled, optimizer, X[0])
    optimizer.step()
    watched = [weakref.finalize(o, int) for o in (optimizer, registry.get(model[0].weight))]
    watched.append(weakref.finalize(model[0], int))
    del model, compiled, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert not any(each.alive for each in watched)


def test_stepping_in_backward_keeps_no_model_alive():
    model, compiled, optimizer = begin(ADAMW)
    grass_fx.step_in_backward(optimizer)
    compiled(X[0]).square().mean().backward()
    optimizer.step()
    watched = weakref.finalize(model[0], int)
    del model, compiled, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert not watched.alive


def test_stepping_in_backward_twice_is_an_error():
    model, compiled, optimizer = begin(ADAMW)
    grass_fx.step_in_backward(optimizer)
    with pytest.raises(OptionError, match=r"called with this optimizer before\. Call it once"):
        grass_fx.step_in_backward(optimizer)
    compiled(X[0]).square().mean().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["age"].tolist() == [1] * 4


def test_an_optimizer_that_is_gone_is_named_by_the_backward_it_should_step_in():
    model, compiled, optimizer = begin(ADAMW)
    grass_fx.step_in_backward(optimizer)
    del optimizer
    gc.collect()
    with pytest.raises(OptionError, match=r"optimizer .* is gone"):
        compiled(X[0]).square().mean().backward()


def test_a_group_costs_what_it_has(monkeypatch):
    """Not what all groups before it have."""
    seen = []
    real = registry.announce
    monkeypatch.setattr(
        registry, "announce", lambda o, ps, *more: seen.append(len(ps)) or real(o, ps, *more)
    )
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(30)]
    ADAMW([{"params": [p]} for p in weights])
    assert seen == [1] * 30


def test_loading_gives_a_selection_a_number_of_its_own():
    """Else a gradient of before the load could pass for one of after it."""
    model, compiled, optimizer = begin(ADAMW, refresh_every=1)
    backward(compiled, optimizer, X[0])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = {registry.get(model[0].weight).selection.generation}
    for _ in range(3):
        optimizer.load_state_dict(saved)
        numbers.add(registry.get(model[0].weight).selection.generation)
    assert len(numbers) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(compiled, optimizer, X[1])
        optimizer.step()
    assert set(optimizer.state[model[0].weight]["age"].tolist()) <= {1, 2}
