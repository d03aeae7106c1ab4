"""Options by names of weights, {pattern: value}: as plain options for each, and mistakes told."""

import copy
import io
import json

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.__main__ import main
from grass_fx.errors import OptionError
from grass_fx.state.registry import registry
from helpers import Captured, mlp

STEPS = 9
OWN = {
    "a.weight": {"rank": 4, "selection": "top", "refresh_every": 2},
    "b.weight": {"rank": 0.5, "selection": "uniform", "refresh_every": 3, "side": "out"},
    "c.weight": {"rank": 6, "selection": "multinomial_norm", "refresh_every": 4, "block": 2},
    "d.weight": {},  # no pattern matches it
}
BY_NAME = {
    option: {f"{name[0]}.*": own[option] for name, own in OWN.items() if option in own}
    for option in ("rank", "selection", "refresh_every", "side", "block")
}


class Branches(nn.Module):
    """Four layers in one graph whose gradients do not depend on one another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 12) for _ in range(4))

    def forward(self, x):
        return torch.cat([torch.tanh(each(x)) for each in self.children()], 1)


class Broken(nn.Module):
    """Two layers, each in a graph of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=Captured(**options))


def adamw(model):
    return grass_fx.AdamW(model.named_parameters(), lr=1e-2, warmup_steps=2)


def train(run, optimizer, first=0, last=STEPS):
    """What each weight's gradient was in each step: σ, C and whether it had scores."""
    seen = []
    for step in range(first, last):
        gen = torch.Generator().manual_seed(step)
        x = torch.randn(5, 16, generator=gen, dtype=torch.float64)
        run(x).square().mean().backward()
        grads = {name: run.get_parameter(name).grad for name in OWN}
        seen.append({
            name: (grad.selection.indices.tolist(), grad.compact.clone(), grad.scores is not None)
            for name, grad in grads.items()
        })  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_each_weight_trains_as_with_plain_options_of_its_own():
    """Over refreshes at different steps; scores come only where the weight's own rule is due."""
    start = Branches().double()
    model = copy.deepcopy(start)
    seen = train(compiled(model, **BY_NAME), adamw(model))
    for name, own in OWN.items():
        twin = copy.deepcopy(start)
        wanted = train(compiled(twin, **own), adamw(twin))
        for step, (got, want) in enumerate(zip(seen, wanted, strict=True)):
            assert got[name][::2] == want[name][::2], (name, step)
            torch.testing.assert_close(got[name][1], want[name][1], rtol=1e-12, atol=1e-12)
        got, want = model.get_parameter(name), twin.get_parameter(name)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    scored = {name: [step for step in range(STEPS) if seen[step][name][2]] for name in OWN}
    assert scored == {
        "a.weight": [0, 2, 4, 6, 8], "b.weight": [], "c.weight": [0, 4, 8], "d.weight": [],
    }  # fmt: skip


def test_only_graphs_with_a_rule_that_scores_have_a_variant_that_does():
    backend = Captured(rank=4, selection={"a.*": "top"})
    torch.compile(Broken(), backend=backend)(torch.randn(4, 8))
    assert [len(graph.graphs) for graph in backend.graphs] == [2, 1]


def test_a_run_resumes_exactly():
    start = Branches().double()
    model = copy.deepcopy(start)
    optimizer = adamw(model)
    run = compiled(model, **BY_NAME)
    train(run, optimizer, 0, 5)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    want = train(run, optimizer, 5)
    saved.seek(0)
    again = copy.deepcopy(start)
    other = adamw(again)
    of_model, of_optimizer = torch.load(saved)
    again.load_state_dict(of_model)
    other.load_state_dict(of_optimizer)
    got = train(compiled(again, **BY_NAME), other, 5)
    assert [{n: s[::2] for n, s in step.items()} for step in got] == [
        {n: s[::2] for n, s in step.items()} for step in want
    ]
    for one, two in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


# --- patterns that match nothing ------------------------------------------------------------------


def kept(model, optimizer):
    """What an error must not change."""
    selections = [getattr(registry.get(p), "selection", None) for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], selections, len(optimizer.state)


def same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return before[1:] == after[1:]


def test_a_pattern_that_matches_nothing_is_told_at_the_first_step_and_nothing_changes():
    other = mlp(8, 8)  # of which the options say nothing
    compiled(other, rank=4)(torch.randn(4, 8)).sum().backward()
    model, x = mlp(8, 8, 8), torch.randn(4, 8)
    optimizer = adamw(model)
    compiled(model, rank={"2.*": 4, "0.wight": 2})(x).sum().backward()
    before = kept(model, optimizer)
    says = r"rank: '0.wight' matches no parameter; the nearest is '0.weight'"
    for _ in range(2):
        with pytest.raises(OptionError, match=says):
            optimizer.step()
    assert same(before, kept(model, optimizer))
    optimizer.zero_grad()
    compiled(model, rank={"2.*": 4, "0.weight": 2})(x).sum().backward()
    optimizer.step()
    assert model[0].weight.grad.compact.shape == (8, 2)


def test_stepping_in_backward_tells_it_before_anything_moves():
    model = mlp(8, 8, 8)
    optimizer = adamw(model)
    grass_fx.step_in_backward(optimizer)
    loss = compiled(model, rank={"3.*": 4})(torch.randn(4, 8)).sum()
    before = kept(model, optimizer)
    with pytest.raises(OptionError, match="rank: '3.*' matches no parameter"):
        loss.backward()
    assert same(before, kept(model, optimizer))


@pytest.mark.parametrize("named", [True, False])
def test_what_another_graph_has_is_no_mistake(named):
    """With one optimizer for both graphs, and with one for each."""
    for apart in (False, True):
        model = Broken()
        run = compiled(model, rank={"a.*": 2, "b.*": 4}, selection={"a.weight": "uniform"})
        parts = [model.a, model.b] if apart else [model]
        optimizers = [
            grass_fx.AdamW(part.named_parameters() if named else part.parameters())
            for part in parts
        ]
        run(torch.randn(4, 8)).sum().backward()
        assert [each.weight.grad.compact.shape[1] for each in (model.a, model.b)] == [2, 4]
        for optimizer in optimizers:
            optimizer.step()


def test_what_a_dense_graph_has_is_no_mistake():
    """A table in a graph of its own, of which nothing is taken."""

    class Model(Broken):
        def __init__(self):
            super().__init__()
            self.a = nn.Embedding(12, 8)

    model = Model()
    optimizer = grass_fx.AdamW(model.parameters())
    with pytest.warns(grass_fx.errors.GrassWarning):
        compiled(model, rank={"a.*": 2, "b.*": 4})(torch.arange(6)).sum().backward()
        optimizer.step()


def test_what_is_met_later_is_no_mistake():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, second):
            return self.b(self.a(x)) if second else self.a(x)

    model = Model()
    run, optimizer = compiled(model, rank={"a.*": 2, "b.*": 4}), adamw(model)
    for second in (False, True):
        optimizer.zero_grad()
        run(torch.randn(4, 8), second).sum().backward()
        optimizer.step()
    assert model.b.weight.grad.compact.shape[1] == 4


# --- layers that are compiled one by one ----------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.up(x))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def one_by_one(named, **options):
    """The ranks, after a step; x needs a gradient, so that one graph serves all layers."""
    torch._dynamo.reset()
    model, backend = Layers(), Captured(**options)
    optimizer = grass_fx.AdamW(model.named_parameters() if named else model.parameters())
    for layer in model.layers:
        layer.compile(backend=backend)
    model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert len(backend.graphs) == 1
    optimizer.step()
    return [layer.up.weight.grad.compact.shape[1] for layer in model.layers]


def test_one_graph_of_many_layers_has_options_for_all_of_them():
    assert one_by_one(False, rank={"up.*": 2}) == [2] * 3
    assert one_by_one(True, rank={"layers.*.up.weight": 2}) == [2] * 3
    assert one_by_one(True, rank={"layers.2.*": 2, "*": 2}) == [2] * 3
    with pytest.raises(OptionError, match="rank: 'layers.*' matches no parameter"):
        one_by_one(False, rank={"layers.*": 2})


def test_one_graph_of_many_layers_cannot_have_one_for_each():
    says = (
        r"layers\.1\.up\.weight: torch\.compile uses the graph of layers\.0\.up\.weight for it, "
        "and patterns give the two other options"
    )
    with pytest.raises(OptionError, match=says):
        one_by_one(True, rank={"layers.0.*": 2, "*": 4})


# --- questions about a model ----------------------------------------------------------------------

WRONG = {"rank": {"c.*": 4, "e.*": 2}}


def test_explain_and_plan_tell_a_mistake_at_once():
    model, says = Branches(), r"rank: 'e\.\*' matches no parameter; the nearest is '[a-d]\."
    with pytest.raises(OptionError, match=says):
        grass_fx.explain(model, torch.randn(5, 16), options=WRONG)
    with pytest.raises(OptionError, match=says):
        grass_fx.plan(model, "1MB", rank=WRONG["rank"])
    with pytest.raises(OptionError, match=r"side: 'e\.\*' matches no parameter"):
        grass_fx.plan(model, "1MB", options={"side": {"e.*": "out"}})


def test_explain_and_plan_count_what_a_step_has():
    model = Branches()
    report = grass_fx.explain(
        model, torch.randn(5, 16), options={**BY_NAME, "compiler": "aot_eager"}
    )
    options = {option: values for option, values in BY_NAME.items() if option != "rank"}
    plan = grass_fx.plan(model, "1MB", rank=BY_NAME["rank"], options=options)
    optimizer = adamw(model)
    compiled(model, **BY_NAME)(torch.randn(5, 16)).square().mean().backward()
    optimizer.step()
    weights = {name: model.get_parameter(name) for name in OWN}
    ranks = {name: registry.get(w).spec.rank for name, w in weights.items()}
    assert plan.taken == ranks == {name: report[name].rank for name in OWN}
    assert [report[name].side for name in OWN] == ["in", "out", "in", "in"]
    compact = sum(w.grad.compact.nbytes for w in weights.values())
    scores = sum(w.grad.scores.nbytes for w in weights.values() if w.grad.scores is not None)
    state = sum(t.nbytes for w in weights.values() for t in optimizer.state[w].values())
    assert plan.parts["compact gradients"] == compact
    assert plan.parts["compact state"] == state
    assert plan.parts["scoring step"] == scores + model.a.weight.nbytes == report.scoring_step
    dense = sum(4 * p.numel() for p in model.parameters() if p.dim() == 1)
    assert report.after.gradient == compact + dense
    assert str(plan).startswith("rank by names, 4 to 8, 4 weights") and plan.rows == 8


def test_plan_finds_a_rank_beside_other_options_by_names():
    options = {"side": {"a.*": "out"}, "block": {"b.*": 4}, "selection": {"c.*": "top"}}
    plan = grass_fx.plan(Branches(), "1MB", options=options)
    assert plan.fits and plan.taken.keys() == OWN.keys()
    assert plan.taken["b.weight"] % 4 == 0


def test_plan_asks_no_option_of_what_is_not_taken():
    """The default rule of a bias could not draw with replacement, nor has its rank blocks."""
    model = Branches()
    options = {"selection": {"*.weight": "uniform"}, "replacement": True}
    options |= {"block": {"a.*": 8, "*": 1}, "exclude": "a.*"}
    plan = grass_fx.plan(model, "1MB", rank={"a.*": 12, "*": 4}, options=options)
    assert plan.taken.keys() == OWN.keys() - {"a.weight"}
    compiled(model, rank={"a.*": 12, "*": 4}, **options)(torch.randn(5, 16))  # nor does a step


RANKS = '{"*.mlp.*": 0.125, "*": 0.25}'


def test_the_command_line_takes_them_as_json(capsys):
    given = ["plan", "--shape", "llama-60m", "--memory", "1GB", "--json", "--rank", RANKS]
    assert main(given) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rank"] == json.loads(RANKS) and len(plan["taken"]) == 57
    ranks = [plan["taken"][f"layers.0.{name}.weight"] for name in ("mlp.up", "attention.wq")]
    assert ranks == [64, 128] and "embed.weight" not in plan["taken"]
    assert main([*given, "--lookups"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["taken"]["embed.weight"] == 128
    assert main([*given[:-1], '{"*.mpl.*": 0.125}']) == 2
    assert (
        "rank: '*.mpl.*' matches no parameter; the nearest is 'layers." in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main([*given[:-1], '{"*.mlp.*": 0.125'])
    assert "invalid" in capsys.readouterr().err
