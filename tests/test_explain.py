"""grass_fx.explain: what it says, against formulas, counters and steps that are really taken."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_cost import INSIDE
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import grass_fx
from grass_fx.__main__ import main
from grass_fx.errors import OptionError
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.html import as_html
from grass_fx.passes.observers import DISABLED
from grass_fx.state.registry import registry
from helpers import mlp
from llama import build

OPTIONS = {"rank": 8, "compiler": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def tokens(model, length=16):
    text = torch.randint(model.config.vocab, (2, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class Mixed(nn.Module):
    """Weights of every fate."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.tied = nn.Linear(32, 40, bias=False)
        self.up, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.scaled, self.frozen = nn.Linear(32, 32), nn.Linear(32, 32)
        self.unused, self.norm = nn.Linear(8, 8), nn.LayerNorm(32)
        self.frozen.requires_grad_(False)
        self.tied.weight = self.embed.weight

    def forward(self, x):
        x = self.norm(self.embed(x))
        x = self.frozen(x) + self.narrow(torch.relu(self.up(x)))
        x = F.linear(x, self.scaled.weight)
        return self.head(x) + self.tied(x)


def test_the_fate_of_every_weight_and_why():
    report = grass_fx.explain(Mixed(), torch.arange(40), options={**OPTIONS, "exclude": "head*"})
    fates = {weight.name: (weight.status, weight.reason) for weight in report.weights}
    assert fates.pop("embed.weight") == (
        "dense",
        "used by embedding, which is no matrix product with it; lookups=True takes it, gradient "
        "and state 15.4 kB -> 3.98 kB",
    )
    assert fates.pop("head.weight") == ("dense", "excluded by 'head*'")
    for name in ("up.weight", "narrow.weight", "scaled.weight"):
        assert fates.pop(name) == ("pushed", "")
    for name in ("unused.weight", "unused.bias", "scaled.bias"):
        assert fates.pop(name) == ("dense", "in no compiled training graph")
    assert {*fates} == {"up.bias", "narrow.bias", "norm.weight", "norm.bias"}
    assert {*fates.values()} == {("dense", "1 dimension, only matrices are taken")}
    up = report["up.weight"]
    assert (up.shape, up.side, up.rank, up.kernel) == ((64, 32), "in", 8, "gather + mm")
    assert up.selects == "columns" and "8  columns" in str(report)


@pytest.mark.parametrize("side", ["out", "in"])
def test_the_costs_of_a_linear_layer_are_those_of_the_formulas(side):
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48, requires_grad=True)
    report = grass_fx.explain(layer, x, options={**OPTIONS, "side": side})
    of = LinearCost(m=32, n=48, r=8, b=20, itemsize=4, side=side, ranks=2)
    before, after = report.before, report.after
    assert before.flops == report.full_flops == of.full_step_flops
    assert after.flops == report.flops == of.step_flops
    assert before.weight_gradient_bytes == of.full_gradient_traffic
    assert after.weight_gradient_bytes == of.compact_gradient_traffic
    assert before.forward_bytes == before.input_gradient_bytes == of.product_bytes
    assert (before.gradient, after.gradient) == (of.full_gradient_bytes, of.gradient_bytes)
    assert (before.state, after.state) == (of.full_state_bytes, of.state_bytes)
    assert (before.all_reduce, after.all_reduce) == (of.full_all_reduce_bytes, of.all_reduce_bytes)


def test_products_that_nobody_computes_are_not_counted():
    """The input of a model needs no gradient."""
    layer = nn.Linear(48, 32, bias=False)
    assert grass_fx.explain(layer, torch.randn(20, 48)).before.input_gradient_flops == 0


@pytest.mark.parametrize("scoring", ["gradient", "tiles"])
def test_scoring_steps_are_spread_over_a_period(scoring):
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48, requires_grad=True)
    options = {**OPTIONS, "selection": "top", "scoring": scoring, "refresh_every": 4}
    report = grass_fx.explain(layer, x, options=options)
    of = LinearCost(m=32, n=48, r=8, b=20, K=4, itemsize=4, side="in", scoring=scoring)
    assert report.flops == of.step_flops
    assert report.scoring_step == of.score_bytes + of.scoring_transient_bytes
    forever = grass_fx.explain(layer, x, options={**options, "refresh_every": float("inf")})
    assert forever.flops == LinearCost(m=32, n=48, r=8, b=20, side="in").step_flops
    frozen = grass_fx.explain(layer, x, options={**options, "selection": "frozen_top"})
    assert frozen.flops == forever.flops and frozen.scoring_step == report.scoring_step
    json.loads(forever.to_json(), parse_constant=pytest.fail)  # JSON knows no Infinity


def test_flops_are_those_counted_in_a_backward():
    model, x = mlp(24, 48, 16), torch.randn(20, 24, requires_grad=True)
    report = grass_fx.explain(model, x, options=OPTIONS)
    loss = torch.compile(model, backend="grass", options=OPTIONS)(x).square().sum()
    with FlopCounterMode(display=False, custom_mapping=INSIDE) as counter:
        loss.backward()
    after = report.after
    assert counter.get_total_flops() == after.input_gradient_flops + after.weight_gradient_flops


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "uniform", "replacement": True}, {"side": "in"}, {"lookups": True}],
    ids=str,
)
def test_predicted_bytes_are_those_of_a_training_step(options):
    """Gradients and state exactly, activations within 10 %."""
    options = {**OPTIONS, **options}
    model = build("smoke")
    batch = tokens(model)
    report = grass_fx.explain(model, *batch, options=options)
    compiled = torch.compile(model, backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.parameters())
    compiled(*batch).backward()  # what the first call makes stays
    model.zero_grad()
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *batch)}
    saved = {}

    def pack(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(*batch)
    activations = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in owned)
    assert report.activations[1] == pytest.approx(activations, rel=0.1)
    loss.backward()
    optimizer.step()
    held = {"gradient": 0, "state": 0}
    for parameter in model.parameters():
        grad = parameter.grad
        held["gradient"] += getattr(grad, "compact", grad).nbytes
        held["state"] += sum(
            each.nbytes for each in optimizer.state[parameter].values() if torch.is_tensor(each)
        )
    assert held == {"gradient": report.after.gradient, "state": report.after.state}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp(24, 48, 16)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_recomputed_products_count_twice():
    x = torch.randn(20, 24, requires_grad=True)
    plain = grass_fx.explain(mlp(24, 48, 16), x, options=OPTIONS)
    torch._dynamo.reset()
    again = grass_fx.explain(Checkpointed(), x, options=OPTIONS)
    first = plain.weights[0].name
    assert again[f"inner.{first}"].after.forward_flops == 2 * plain[first].after.forward_flops
    assert again.activations[1] < plain.activations[1]


class Concatenated(nn.Module):
    """Three weights in one product, of different sizes."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(rows, 32) for rows in (16, 16, 64))

    def forward(self, x):
        return x @ torch.cat(list(self.parts)).T


def test_weights_that_share_a_product_have_their_parts_of_it():
    x = torch.randn(20, 32, requires_grad=True)
    report = grass_fx.explain(Concatenated(), x, options=OPTIONS)
    for weight in report.weights:
        of = LinearCost(*weight.shape, r=8, b=20, side=weight.side)
        assert weight.before.flops == of.full_step_flops, weight.name
        assert weight.after.flops == of.step_flops, weight.name


class Rows(nn.Module):
    """Every other row of a weight is used, which no rule passes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 24))

    def forward(self, x):
        return x @ self.weight[::2].T


def test_a_selection_that_is_not_pushed_forms_the_full_gradient():
    report = grass_fx.explain(Rows(), torch.randn(20, 24), options={**OPTIONS, "side": "out"})
    (weight,) = report.weights
    assert weight.status == "taken" and "slice" in weight.reason
    assert weight.kernel == "mm, then gather"
    assert weight.after.weight_gradient_flops == weight.before.weight_gradient_flops
    assert weight.after.gradient == weight.before.gradient // 4
    assert "is formed for 1 of them" in str(report) and weight.reason in str(report)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x):
        return torch.bmm(x, self.experts)


def test_a_stack_of_matrices_has_the_costs_of_all_of_them():
    report = grass_fx.explain(Experts(), torch.randn(4, 10, 16), options=OPTIONS)
    weight = report["experts"]
    assert (weight.status, weight.rank, weight.side) == ("pushed", 8, "in")
    assert weight.selects == "rows"  # x @ W: features of the input are rows of W
    of = LinearCost(16, 8, r=8, b=10, itemsize=4, side="out", matrices=4)
    assert weight.before.weight_gradient_flops == of.full_gradient_flops
    assert weight.after.weight_gradient_flops == of.compact_gradient_flops
    assert weight.after.state == of.state_bytes


class Halves(nn.Module):
    """Each half of a weight multiplies another input: the selected columns are masked."""

    def __init__(self, halves):
        super().__init__()
        self.weight, self.halves = nn.Parameter(torch.randn(32, 64)), halves

    def forward(self, x):
        parts = self.weight[:, :32], self.weight[:, 32:]
        return sum(x @ part.T for part in parts[: self.halves])


@pytest.mark.parametrize("halves", [1, 2])
def test_parts_of_a_weight_are_pushed_and_have_their_products(halves):
    report = grass_fx.explain(Halves(halves), torch.randn(20, 32), options=OPTIONS)
    (weight,) = report.weights
    assert (weight.status, weight.reason, weight.kernel) == ("pushed", "", "gather + mm")
    assert weight.before.forward_flops == halves * 2 * 20 * 32 * 32
    assert weight.after.weight_gradient_flops == halves * 2 * 20 * 32 * 8


class OfOne(nn.Module):
    """A product with a vector, which is traced as multiplications and a sum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 24))

    def forward(self, x):
        return self.weight @ x


def test_what_is_pushed_is_told_so_though_its_products_are_traced_as_something_else():
    model, x = OfOne(), torch.randn(24)
    (weight,) = grass_fx.explain(model, x, options=OPTIONS).weights
    assert (weight.status, weight.reason) == ("pushed", "")
    torch.compile(model, backend="grass", options=OPTIONS)(x).sum().backward()
    assert model.weight.grad.compact.shape == (16, 8)


def test_a_weight_is_found_by_its_name():
    report = grass_fx.explain(mlp(24, 48, 16), torch.randn(20, 24), options=OPTIONS)
    assert list(report) == [weight.name for weight in report.weights]
    assert "2.weight" in report and "3.weight" not in report
    with pytest.raises(KeyError, match=r"2\.wieght: did you mean '2\.weight'"):
        report["2.wieght"]


# --- side effects ---------------------------------------------------------------------------------


class Moody(nn.Module):
    """Buffers that move, randomness, and a graph break."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)

    def forward(self, x):
        x = F.dropout(self.norm(self.first(x)), 0.5, self.training)
        torch._dynamo.graph_break()
        return self.last(x)


def test_nothing_is_touched():
    model, x = Moody(), torch.randn(8, 16)
    model.first.weight.grad = torch.ones(32, 16)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    grad = model.first.weight.grad
    report = grass_fx.explain(model, x, options=OPTIONS)
    assert report.graphs == 2
    assert [w.name for w in report.weights if w.taken] == ["first.weight", "last.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    for (name, now), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, old), name
    assert model.first.weight.grad is grad and bool((grad == 1).all())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert not any(registry.get(p) for p in model.parameters())


class Average(nn.Module):
    """One buffer is another tensor after a forward, one lies in memory more than once."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("ones", torch.ones(1, 16).expand(4, 16))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.up(x) + self.mean + self.ones.sum()


def test_buffers_are_the_same_tensors_afterwards():
    model = Average()
    before = dict(model.named_buffers())
    report = grass_fx.explain(model, torch.ones(8, 16), options=OPTIONS)
    assert report["up.weight"].status == "pushed"
    assert all(buffer is before[name] for name, buffer in model.named_buffers())
    assert not model.mean.any()


def test_what_is_compiled_before_and_after_knows_nothing_of_it():
    """No recompilation, no limit that is used up, no dynamic sizes from another batch size."""
    model = mlp(24, 48, 16)
    compiled = torch.compile(model, backend="grass", options=OPTIONS)
    compiled(torch.randn(20, 24)).sum().backward()
    sizes = range(2, 14)
    reports = [grass_fx.explain(model, torch.randn(b, 24), options=OPTIONS) for b in sizes]
    assert [report.flops for report in reports] == [reports[0].flops // 2 * b for b in sizes]
    assert not any(report.symbols for report in reports)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(torch.randn(20, 24))
    graphs = []

    def backend(gm, inputs):
        graphs.append([each for each in inputs if isinstance(each, torch.SymInt)])
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(20, 24))
    assert graphs == [[]]


# --- symbols, devices, errors ---------------------------------------------------------------------


def test_with_dynamic_shapes_amounts_are_expressions():
    model, x = mlp(24, 48, 16), torch.randn(20, 24, requires_grad=True)
    static = grass_fx.explain(model, x, options=OPTIONS)
    report = grass_fx.explain(model, x, options=OPTIONS, dynamic=True)
    assert list(report.symbols.values()) == [20]
    (symbol,) = report.symbols
    assert {str(each) for each in report.flops.free_symbols} == {symbol}
    assert report.flops.subs({symbol: 20}) == static.flops
    assert report.flops.subs({symbol: 40}) == 2 * static.flops
    for (name, *ours, _), (_, *theirs, _) in zip(report.rows(), static.rows(), strict=True):
        assert [report.evaluated(each) for each in ours] == theirs, name
    assert f"Amounts at {symbol} = 20" in str(report)
    json.dumps(report.to_dict())


class Broken(nn.Module):
    """Two graphs whose inputs have one name and different sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x):
        x = self.a(x)
        torch._dynamo.graph_break()
        x = x.reshape(-1, 12).sin()
        torch._dynamo.graph_break()
        return self.b(x)


def test_symbols_of_several_graphs_are_told_apart():
    x = torch.randn(20, 24, requires_grad=True)
    static = grass_fx.explain(Broken(), x, options=OPTIONS)
    report = grass_fx.explain(Broken(), x, options=OPTIONS, dynamic=True)
    assert {20, 40} <= set(report.symbols.values())
    for (name, *ours, _), (_, *theirs, _) in zip(report.rows(), static.rows(), strict=True):
        assert [report.evaluated(each) for each in ours] == theirs, name


class Chosen(nn.Module):
    """How many rows there are depends on the data."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.up(x[x[:, 0] > 0])


def test_a_size_that_depends_on_data_stays_a_symbol():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = grass_fx.explain(Chosen(), torch.randn(20, 24), options=OPTIONS)
    assert report.graphs == 1 and report.evaluated(report.flops) is None
    assert str(report.flops) in str(report)
    assert "No bars" in as_html(report)


def test_a_model_on_the_meta_device_is_explained_without_memory():
    with torch.device("meta"):
        large, x = nn.Linear(1 << 20, 1 << 20, bias=False), torch.empty(4, 1 << 20)
    report = grass_fx.explain(large, x, options={"rank": 0.25})
    assert report.after.gradient == report.weight_bytes // 4


def test_what_cannot_be_explained_says_so():
    model, x = mlp(24, 48, 16), torch.randn(20, 24)
    with pytest.raises(OptionError, match="no torch.nn.Module"):
        grass_fx.explain(lambda: None, x)
    with torch.no_grad(), pytest.raises(OptionError, match="gradients are disabled"):
        grass_fx.explain(model, x)
    with pytest.raises(OptionError, match="rank"):
        grass_fx.explain(model, x, options={"rnk": 4})
    nothing = grass_fx.explain(nn.LayerNorm(24), x)
    assert "Nothing is rewritten" in str(nothing) and nothing.flops == 0


def test_a_compiled_module_is_its_model():
    model, x = mlp(24, 48, 16), torch.randn(20, 24)
    compiled = torch.compile(model, backend="grass", options=OPTIONS)
    assert str(grass_fx.explain(compiled, x)) == str(grass_fx.explain(model, x))


def with_inputs(way):
    x = torch.randn(4, 8)
    return mlp(8, 12), {"one": x, "several": (x,), "named": {"input": x}}[way]


@pytest.mark.parametrize("way", ["one", "several", "named"])
def test_a_function_may_give_inputs_in_any_way(way, monkeypatch, capsys):
    monkeypatch.setattr(f"{__name__}.made", lambda: with_inputs(way), raising=False)
    assert main(["explain", "--model", f"{__name__}:made", "--rank", "4"]) == 0
    assert "1 of 1 weight matrices" in capsys.readouterr().out


def test_the_command_line_explains_the_example(capsys, tmp_path):
    given = ["--model", "llama:build", "--rank", "0.125", "--inputs", "2x8:int64:256"]
    assert main(["explain", *given, "--device", "meta"]) == 0
    text = capsys.readouterr().out
    assert "15 of 16 weight matrices get compact gradients" in text
    assert "embed.weight" in text and "used by embedding" in text
    assert text.startswith("llama:build on meta, inputs (2, 8) int64; rank = 0.125.\n")
    for wrong in ("llama:nothing", "no_such_module:build", "llama:Config"):
        assert main(["explain", "--model", wrong]) == 2
        assert f"--model {wrong}" in capsys.readouterr().err
    assert main(["explain", *given[:4], "--inputs", "2xx8"]) == 2


def test_made_up_inputs_that_do_not_fit_are_told(capsys, tmp_path, monkeypatch):
    (tmp_path / "short_model.py").write_text(
        "import torch\n"
        "class Short(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.words, self.places = torch.nn.Embedding(50, 8), torch.nn.Embedding(16, 8)\n"
        "    def forward(self, x):\n"
        "        return self.words(x) + self.places(torch.arange(x.shape[1]))\n"
        "build = Short\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", "--model", "short_model"]) == 2
    message = capsys.readouterr().err
    assert "failed on made-up inputs" in message and "--inputs, such as" in message


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_without_a_tensor_among_its_inputs(dynamic):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            places = torch.ones(x.shape[0]).cumsum(0)
            torch._dynamo.graph_break()
            return self.a(x).sum() * places.sum()

    x = torch.randn(5, 16)
    report = grass_fx.explain(Model(), x, options={"rank": 4}, dynamic=dynamic)
    assert report.graphs == 1 and report.weights[0].status == "pushed"


# --- the graph that is compiled -------------------------------------------------------------------


class Hidden(nn.Module):
    """The input of ``down`` is made in the forward, and nothing else needs it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


def test_after_is_the_graph_that_is_compiled():
    report = grass_fx.explain(Hidden(), torch.randn(6, 16), options={"rank": 4})
    weight = next(w for w in report.weights if w.name == "down.weight")
    after = {node.label: node for node in weight.pictures["after"]}
    assert after["select"].shape == "(6, 4)" and len(after["select"].inputs) == 2
    assert after["select"].name in after["mm"].inputs and after["mm"].shape == "(8, 4)"
    assert "selected_mm" not in after
    assert not any(node.label == "select" for node in weight.pictures["before"][:-1])


@pytest.mark.parametrize(
    "name, label", [("keep_selected", "selected_mm"), ("push_selection", "mm")]
)
def test_after_is_without_what_is_disabled(name, label):
    options = {"rank": 4, "disable_passes": [name]}
    report = grass_fx.explain(Hidden(), torch.randn(6, 16), options=options)
    weight = next(w for w in report.weights if w.name == "down.weight")
    labels = [node.label for node in weight.pictures["after"]]
    assert ("selected_mm" if name == "keep_selected" else "mm") in labels
    if name == "push_selection":
        assert weight.reason == DISABLED
