"""torch.compile(model, backend="grass"): options, modes, and what it does without gradients."""

import logging
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.compile.runtime import GrassCallable
from grass_fx.errors import GrassWarning, OptionError, UnsupportedTorchError
from grass_fx.passes import push_selection
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, mlp


def test_the_backend_is_found_without_importing_the_package():
    script = (
        "import sys, torch\n"
        "assert 'grass_fx' not in sys.modules\n"
        "model = torch.nn.Linear(8, 6)\n"
        "options = {'rank': 2, 'compiler': 'aot_eager'}\n"
        "compiled = torch.compile(model, backend='grass', options=options)\n"
        "compiled(torch.ones(3, 8)).sum().backward()\n"
        "assert type(model.weight.grad).__name__ == 'CompactGrad'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnak": 4}, "did you mean 'rank'"),
        ({"max_autotune": True}, r'\{"inductor": \{...\}\}'),
        ({"inductor": {"max_autotun": True}}, "Unexpected optimization option max_autotun"),
        ({"selection": "cyclical"}, "did you mean 'cyclic'"),
    ],
)
def test_a_bad_option_is_an_error_that_says_what_to_do(options, message):
    compiled = torch.compile(nn.Linear(8, 6), backend="grass", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(torch.ones(3, 8))


def test_modes_and_inductors_options_reach_inductor():
    seen = {}

    def look(graph):
        config = torch._inductor.config
        seen.update(tune=config.max_autotune, pad=config.shape_padding, fold=config.freezing)

    for mode in (None, "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        inductor = {"joint_custom_pre_pass": look, "shape_padding": False}
        options = {"rank": 2, "mode": mode, "inductor": inductor}
        torch.compile(nn.Linear(8, 6), backend="grass", options=options)(torch.ones(3, 8))
        assert seen == {"tune": mode is not None, "pad": False, "fold": False}


def test_mode_alone_reaches_inductor():
    seen = []
    torch._dynamo.reset()
    model = mlp(64, 64)
    with torch._inductor.config.patch(
        joint_custom_pre_pass=lambda graph: seen.append(torch._inductor.config.max_autotune)
    ):
        compiled = torch.compile(model, backend="grass", mode="max-autotune-no-cudagraphs")
        compiled(torch.ones(3, 64)).sum().backward()
    assert seen == [True] and isinstance(model[0].weight.grad, CompactGrad)


@pytest.mark.parametrize("state", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_it_is_plain_inductor_and_silent(state, compiler, recwarn):
    model, x = mlp(8, 16, 6), torch.randn(4, 8)
    model.requires_grad_(state != "frozen")
    backend = Captured(compiler=compiler, rank=2)
    context = getattr(torch, state, torch.enable_grad)()
    with context:
        y = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(y, model(x))
    assert not any(isinstance(graph, GrassCallable) for graph in backend.graphs)
    assert not [w for w in recwarn if issubclass(w.category, GrassWarning)]


def test_frozen_weights_beside_trained_ones_stay_plain():
    model = mlp(8, 8, 8)
    model[0].requires_grad_(False)
    backend = Captured(rank=2)
    torch.compile(model, backend=backend)(torch.randn(4, 8)).sum().backward()
    assert [w.name for w in backend.only.found.taken] == ["2.weight"]
    assert model[0].weight.grad is None


def test_nothing_taken_is_a_warning_that_says_why():
    model = mlp(8, 16, 6)
    with pytest.warns(GrassWarning, match="took no weight.*0.weight: rank 99 exceeds its 8 input"):
        y = torch.compile(model, backend=Captured(rank=99))(torch.randn(4, 8))
    y.sum().backward()
    assert type(model[0].weight.grad) is torch.Tensor


def test_a_graph_without_matrices_is_no_reason_to_warn(recwarn):
    torch.compile(nn.LayerNorm(8), backend=Captured(rank=2))(torch.randn(4, 8)).sum().backward()
    assert not [w for w in recwarn if issubclass(w.category, GrassWarning)]


def test_one_graph_for_many_layers_keeps_a_subspace_for_each():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.linear(x))

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, backend = Blocks(), Captured(rank=2)
    optimizer = grass_fx.AdamW(model.named_parameters())
    for layer in model.layers:
        layer.compile(backend=backend)
    model(torch.randn(4, 8)).sum().backward()
    # One for inputs that need no gradient (the first layer's), one for those that do.
    assert len(backend.graphs) == 2
    subspaces = [layer.linear.weight.grad.selection for layer in model.layers]
    assert len({tuple(s.indices.tolist()) for s in subspaces}) > 1
    assert [s.name for s in subspaces] == [f"layers.{i}.linear.weight" for i in range(4)]
    optimizer.step()


def test_dense_parameters_get_their_ordinary_gradients(compiler):
    model, x = mlp(8, 16, 6).double(), torch.randn(4, 8, dtype=torch.float64)
    torch.compile(model, backend=Captured(compiler=compiler, rank=2))(x).square().sum().backward()
    got = [layer.bias.grad for layer in (model[0], model[2])]
    want = torch.autograd.grad(model(x).square().sum(), [model[0].bias, model[2].bias])
    torch.testing.assert_close(got, list(want))


def test_input_gradients_are_unchanged(compiler):
    model, x = mlp(8, 16, 6).double(), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend=Captured(compiler=compiler, rank=2))
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, want)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("selection", ["cyclic", "top"])
def test_dynamic_token_counts_and_recompilation_with_a_gradient_present(compiler, selection):
    """Dynamo makes a fake copy of a parameter with the CompactGrad it holds."""
    model = mlp(8, 16, 6).double()
    options = {"rank": 2, "selection": selection, "compiler": compiler}
    compiled = torch.compile(model, backend="grass", options=options)
    full = 0
    for tokens in (5, 9, 7):
        x = torch.randn(tokens, 8, dtype=torch.float64)
        compiled(x).square().sum().backward()
        full = full + torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    grad = model[0].weight.grad
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_autocast(compiler, dtype):
    model, x = mlp(8, 16, 6), torch.randn(4, 8)
    backend = Captured(compiler=compiler, rank=2, selection="top")
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", dtype):
        loss = compiled(x).float().square().sum()
    loss.backward()
    grad = model[0].weight.grad
    (full,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    assert isinstance(grad, CompactGrad) and grad.dtype == torch.float32
    torch.testing.assert_close(grad.compact, grad.selection.project(full), rtol=0.05, atol=0.05)
    assert sorted(backend.only.report.pushed) == ["0.weight", "2.weight"]


def test_a_weight_converted_after_compiling_moves_its_selection_along():
    model = mlp(8, 16, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, selection="uniform", replacement=True))
    compiled(torch.randn(4, 8)).sum().backward()
    before = model[0].weight.grad.selection.indices
    model.zero_grad()
    model.to(torch.bfloat16)
    compiled(torch.randn(4, 8, dtype=torch.bfloat16)).sum().backward()
    grad = model[0].weight.grad
    assert grad.dtype == torch.bfloat16 and torch.equal(grad.selection.indices, before)


def test_other_options_for_the_same_weights_start_their_subspaces_anew(caplog):
    model, x = mlp(8, 16, 6), torch.randn(4, 8)
    for rank in (2, 4):
        torch._dynamo.reset()
        model.zero_grad()
        changes = pytest.warns(GrassWarning, match="rank 2 -> 4") if rank == 4 else nullcontext()
        with caplog.at_level(logging.WARNING, "grass_fx"), changes:
            torch.compile(model, backend=Captured(rank=rank))(x).sum().backward()
        assert model[0].weight.grad.compact.shape == (16, rank)
    assert "0.weight: compiled with other options" in caplog.text


def test_two_functions_with_different_options_in_one_step_are_an_error():
    model, x = mlp(8, 16, 6), torch.randn(4, 8)
    first = torch.compile(model, backend=Captured(rank=2))
    first(x).sum().backward()
    held = model[0].weight.grad.compact.clone()
    torch._dynamo.reset()
    second = torch.compile(model, backend=Captured(rank=4))
    with pytest.raises(OptionError, match=r"weight: two compiled functions .*\(rank 2 -> 4\)"):
        second(x)
    assert torch.equal(model[0].weight.grad.compact, held)


def test_two_graphs_may_see_a_matrix_from_two_sides():
    class BothWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            x = torch.tanh(x @ self.w)
            torch._dynamo.graph_break()
            return x @ self.w.t()

    model, x = BothWays().double(), torch.randn(4, 8, dtype=torch.float64)
    backend = Captured(rank=2, side="auto")
    torch.compile(model, backend=backend)(x).square().sum().backward()
    assert [g.found.taken[0].spec.side for g in backend.graphs] == ["out", "in"]
    (full,) = torch.autograd.grad(model(x).square().sum(), model.w)
    torch.testing.assert_close(model.w.grad.compact, model.w.grad.selection.project(full))


def test_one_line_is_logged_for_each_compilation(caplog):
    with caplog.at_level(logging.INFO, "grass_fx"):
        taken = torch.compile(mlp(8, 16, 6, 2), backend=Captured(rank=4, side="auto"))
        taken(torch.randn(4, 8))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "grass_fx.backend"]
    assert line.startswith("2 weights taken, 1 left (4.weight: rank 4 exceeds its 2 output")
    assert "2 selections pushed, 0 stopped" in line


def test_a_selection_that_is_not_pushed_is_right_and_reported(caplog, monkeypatch):
    monkeypatch.delitem(push_selection.MATRIX_RULES, torch.ops.aten.mm.default)
    model, x = mlp(8, 6).double(), torch.randn(4, 8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "grass_fx"):
        torch.compile(model, backend=Captured(rank=2))(x).square().sum().backward()
    assert "full weight gradients are formed for" in caplog.text
    assert "no rule for aten.mm.default" in caplog.text
    (full,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    grad = model[0].weight.grad
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


def test_dump_dir_receives_every_stage(tmp_path):
    backend = Captured(rank=2, selection="top", dump_dir=str(tmp_path))
    torch.compile(mlp(8, 6), backend=backend)(torch.randn(4, 8))
    stages = ["dynamo"] + [
        f"{stage}_{variant}"
        for variant in ("regular", "scoring")
        for stage in ("tapped", "joint", "pushed")
    ]
    assert [f.stem for f in sorted(tmp_path.iterdir())] == [
        f"{i:02d}_{stage}" for i, stage in enumerate(stages)
    ]
    assert "grass.selected_mm" in (tmp_path / "03_pushed_regular.py").read_text()


def test_called_without_fake_inputs_is_a_clear_error():
    gm = torch.fx.symbolic_trace(nn.Linear(8, 6))
    graph = torch.fx.Graph()
    w, x = graph.placeholder("w"), graph.placeholder("x")
    graph.output((graph.call_function(torch.nn.functional.linear, (x, w)),))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    inputs = [nn.Parameter(torch.randn(6, 8)), torch.randn(4, 8)]
    with pytest.raises(UnsupportedTorchError, match="torch.compile"):
        grass_fx.backend.grass(gm, inputs, options={"rank": 2})
