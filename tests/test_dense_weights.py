"""Warnings name what trains dense, why, and the line of the user's that led there."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

import grass_fx
from grass_fx.errors import GrassWarning
from grass_fx.state.registry import registry
from helpers import mlp

X = torch.randn(4, 5, 16)
OPTIONS = {"rank": 2, "compiler": "aot_eager"}
SKIPPED = TorchVersion(torch.__version__) < (2, 15)
"""Whether torch skips the frame that calls an LSTM; later versions break its graph there."""


def compiled(module, **options):
    return torch.compile(module, backend="grass", options={**OPTIONS, **options})


class Recurrent(nn.Module):
    """Linear -> RNN -> Linear."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.r = kind(32, 32, batch_first=True)

    def forward(self, x):
        return self.b(self.r(self.a(x).relu())[0].relu())


def step(model, run, optimizer=None, x=X):
    """The messages of one training step; each warning is at a line of this file."""
    optimizer = optimizer or grass_fx.AdamW(model.named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GrassWarning)
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    told = [each for each in caught if each.category is GrassWarning]
    assert {each.filename for each in told} <= {__file__}
    return [str(each.message) for each in told]


# --- what torch did not compile -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
def test_a_recurrent_layer_is_named_with_the_remedy(kind, inside):
    model = nn.Sequential(nn.Linear(16, 16), Recurrent(kind)) if inside else Recurrent(kind)
    (message,) = step(model, compiled(model))
    frame = f"forward (test_dense_weights.py:{Recurrent.forward_line})"
    if SKIPPED:
        assert message.startswith("no compact gradient has arrived: every parameter trains dense. ")
        assert f"no graph of {frame}" in message
        assert f": {kind.__name__}(32, 32, batch_first=True)" in message
        assert message.count("allow_rnn") == 1
    else:
        assert "r.weight_hh_l0" in message and f"broke the graph of {frame}" in message
    assert "Set torch._dynamo.config.allow_rnn=True" in message
    assert "module.compile()" not in message  # which is another mistake's remedy


Recurrent.forward_line = Recurrent.forward.__code__.co_firstlineno


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_with_the_remedy_its_own_weights_are_taken_as_well(kind):
    model = Recurrent(kind)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert step(model, compiled(model)) == []
    assert all(registry.get(p) is not None for p in model.parameters() if p.dim() > 1)


def test_weights_of_a_skipped_frame_are_named_where_most_weights_are_taken():
    model, wide = Recurrent(), nn.Linear(16, 1024)
    both = nn.ModuleDict({"recurrent": model, "wide": wide})
    run, wider = compiled(model), compiled(wide)
    (message,) = step(both, lambda x: wider(run(x)))
    assert message.startswith("recurrent.r.weight_ih_l0 (128, 32): in no training graph that grass")
    assert ("recurrent.a.weight" in message) is SKIPPED and "wide" not in message
    assert "allow_rnn=True" in message


class Apart(nn.Module):
    """Runs one of its layers as plain Python."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 64)

    @torch.compiler.disable
    def apart(self, x):
        return self.b(x)

    def forward(self, x):
        return self.apart(self.a(x))


def test_weights_beyond_a_graph_break_are_named_with_its_reason():
    model = Apart()
    (message,) = step(model, compiled(model))
    assert "b.weight (64, 16): in no training graph that grass compiled" in message
    line = Apart.forward.__code__.co_firstlineno
    assert f"torch.compile broke the graph of forward (test_dense_weights.py:{line}): " in message
    assert "Remove the `torch.compiler.disable` call. Change what the reason names" in message


def test_a_break_that_someone_wants_is_no_warning_where_most_weights_are_taken():
    model, wide = Apart(), nn.Linear(16, 1024)
    run, wider = compiled(model), compiled(wide)
    assert step(nn.ModuleList([model, wide]), lambda x: wider(run(x)[..., :16])) == []


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "a graph break"])
def test_an_outer_compile_with_another_backend_is_named(broken):
    model = mlp(16, 32, 16)
    inner = compiled(model)

    def loss(x):
        y = inner(x)
        if broken:
            torch._dynamo.graph_break()
        return y + 1

    (message,) = step(model, torch.compile(loss, backend="aot_eager"))
    line = loss.__code__.co_firstlineno
    compiled_by = (
        f'torch.compile(backend="aot_eager") has compiled loss (test_dense_weights.py:{line})'
    )
    assert compiled_by in message
    assert 'Call torch.compile once, with backend="grass".' in message


def test_an_outer_compile_with_grass_takes_what_an_inner_one_would_not():
    model = mlp(16, 32, 16)
    assert step(model, compiled(torch.compile(model, backend="aot_eager"))) == []


def test_a_function_that_is_disabled_is_named():
    model = mlp(16, 32, 16)
    hidden = torch.compiler.disable(lambda x: model(x))
    (message,) = step(model, compiled(lambda x: hidden(x)))
    assert "no graph of <lambda> (test_dense_weights.py:" in message
    assert "Remove the `torch.compiler.disable` call" in message


def test_an_error_of_the_backend_that_torch_suppresses_is_named():
    model = mlp(16, 32, 16)
    with torch._dynamo.config.patch(suppress_errors=True):
        run = torch.compile(lambda x: model(x), backend="grass", options={"rnak": 2})
        (message,) = step(model, run)
    assert "OptionError: grass has no option 'rnak': did you mean 'rank'?" in message


def test_compilation_that_is_turned_off_is_named():
    model = mlp(16, 32, 16)
    run = compiled(model)
    with torch.compiler.set_stance("force_eager"):
        (message,) = step(model, run)
    assert "torch.compile compiles nothing: " in message and "set_stance" in message


def test_where_torch_knows_nothing_the_common_mistakes_are_told():
    model = mlp(16, 32, 16)
    compiled(model)
    (message,) = step(model, model)
    assert "Call the compiled model" in message and "module.compile() compiles nothing" in message


def test_what_was_skipped_before_a_reset_is_no_reason():
    model = Recurrent()
    step(model, compiled(model))
    torch._dynamo.reset()
    other = mlp(16, 32, 16)
    (message,) = step(other, other)
    assert "allow_rnn" not in message


# --- less than half of a model --------------------------------------------------------------------


class Words(nn.Module):
    """An embedding, and layers behind it; a stack of three dimensions as xlnet's."""

    def __init__(self, vocabulary, layers=1):
        super().__init__()
        self.table = nn.Embedding(vocabulary, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.heads = nn.ParameterList(torch.randn(16, 4, 4) / 4 for _ in range(layers))

    def forward(self, x):
        x = self.table(x)
        for layer, heads in zip(self.layers, self.heads, strict=True):
            x = layer(x) + torch.einsum("bd,dnh->bnh", x, heads).flatten(1)
        return x


TOKENS = torch.arange(8)


def test_the_largest_weights_that_are_left_are_named_with_their_reasons():
    model = Words(64, layers=3)
    (message,) = step(model, compiled(model), x=TOKENS)
    taken, total = 3 * 256, 64 * 16 + 6 * 256
    assert message.startswith(
        f"grass has taken {taken / total:.1%} of the matrix elements that this optimizer trains, "
        f"{taken} of {total:,}. The largest weights that train dense: "
        "table.weight (64, 16): used by embedding, which is no matrix product with it; "
        "lookups=True takes it; 3 x heads.* (16, 4, 4): "
    )
    assert "layers" not in message and "option exclude" in message
    assert "torch.compile made no graph" not in message


def test_half_of_a_model_is_enough():
    model = Words(16)
    assert step(model, compiled(model, exclude=["heads.*"]), x=TOKENS) == []


@pytest.mark.parametrize(
    "options", [{"exclude": ["table.weight", "heads.*"]}, {"include": ["layers.*"]}], ids=str
)
def test_what_is_left_on_purpose_does_not_count(options):
    model = Words(64)
    assert step(model, compiled(model, **options), x=TOKENS) == []


def test_where_all_is_left_on_purpose_the_reason_is_told():
    model = mlp(16, 32, 16)
    *_, message = step(model, compiled(model, exclude=["*"]))
    assert "no compact gradient has arrived" in message
    assert "0.weight (32, 16): excluded by '*'" in message
    assert "Call the compiled model" not in message


def test_what_does_not_train_does_not_count():
    model = Words(64)
    model.table.weight.requires_grad_(False)
    model.unused = nn.Linear(64, 64)
    run = compiled(model)
    assert step(model, run, x=TOKENS) == []


def test_it_is_told_once_for_each_optimizer():
    model = Words(64)
    run = compiled(model)
    first, second = (
        make(model.named_parameters())
        for make in (grass_fx.AdamW, grass_fx.subspace(torch.optim.SGD))
    )
    assert [len(step(model, run, first, TOKENS)) for _ in range(3)] == [1, 0, 0]
    assert len(step(model, run, second, TOKENS)) == 1


def test_an_optimizer_is_judged_by_its_own_parameters():
    model = Words(64)
    run = compiled(model)
    optimizer = grass_fx.AdamW(model.layers.named_parameters())
    assert step(model, run, optimizer, TOKENS) == []


def test_one_graph_that_serves_many_layers_tells_of_all_of_them():
    """Dynamo compiles a block once; the other blocks' weights come as its inputs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.taken, self.kernel = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16, 3))

        def forward(self, x):
            return self.taken(x) + nn.functional.conv1d(x, self.kernel, padding=1)

    class Bare(nn.Module):
        """Without a weight to take."""

        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(16, 16, 3))

        def forward(self, x):
            return nn.functional.conv1d(x, self.kernel, padding=1)

    for kind in (Block, Bare):
        counters.clear()
        blocks = nn.ModuleList(kind() for _ in range(4))
        runs = [compiled(block) for block in blocks]
        *_, message = step(
            blocks,
            lambda x, runs=runs: functools.reduce(lambda x, f: f(x), runs, x),
            x=X[0, None].repeat(1, 4, 1)[:, :16],
        )
        assert counters["stats"]["unique_graphs"] < len(blocks)
        assert "4 x *.kernel (16, 16, 3): used by conv1d" in message


def test_a_gradient_that_stepped_in_backward_counts():
    model = Words(16)
    run = compiled(model, exclude=["heads.*"])
    optimizer = grass_fx.AdamW(model.named_parameters())
    grass_fx.step_in_backward(optimizer)
    assert step(model, run, optimizer, TOKENS) == []


# --- at whose line --------------------------------------------------------------------------------


def test_a_warning_at_compilation_is_at_the_line_that_called_the_model():
    """Between it and the backend stand torch's frames, of modules, wrappers and Dynamo."""
    model = nn.Sequential(mlp(16, 32), mlp(32, 16))
    run = torch.compile(model, backend="grass", options={**OPTIONS, "rank": 99})

    @torch.no_grad()
    def outer(x):
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return run(x)  # this line

    with pytest.warns(GrassWarning, match="took no weight") as caught:
        outer(X)
    (told,) = [each for each in caught if each.category is GrassWarning]
    with open(__file__) as file:
        assert file.readlines()[told.lineno - 1].strip() == "return run(x)  # this line"
    assert told.filename == __file__


def test_a_warning_at_a_compilation_after_a_graph_break_is_in_the_users_file():
    model = mlp(16, 32, 16)

    def broken(x):
        torch._dynamo.graph_break()
        return model(x)

    run = torch.compile(broken, backend="grass", options={**OPTIONS, "rank": 99})
    with pytest.warns(GrassWarning, match="took no weight") as caught:
        run(X)
    assert {each.filename for each in caught if each.category is GrassWarning} == {__file__}


def test_a_warning_of_too_many_compilations_is_in_the_users_file():
    model = mlp(16, 32, 16)
    run = torch.compile(model, backend="grass", options=OPTIONS, dynamic=False)
    with pytest.warns(GrassWarning, match="for the 5th time") as caught:
        for size in range(2, 8):
            run(X[0, :1].expand(size, 16))
    assert {each.filename for each in caught if each.category is GrassWarning} == {__file__}
