"""Blocks that do not divide a dimension: which rows they hold, how they score, how they train."""

import copy
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import begin, refused, train
from torch import nn

import grass_fx
from grass_fx.config import RULES
from grass_fx.errors import StateError
from grass_fx.state.refresh import finish_steps
from grass_fx.state.registry import registry
from grass_fx.state.rules import multinomial, stream
from grass_fx.state.sharding import Shards, common_parts
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace
from grass_fx.state.units import Units
from grass_fx.testing import rules as reference
from helpers import Captured, taken_and_left

CPU = torch.device("cpu")
WITHOUT = list(RULES)
WITH = [rule for rule, facts in RULES.items() if facts.replacement]


@st.composite
def selections(draw):
    """(size, block, ascending units, as many as blocks fit into the size or fewer)"""
    block = draw(st.integers(1, 9))
    size = draw(st.integers(block, 70))
    count = draw(st.integers(1, size // block))
    units = draw(st.permutations(range(-(-size // block))))[:count]
    return size, block, sorted(units)


@given(selections())
@settings(max_examples=400, deadline=None)
def test_a_selection_holds_all_rows_of_its_units_in_as_many_places(case):
    size, block, chosen = case
    units = Units(size, block)
    rows = units.rows(torch.tensor(chosen))
    assert rows.shape == (len(chosen) * block,)
    assert bool((rows.diff() > 0).all()) and int(rows[0]) >= 0 and int(rows[-1]) < size
    own = {row for unit in chosen for row in range(unit * block, min(size, (unit + 1) * block))}
    assert own <= set(rows.tolist())
    # What graphs rely on: runs of this length, which begin at multiples of it.
    run = math.gcd(block, size)
    runs = rows.view(-1, run)
    assert torch.equal(runs, runs[:, :1] + torch.arange(run))
    assert bool((runs[:, 0] % run == 0).all())
    assert units.of(rows).tolist() == chosen
    spans = reference.spans(size, block, overlap=False)
    assert rows.tolist() == reference.places(spans, chosen, block)
    if size % block == 0 or chosen[-1] < units.count - 1:
        assert rows.view(-1, block)[:, 0].tolist() == [unit * block for unit in chosen]


def test_places_of_a_last_unit():
    """14 rows in blocks of 4: the units begin at 0, 4, 8 and 12, and the last has two rows."""
    units = Units(14, 4)
    for chosen, firsts in {
        (1, 3): [4, 10],  # rows 10 and 11 come along
        (2, 3): [6, 10],  # the unit before it makes room
        (1, 2, 3): [2, 6, 10],
        (0, 2, 3): [0, 6, 10],
        (0, 1, 2): [0, 4, 8],
    }.items():
        rows = units.rows(torch.tensor(chosen)).view(-1, 4)
        assert rows[:, 0].tolist() == firsts and torch.equal(rows, rows[:, :1] + torch.arange(4))
    assert (
        Units(14, 4, True).rows(torch.tensor([2, 3, 3])).tolist()
        == [*range(8, 12)] + [*range(10, 14)] * 2
    )


def test_norms_are_those_of_the_units_own_rows():
    s = torch.tensor([9.0, 16.0, 0.0, 4.0, 1.0, 3.0, 36.0])
    assert Units(7, 3).norms(s).tolist() == pytest.approx([5.0, math.sqrt(8), 6.0], rel=1e-15)
    assert Units(7, 3).norms(s.expand(2, 3, 7)).shape == (2, 3, 3)
    # With replacement rows 4 and 5 are halves in two units: 1/4 and 3/4 of their squares in each.
    halves = [5.0, math.sqrt(4 + 1), math.sqrt(1 + 36)]
    assert Units(7, 3, True).norms(s).tolist() == pytest.approx(halves, rel=1e-15)
    assert s.tolist()[4:6] == [1.0, 3.0]  # it changes nothing of the scores


# --- the rules ------------------------------------------------------------------------------------


def subspace_of(selection, size, rank, block, parts=1, stack=None, every=1, **options):
    replacement = options.pop("replacement", False)
    spec = SubspaceSpec(
        size, 1 if stack else 0, "out", rank, block, selection, replacement, every, seed=3,
        parts=parts, stack=stack,
    )  # fmt: skip
    return Subspace(spec, 0, "a.weight", CPU, torch.float32)


def scores_of(step, rows):
    return torch.rand(rows, generator=torch.Generator().manual_seed(step)) + 0.01


WALKS = [(5461, 32, 672), (5461, 16, 688), (5461, 8, 680), (17, 8, 16), (23, 3, 6), (7, 4, 4)]


@pytest.mark.parametrize(("size", "block", "rank"), WALKS)
def test_cyclic_selects_every_row_in_the_first_cycle_and_every_unit_equally_often(
    size, block, rank
):
    subspace = subspace_of("cyclic", size, rank, block)
    units, cycle = Units(size, block), -(-size // rank)
    seen, visits = torch.zeros(size, dtype=torch.bool), torch.zeros(units.count)
    for period in range(1, 3 * cycle + 1):
        rows = subspace.selection.indices
        assert rows.shape == (rank,) and len(rows.unique()) == rank
        seen[rows] = True
        assert bool(seen.all()) or period < cycle
        visits[units.of(rows)] += 1
        assert set((visits - period * rank // block // units.count).tolist()) <= {0, 1}
        finish_steps([(subspace, None)])
    assert subspace.history.coverage == 1


@pytest.mark.parametrize("rule", ["top", "frozen_top"])
def test_top_takes_the_units_of_largest_norm(rule):
    """2 of 22 rows are in the last unit; what its places take from the unit before counts not."""
    s = torch.ones(22) * 0.1
    s[20:] = 2.0  # the last unit, norm² 4
    s[8:12] = 1.5  # unit 2, norm² 6
    s[4:8] = 0.9  # unit 1, norm² 3.6
    subspace = subspace_of(rule, 22, 8, 4)
    finish_steps([(subspace, s)])
    assert subspace.selection.indices.tolist() == [8, 9, 10, 11, 18, 19, 20, 21]
    held = s[subspace.selection.indices].double().sum()
    assert subspace.history.captured == pytest.approx(float((held / s.double().sum()).sqrt()))
    assert subspace.frozen == (rule == "frozen_top")


@pytest.mark.parametrize("rule", WITH)
@pytest.mark.parametrize(("size", "block"), [(7, 3), (11, 4), (9, 8), (12, 4), (5, 1)])
def test_with_replacement_the_expectation_is_exact(rule, size, block):
    """Σ_u k q_u · ρ² · share² of each row's units is 1, whatever q is: E[PPᵀ] = 1."""
    units, count = Units(size, block, True), 5
    s = scores_of(size, size)
    norms = units.norms(s) if rule != "uniform" else torch.ones(units.count, dtype=torch.float64)
    weights = norms ** RULES[rule].power
    q = weights / weights.sum()
    drawn, rho = multinomial(weights, count, True, stream(0, 0, 0))
    torch.testing.assert_close(rho, (count * q[drawn]).rsqrt(), rtol=1e-12, atol=0)
    expected = torch.zeros(size, dtype=torch.float64)
    for unit in range(units.count):
        rows = units.rows(torch.tensor([unit]))
        weight = count * q[unit] * (units.shares(rows) / (count * q[unit]).sqrt()) ** 2
        expected.index_add_(0, rows, weight)
    torch.testing.assert_close(expected, torch.ones_like(expected), rtol=1e-14, atol=0)


def test_with_replacement_norms_give_the_least_variance():
    """Of q ∝ the norms of the units' halves; the formula is docs/method.md's, exact in fractions.

    The variance of PPᵀG in one draw is Σ_u ‖G_u‖² / q_u − ‖G‖², with G the sum of all G_u.
    """
    units = Units(7, 3, True)
    g = [Fraction(k) for k in (3, 1, 2, 5, 1, 4, 2)]  # one column
    held = [range(0, 3), range(3, 6), range(4, 7)]
    parts = [[g[r] / (2 if r in (4, 5) else 1) if r in own else 0 for r in range(7)]
             for own in held]  # fmt: skip
    assert [sum(column) for column in zip(*parts, strict=True)] == g

    def variance(q):
        squared = Fraction(0)
        for chance, part in zip(q, parts, strict=True):
            squared += sum((p / chance - x) ** 2 for p, x in zip(part, g, strict=True)) * chance
        return squared

    s = torch.tensor([float(x**2) for x in g])
    squares = [sum(x**2 for x in part) for part in parts]
    torch.testing.assert_close(units.norms(s), torch.tensor(squares, dtype=torch.float64).sqrt())
    norms = [Fraction(math.sqrt(square)) for square in squares]
    best = variance([norm / sum(norms) for norm in norms])
    rng = random.Random(0)
    for _ in range(50):
        other = [norm * rng.randint(5, 15) for norm in norms]
        assert best <= variance([weight / sum(other) for weight in other]) + Fraction(1, 10**9)


@pytest.mark.parametrize("rule", WITH)
def test_with_replacement_shares_reach_the_selection(rule):
    subspace = subspace_of(rule, 11, 8, 4, replacement=True)
    for step in range(12):
        rows, rho = subspace.selection.indices, subspace.selection.scale.view(-1, 4)
        firsts = rows.view(-1, 4)[:, 0]
        assert bool((firsts.diff() >= 0).all()) and set(firsts.tolist()) <= {0, 4, 7}
        assert torch.equal(rows.view(-1, 4), firsts[:, None] + torch.arange(4))
        assert torch.equal(rho.amax(1, True).expand_as(rho)[rows.view(-1, 4) != 7],
                           rho[rows.view(-1, 4) != 7])  # fmt: skip
        halves = rho[rows.view(-1, 4) == 7]  # the only row of two units
        torch.testing.assert_close(halves, rho.amax(1)[firsts > 0] / math.sqrt(2))
        finish_steps([(subspace, scores_of(step, 11))])
        held = subspace.history.captured
        if rule != "uniform":
            s = scores_of(step, 11).double()
            now = s[subspace.selection.indices.unique()].sum()
            assert held == pytest.approx(float((now / s.sum()).sqrt()))


@pytest.mark.parametrize("rule", WITHOUT)
@pytest.mark.parametrize("pieces", [{"parts": 3}, {"stack": 3}], ids=["parts", "stack"])
def test_every_piece_has_a_last_unit_of_its_own(rule, pieces):
    whole = 33 if "parts" in pieces else 11
    subspace = subspace_of(rule, whole, 8 * (3 if "parts" in pieces else 1), 4, **pieces)
    starts, seen = torch.tensor([[0], [11], [22]]), torch.zeros(33, dtype=torch.bool)
    for step in range(6):
        rows = subspace.selection.indices.view(3, 8) - starts
        for piece in rows:
            chosen = Units(11, 4).of(piece)
            assert torch.equal(Units(11, 4).rows(chosen), piece)
        seen[subspace.selection.indices] = True
        finish_steps([(subspace, scores_of(step, 33))])
    assert bool(seen.all()) or rule not in ("cyclic", "uniform")


def test_a_matrix_without_scores_keeps_its_rows_and_scales():
    for replacement in (False, True):
        rule = "multinomial_norm"
        subspace = subspace_of(rule, 11, 8, 4, stack=2, replacement=replacement)
        finish_steps([(subspace, scores_of(0, 22))])
        before, scores = subspace.selection, scores_of(1, 22)
        scores[11:] = 0
        finish_steps([(subspace, scores)])
        now = subspace.selection
        assert torch.equal(now.indices[8:], before.indices[8:])
        if replacement:
            torch.testing.assert_close(now.scale[8:], before.scale[8:], rtol=2e-7, atol=0)
        s = scores.double()
        held = s[now.indices[:8].unique()].sum()
        assert subspace.history.captured == pytest.approx(float((held / s.sum()).sqrt()))


# --- saved states ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "replacement"), [
    *((rule, False) for rule in WITHOUT), *((rule, True) for rule in WITH),
])  # fmt: skip
def test_a_resumed_subspace_continues_exactly(rule, replacement):
    for pieces in ({}, {"stack": 2}):
        subspace = subspace_of(rule, 11, 8, 4, every=2, replacement=replacement, **pieces)
        rows = subspace.spec.rows
        for step in range(5):
            finish_steps([(subspace, scores_of(step, rows))])
        state = copy.deepcopy(subspace.state())
        resumed = subspace_of(rule, 11, 8, 4, every=2, replacement=replacement, **pieces)
        resumed.load(state)
        for step in range(5, 12):
            for each in (subspace, resumed):
                finish_steps([(each, scores_of(step, rows))])
            assert torch.equal(subspace.selection.indices, resumed.selection.indices)
        assert subspace.period == resumed.period


def test_the_block_is_saved_where_the_number_of_units_does_not_tell_it():
    states = {b: subspace_of("cyclic", 23, b * 2, b).state() for b in (1, 6, 7)}
    assert [states[b]["subspace_counters"].numel() for b in (1, 6, 7)] == [10, 11, 11]
    assert states[6]["subspace_order"].numel() == states[7]["subspace_order"].numel() == 4
    words = "12 rows of 23 in blocks of 6 .* 14 rows of 23 in blocks of 7 .* Compile with"
    with pytest.raises(StateError, match=words):
        subspace_of("cyclic", 23, 14, 7).load(states[6])


DAMAGES = {
    "another block": (10, 6, "subspace_order has 3 units, for 11 rows"),
    "a block that is negative": (10, -4, "block is -4"),
    "a block that is larger": (10, 99, "subspace_order has 3 units"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_refused(damage):
    place, value, words = DAMAGES[damage]
    state = subspace_of("cyclic", 11, 8, 4).state()
    state["subspace_counters"][place] = value
    with pytest.raises(StateError, match=words):
        subspace_of("cyclic", 11, 8, 4).load(state)


def test_rows_that_no_draw_gives_are_refused():
    good = [0, 1, 2, 3, 7, 8, 9, 10]
    for rows in ([0, 1, 2, 3, 6, 7, 8, 9], [1, 2, 3, 4, 7, 8, 9, 10], [0, 1, 2, 3, 5, 6, 7, 8]):
        subspace = subspace_of("cyclic", 11, 8, 4)
        state = subspace.state()
        subspace.load({**state, "subspace_indices": torch.tensor(good)})
        with pytest.raises(StateError, match="no blocks of 4"):
            subspace.load({**state, "subspace_indices": torch.tensor(rows)})


def test_a_checkpoint_of_single_rows_where_a_block_did_not_divide_is_told_what_to_do():
    """Older versions fell back to block=1 for such a weight."""
    model, compiled, optimizer = begin(rank=5)
    train(model, compiled, optimizer, 3)
    saved = optimizer.state_dict()
    model, compiled, optimizer = begin(rank=5, block=5)
    train(model, compiled, optimizer, 1)
    words = "5 rows of 8 in blocks of 1 .* in blocks of 5 .* delete this weight's entry .* anew"
    refused(model, optimizer, saved, words)
    for place in (0, 2):
        del saved["state"][place]
    optimizer.load_state_dict(saved)
    train(model, compiled, optimizer, 3)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_a_run_goes_on_from_its_checkpoint(make):
    options = {"block": 3, "selection": "multinomial_norm", "replacement": True}
    first = begin(make, torch.float64, **options)
    train(*first, 4)
    saved = copy.deepcopy(first[2].state_dict()), copy.deepcopy(first[0].state_dict())
    train(*first, 4, seed=1)
    second = begin(make, torch.float64, **options)
    second[0].load_state_dict(saved[1])
    second[2].load_state_dict(saved[0])
    train(*second, 4, seed=1)
    for got, want in zip(second[0].parameters(), first[0].parameters(), strict=True):
        assert torch.equal(got, want)


# --- whole models ---------------------------------------------------------------------------------


def test_a_block_that_exceeds_a_dimension_leaves_the_weight_with_the_reason():
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8))
    for rank in (0.25, 16):
        torch._dynamo.reset()
        taken, left = taken_and_left(model, torch.randn(4, 8), rank=rank, block=16)
        assert taken == ["1.weight"]
        assert left == {"0.weight": "block 16 exceeds its 8 input features"}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compact_gradients_are_those_of_the_rows(compiler):
    """Of plain matrices and a stack, for blocks that the ranks' rows do not divide."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(22, 14), nn.Linear(14, 6)
            self.experts = nn.Parameter(torch.randn(2, 14, 14, dtype=torch.float64))

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.last(torch.bmm(x.expand(2, -1, -1), self.experts))

    model = Model().double()
    twin = copy.deepcopy(model)
    options = {"rank": 8, "block": 4, "refresh_every": 1, "compiler": compiler}
    compiled = torch.compile(model, backend=Captured(**options))
    optimizer = grass_fx.AdamW(model.parameters(), lr=0.0)
    shifted = set()
    for step in range(6):
        x = torch.randn(9, 22, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for each, run in ((model, compiled), (twin, twin)):
            each.zero_grad()
            run(x).square().mean().backward()
        for name, p in model.named_parameters():
            full = twin.get_parameter(name).grad
            if p.dim() == 1:
                continue
            selection = registry.get(p).selection
            torch.testing.assert_close(p.grad.compact, selection.project(full))
            if bool((selection.indices[::4] % 4 != 0).any()):
                shifted.add(name)
        optimizer.step()
    assert shifted == {"first.weight", "last.weight", "experts"}


def test_common_parts_prefers_parts_of_whole_blocks():
    shards = Shards("group", 4)
    assert common_parts(shards, 64, 8, 32) == 4  # 8 parts of one block, of which half is selected
    assert common_parts(shards, 128, 8, 64) == 8
    assert common_parts(shards, 88, 2, 16) == 4  # 8 parts of 11 rows would also be alike
    assert common_parts(shards, 88, 4, 32) == 8
    assert common_parts(shards, 44, 4, 16) == 4
    assert common_parts(shards, 44, 4, 8) is None and common_parts(shards, 42, 1, 8) is None
    for size, block, rank in itertools.product((24, 40, 88, 96), (1, 2, 3, 8), (8, 16, 24, 48)):
        if rank % block == 0 and rank <= size:
            parts = common_parts(shards, size, block, rank)
            assert parts is None or rank // parts <= Units(size // parts, block).count * block
