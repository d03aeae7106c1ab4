"""The selection rules: what they draw, how often, and with which scale."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from grass_fx.config import RULES
from grass_fx.state.refresh import finish_steps
from grass_fx.state.rules import (
    cyclic,
    multinomial,
    select_by_norms,
    stream,
    top,
    tops,
)
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace
from grass_fx.state.units import Units

SIGMAS = 5  # every draw is seeded: a statistical test that passes once always passes
RANDOM_RULES = {"uniform": 0, "multinomial_norm": 1, "multinomial_norm_sq": 2}
SCORED_RULES = [name for name, rule in RULES.items() if rule.scores]


def select_by_scores(rule, scores, count, block, replacement, generator):
    norms = Units(scores.numel(), block).norms(scores)
    return select_by_norms(rule, norms, count, replacement, generator)


def draws(rule, scores, count, number, block=1, replacement=False):
    """``number`` independent draws by a rule: (units, ρ per unit)."""
    for draw in range(number):
        generator = stream(0, 0, draw)
        if rule == "uniform":
            even = torch.ones(scores.numel() // block)
            yield multinomial(even, count, replacement, generator)
        else:
            yield select_by_scores(RULES[rule], scores, count, block, replacement, generator)


# --- rule 10, cyclic ------------------------------------------------------------------------------


def walk_case(seed):
    """(units, units per piece, block)"""
    rng = random.Random(seed)
    units = rng.choice([1, 2, 3, rng.randint(1, 12), rng.randint(13, 60)])
    count = rng.choice([1, units, rng.randint(1, units), rng.randint(1, units)])
    return units, count, rng.choice([1, 1, 2, 3, 8])


WALKS = sorted({walk_case(seed) for seed in range(80)})
every_walk = pytest.mark.parametrize(("units", "count", "block"), WALKS)


def pieces_of_a_walk(units, count, number, seed=0):
    """The pieces of ``number`` periods in walking order, as :class:`Subspace` draws them."""
    order, position = torch.arange(units), units
    for period in range(number):
        piece, order, position = cyclic(order, position, count, stream(seed, 0, period))
        yield piece.tolist()


@every_walk
def test_a_walk_is_one_complete_permutation_after_the_other(units, count, block):
    number = 3 * math.ceil(units / count) + 3
    pieces = list(pieces_of_a_walk(units, count, number))
    assert all(len(piece) == len(set(piece)) == count for piece in pieces)
    walked = list(itertools.chain(*pieces))
    for start in range(0, len(walked) - units + 1, units):
        assert sorted(walked[start : start + units]) == list(range(units))


@every_walk
def test_cyclic_subspaces_visit_all_rows_equally_often(units, count, block):
    spec = SubspaceSpec(
        units * block, 0, "out", count * block, block, "cyclic", False, refresh_every=1, seed=3
    )
    subspace = Subspace(spec, 0, "w", torch.device("cpu"), torch.float32)
    visits = torch.zeros(units * block, dtype=torch.int64)
    for period in range(1, 3 * math.ceil(units / count) + 3):
        rows = subspace.selection.indices
        assert subspace.selection.scale is None
        assert rows.dtype == torch.int64
        assert rows.shape == (count * block,)
        assert bool((rows.diff() > 0).all())  # ascending, no row twice
        blocks = rows.view(count, block)
        assert bool((blocks[:, 0] % block == 0).all())
        assert torch.equal(blocks, blocks[:, :1] + torch.arange(block))
        visits[rows] += 1
        # As many permutations are complete as fit into the walk; of the next, each row once or not.
        complete = period * count // units
        assert set((visits - complete).tolist()) <= {0, 1}
        if period == math.ceil(units / count):
            assert bool((visits > 0).all())  # the first cycle covers all rows
        finish_steps([(subspace, None)])


@pytest.mark.parametrize(("units", "count"), [(5, 2), (7, 3), (10, 4), (9, 8), (3, 2)])
def test_a_piece_is_filled_from_the_next_permutation_which_keeps_its_order(units, count):
    pieces = pieces_of_a_walk(units, count, 3 * units)
    order = []  # what is left of the current permutation
    for period, piece in enumerate(pieces):
        expected, order = order[:count], order[count:]
        if len(expected) < count:
            permutation = torch.randperm(units, generator=stream(0, 0, period)).tolist()
            filling = [unit for unit in permutation if unit not in expected]
            filling = filling[: count - len(expected)]
            expected, order = expected + filling, [u for u in permutation if u not in filling]
        assert piece == expected


def test_walks_are_random():
    first = [tuple(next(pieces_of_a_walk(6, 2, 1, seed))) for seed in range(600)]
    counts = Counter(first)
    assert len(counts) == 30  # every ordered pair
    sigma = math.sqrt(600 / 30 * (1 - 1 / 30))
    assert all(abs(n - 600 / 30) < SIGMAS * sigma for n in counts.values())


# --- rules 5 and 9, top ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["top", "frozen_top"])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_top_takes_the_largest_norms_and_of_equal_ones_the_first(rule, block, levels):
    for seed in range(10):
        rng = random.Random(seed)
        units = rng.randint(2, 40)
        count = rng.randint(1, units)
        s = [float(rng.randint(1, levels)) for _ in range(units * block)]
        norms = [sum(s[u * block : (u + 1) * block]) for u in range(units)]
        best = sorted(range(units), key=lambda u: (-norms[u], u))[:count]
        scores = torch.tensor(s)
        drawn, scale = select_by_scores(RULES[rule], scores, count, block, False, stream(0, 0, 0))
        assert drawn.tolist() == best
        assert scale is None


def test_top_is_the_best_selection_of_all():
    g = torch.randn(8, 5, dtype=torch.float64, generator=stream(0, 0, 0))
    drawn, _ = select_by_scores(RULES["top"], g.square().sum(1), 3, 1, False, stream(0, 0, 1))

    def distance(rows, rho):
        kept = torch.zeros(8, 1, dtype=torch.float64)
        kept[list(rows), 0] = torch.tensor(rho, dtype=torch.float64) ** 2
        return float((g - kept * g).norm())

    least = distance(drawn.tolist(), [1.0] * 3)
    others = [c for c in itertools.combinations(range(8), 3) if set(c) != set(drawn.tolist())]
    assert len(others) == 55
    for rows in others:
        assert least < distance(rows, [1.0] * 3)
        assert least < distance(rows, torch.rand(3, generator=stream(0, 0, rows[0])).tolist())


@pytest.mark.parametrize("rule", ["top", "multinomial_norm", "multinomial_norm_sq"])
@pytest.mark.parametrize("block", [1, 2])
def test_few_positive_scores_are_made_up_by_a_uniform_draw(rule, block):
    units, count, positive, number = 8, 5, {2, 7}, 1000
    scores = torch.zeros(units, block)
    scores[2, 0], scores[7, -1] = 1.0, 3.0
    visits = Counter()
    for drawn, scale in draws(rule, scores.flatten(), count, number, block):
        assert scale is None
        assert len(set(drawn.tolist())) == drawn.numel() == count
        assert set(drawn[:2].tolist()) == positive
        visits.update(drawn[2:].tolist())
    chance = (count - len(positive)) / (units - len(positive))
    assert set(visits) == set(range(units)) - positive
    for n in visits.values():
        assert abs(n - number * chance) < SIGMAS * math.sqrt(number * chance * (1 - chance))


def test_top_draws_nothing_when_enough_rows_score():
    generator = stream(0, 0, 0)
    before = generator.get_state()
    drawn, _ = select_by_scores(RULES["top"], torch.tensor([1.0, 3, 2]), 2, 1, False, generator)
    assert drawn.tolist() == [1, 2]
    assert torch.equal(generator.get_state(), before)


def test_the_tops_of_many_are_the_tops_of_each_where_these_are_plain():
    norms = torch.rand(7, 40, dtype=torch.float64, generator=stream(0, 0, 0)) + 0.1
    norms[1, 3:] = 0.05  # equal ones at the border
    norms[2, 1:] = 0  # too few above zero
    norms[3, 3], norms[4, 0] = math.nan, math.inf
    norms[5, 7:9] = 2.0  # equal ones, both taken
    found = tops(norms, 8)
    assert [each is None for each in found] == [False, True, True, True, True, False, False]
    for row, units in zip(norms, found, strict=True):
        if units is not None:
            assert torch.equal(units, top(row, 8, stream(0, 0, 1)).sort().values)


# --- rules 6 to 8, multinomial --------------------------------------------------------------------


def random_gradient(units, block):
    """(units, block, n) float64, norms of the units from 0.5 to 3."""
    g = torch.randn(units, block, 3, dtype=torch.float64, generator=stream(0, 1, 0))
    spread = torch.linspace(0.5, 3, units, dtype=torch.float64)
    return g / g.norm(dim=(1, 2), keepdim=True) * spread[:, None, None]


def chances(rule, norms):
    q = norms ** RANDOM_RULES[rule]
    return q / q.sum()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("rule", RANDOM_RULES)
def test_with_replacement_the_projection_is_unbiased_and_has_the_variance_of_the_formula(
    rule, block
):
    units, count, number = 6, 2, 6000
    g = random_gradient(units, block)
    norms = g.norm(dim=(1, 2))
    q = chances(rule, norms)
    scores = g.square().sum(2).flatten()
    pairs = zip(*draws(rule, scores, count, number, block, replacement=True), strict=True)
    drawn, rho = (torch.stack(each) for each in pairs)
    assert drawn.shape == rho.shape == (number, count)
    torch.testing.assert_close(rho, 1 / (count * q[drawn]).sqrt(), rtol=1e-12, atol=0)
    weights = torch.zeros(number, units, dtype=torch.float64)  # of each unit in PPᵀG
    weights.scatter_add_(1, drawn, rho**2)
    sigma = ((1 - q) / (count * q) / number).sqrt()
    assert bool(((weights.mean(0) - 1).abs() < SIGMAS * sigma).all())  # E[PPᵀG] = G
    variance = float(((weights - 1) ** 2 @ norms**2).mean())
    formula = float((norms**2 / q).sum() - (norms**2).sum()) / count
    assert variance == pytest.approx(formula, rel=0.04)
    uniform = float((units - 1) * (norms**2).sum()) / count
    if rule == "multinomial_norm":
        assert formula < 0.8 * uniform
    else:  # squared norms gain nothing
        assert formula == pytest.approx(uniform)


@pytest.mark.parametrize("rule", ["multinomial_norm", "multinomial_norm_sq"])
def test_rows_of_zero_norm_are_never_drawn_with_replacement(rule):
    scores = torch.tensor([0.0, 1.0, 0.0, 0.0, 1e-30, 0.0])
    drawn = torch.cat([units for units, _ in draws(rule, scores, 40, 50, replacement=True)])
    assert set(drawn.tolist()) <= {1, 4}
    assert 1 in drawn


@pytest.mark.parametrize("rule", RANDOM_RULES)
def test_without_replacement_no_unit_repeats_and_nothing_is_scaled(rule):
    scores = random_gradient(9, 1).square().sum((1, 2))
    for count in (1, 4, 9):
        for drawn, scale in draws(rule, scores, count, 50):
            assert len(set(drawn.tolist())) == drawn.numel() == count
            assert scale is None


@pytest.mark.parametrize("rule", RANDOM_RULES)
def test_without_replacement_units_come_with_their_chances(rule):
    """The first unit with q_i, the second with q_j / (1 − q_i)."""
    norms, number = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 6000
    q = chances(rule, norms).tolist()
    pairs = Counter(tuple(drawn.tolist()) for drawn, _ in draws(rule, norms**2, 2, number))
    for i, j in itertools.permutations(range(4), 2):
        p = q[i] * q[j] / (1 - q[i])
        assert abs(pairs[i, j] - number * p) < SIGMAS * math.sqrt(number * p * (1 - p))


# --- streams and scores ---------------------------------------------------------------------------


def test_a_stream_is_a_function_of_three_integers():
    keys = list(itertools.product(range(4), range(4), range(4)))
    drawn = {key: tuple(torch.randperm(50, generator=stream(*key)).tolist()) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    torch.manual_seed(1)
    assert all(tuple(torch.randperm(50, generator=stream(*k)).tolist()) == drawn[k] for k in keys)
    # The same in every process and every version: checkpoints and ranks rely on it.
    assert stream(0, 0, 0).initial_seed() == 3063634974508857864
    assert stream(1, 2, 3).initial_seed() == 3296115596738981103


@pytest.mark.parametrize("rule", [*RANDOM_RULES, "top"])
def test_draws_leave_the_global_generator_alone(rule):
    scores = torch.tensor([0.0, 2.0, 1.0, 0.0])
    before = torch.get_rng_state()
    first = [units.tolist() for units, _ in draws(rule, scores, 3, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert [units.tolist() for units, _ in draws(rule, scores, 3, 5)] == first


@pytest.mark.parametrize("rule", SCORED_RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_unusable_scores_select_nothing(rule, bad):
    scores = torch.full((6,), bad)
    if bad:
        scores[1:] = 1.0
    replacement = RULES[rule].replacement
    assert select_by_scores(RULES[rule], scores, 2, 2, replacement, stream(0, 0, 0)) is None


@pytest.mark.parametrize("rule", SCORED_RULES)
@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_scores_of_any_size_are_usable(rule, scale):
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5]) * scale
    expected = select_by_scores(RULES[rule], scores / scale, 2, 1, False, stream(0, 0, 0))
    drawn = select_by_scores(RULES[rule], scores, 2, 1, False, stream(0, 0, 0))
    assert torch.equal(drawn[0], expected[0])


def test_units_and_rows():
    scores = torch.tensor([9.0, 16.0, 0.0, 4.0, 3e38, 3e38])  # no overflow: norms are float64
    norms = Units(6, 2).norms(scores)
    expected = torch.tensor([5.0, 2.0, math.sqrt(2 * float(scores[4]))], dtype=torch.float64)
    torch.testing.assert_close(norms, expected, rtol=1e-15, atol=0)
    assert Units(6, 2).rows(torch.tensor([0, 2, 2])).tolist() == [0, 1, 4, 5, 4, 5]
    assert Units(6, 1).rows(torch.tensor([1, 3])).tolist() == [1, 3]
