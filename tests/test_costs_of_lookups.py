"""What explain and plan say of lookups: their costs, and what the option ``lookups`` would save."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grass_fx
from grass_fx.__main__ import main
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.text import readable


class Table(nn.Module):
    """20 tokens are looked up in a (40, 16) table, which may be the head as well."""

    def __init__(self, tied, use=F.embedding):
        super().__init__()
        self.head, self.use = nn.Linear(16, 40, bias=False), use
        self.table = self.head.weight if tied else nn.Parameter(torch.randn(40, 16))

    def forward(self, tokens):
        return self.head(torch.tanh(self.use(tokens, self.table)))


@pytest.mark.parametrize(
    ("tied", "use"), [(True, F.embedding), (False, F.embedding), (True, lambda x, w: w[x])]
)
def test_a_lookup_has_the_costs_of_what_it_moves(tied, use):
    """In bytes its rows, read and written; in FLOPs one addition for each number of D."""
    model, tokens = Table(tied, use), torch.arange(20).view(4, 5)
    options = {"rank": 4, "compiler": "aot_eager"}
    dense = grass_fx.explain(model, tokens, options=options)["table"]
    taken = grass_fx.explain(model, tokens, options={**options, "lookups": True})["table"]
    of = LinearCost(m=40, n=16, r=4, b=20, itemsize=4, side="in", ranks=2)
    before, after = taken.before, taken.after
    assert (taken.status, taken.side, taken.rank) == ("pushed", "in", 4)
    assert taken.kernel == ("gather + mm, index add" if tied else "index add")
    assert before.forward_flops == after.forward_flops == tied * of.forward_flops
    assert before.forward_bytes == tied * of.product_bytes + 2 * 4 * 20 * 16
    assert before.weight_gradient_flops == tied * of.full_gradient_flops + 20 * 16
    assert after.weight_gradient_flops == tied * of.compact_gradient_flops + 20 * 4
    assert before.weight_gradient_bytes == tied * of.full_gradient_traffic + 4 * (20 + 40) * 16
    assert after.weight_gradient_bytes == tied * of.compact_gradient_traffic + 4 * (20 + 40) * 4
    assert (after.gradient, after.state) == (of.gradient_bytes, of.state_bytes)
    assert dense.status == "dense" and dense.before == dense.after == before
    assert dense.reason.endswith("lookups=True takes it, gradient and state 7.68 kB -> 2 kB")
    assert before.gradient + before.state == 7684 and after.gradient + after.state == 2000


def test_what_another_graph_leaves_anyway_is_not_said_to_be_saved():
    class Broken(Table):
        def forward(self, tokens):
            x = self.use(tokens, self.table)
            torch._dynamo.graph_break()
            return self.head(x).sum() + self.table.sin().sum()

    reason = grass_fx.explain(Broken(False), torch.arange(20), options={"rank": 4})["table"].reason
    assert "lookups=True takes it; used by sin" in reason and "->" not in reason


def test_the_command_line_takes_lookups_and_ranks_by_names(monkeypatch, capsys):
    made = (Table(False), torch.arange(20))
    monkeypatch.setattr(f"{__name__}.made", lambda: made, raising=False)
    given = ["explain", "--model", f"{__name__}:made", "--lookups", "--rank"]
    assert main([*given, '{"table": 2, "*": 0.25}', "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert {each["name"]: each["rank"] for each in weights} == {"table": 2, "head.weight": 8}
    assert main([*given, '{"tables": 2}']) == 2
    assert "rank: 'tables' matches no parameter; the nearest is 'table'" in capsys.readouterr().err


class Model(nn.Module):
    def __init__(self, tied=True, **table):
        super().__init__()
        self.table, self.layer = nn.Embedding(40, 16, **table), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.layer(self.table(tokens))))


# the model, options, and whether the option takes the table
PLANS = [
    ({}, {}, True),
    ({"tied": False}, {}, True),
    ({"padding_idx": 0}, {"side": "auto"}, True),
    ({"max_norm": 1.0}, {}, False),
    ({"tied": False, "sparse": True}, {}, False),
    ({}, {"side": "out"}, False),
    ({}, {"side": {"table*": "out"}}, False),
    ({"tied": False}, {"exclude": ["table*"]}, False),
]


@pytest.mark.parametrize(("given", "options", "takes"), PLANS, ids=str)
def test_plan_counts_a_table_where_the_option_takes_it(given, options, takes):
    """Its FLOPs are those of the products of the head that it is tied to."""
    model, tied = Model(**given), given.get("tied", True)
    dense, plan = (
        grass_fx.plan(model, "1MB", rank=4, tokens=20, options={**options, "lookups": lookups})
        for lookups in (False, True)
    )
    products = {"layer.weight"} | (set() if tied else {"head.weight"})
    table = {"table.weight"} if takes else set()
    for each, more in ((dense, set()), (plan, table)):
        assert each.taken.keys() == products | more
        shapes = [model.get_parameter(name).shape for name in products | (more if tied else set())]
        costs = [LinearCost(m, n, 4, 20) for m, n in shapes]
        assert each.flops["full rank"] == sum(of.full_step_flops for of in costs)
    told = [[note for note in each.notes if "embeddings" in note] for each in (dense, plan)]
    sums = (each.total - each.parts.get("optimizer step", 0) for each in (dense, plan))
    saved = readable(next(sums) - next(sums), "bytes")
    assert told == [[f"embeddings train dense; lookups=True takes them, {saved} less"] * takes, []]


def test_plan_promises_nothing_at_full_rank():
    plan = grass_fx.plan(Model(), "1MB", rank=16)
    assert plan.taken == {"layer.weight": 16} and not any("lookups" in note for note in plan.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_with_lookups_has_the_bytes_of_a_real_step(tied):
    model, options = Model(tied), {"lookups": True, "compiler": "aot_eager"}
    plan = grass_fx.plan(model, "1MB", rank=4, options=options)
    compiled = torch.compile(model, backend="grass", options={"rank": 4, **options})
    optimizer = grass_fx.AdamW(model.parameters())
    compiled(torch.arange(20)).square().sum().backward()
    optimizer.step()
    assert plan.parts["compact gradients"] == sum(p.grad.compact.nbytes for p in model.parameters())
    states = (t.nbytes for p in model.parameters() for t in optimizer.state[p].values())
    assert plan.parts["compact state"] == sum(states)
    assert plan.parts["dense gradients"] == plan.parts["dense state"] == 0


def test_the_command_line_plans_with_lookups(capsys):
    given = ["plan", "--shape", "llama-60m", "--memory", "1GB", "--rank", "64", "--tokens", "4x32"]
    flops = set()
    for more, count in (([], 57), (["--lookups"], 58)):
        assert main([*given, *more]) == 0
        printed = capsys.readouterr().out
        assert f"{count} weights in the subspace" in printed
        assert ("lookups=True takes them, 86 MB less" in printed) == (not more)
        flops.add(printed.split("FLOPs")[1].splitlines()[0])
    assert len(flops) == 1  # a table that is no head has no products
