"""Which rows a weight moves, when that changes, and who remembers it."""

import copy
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.config import RULES, GrassConfig
from grass_fx.errors import GrassWarning, StateError
from grass_fx.state.refresh import finish_steps
from grass_fx.state.registry import Demand, Registry
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace

SIZE = 12
CPU = torch.device("cpu")
UNSCORED = ["cyclic", "uniform"]
SCORED = [name for name, rule in RULES.items() if rule.scores]


def spec_of(selection="cyclic", **options):
    options = {"rank": 4, "refresh_every": 3, **options}
    return SubspaceSpec.of(GrassConfig(selection=selection, **options), SIZE, 0, "out")


def subspace_of(selection="cyclic", key=0, dtype=torch.float32, **options):
    return Subspace(spec_of(selection, **options), key, "a.weight", CPU, dtype)


def scores_of(step):
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(step)) + 0.01


def take_step(subspace):
    """One optimizer step. Scores that are not asked for must change nothing."""
    finish_steps([(subspace, scores_of(subspace.step))])


def history(subspace, steps):
    """The subspace at each of the next ``steps`` steps."""
    seen = []
    for _ in range(steps):
        now = subspace.selection
        scale = None if now.scale is None else now.scale.tolist()
        clock = (subspace.step, subspace.period, now.draw, subspace.scoring_due)
        seen.append((clock, now.indices.tolist(), scale))
        take_step(subspace)
    return seen


def refreshes(subspace, steps):
    """The steps that start with another selection than the one before."""
    generations = [clock[2] for clock, _, _ in history(subspace, steps)]
    return [step for step in range(1, steps) if generations[step] != generations[step - 1]]


def scored_steps(subspace, steps):
    return [clock[0] for clock, _, _ in history(subspace, steps) if clock[3]]


@pytest.mark.parametrize("rule", UNSCORED)
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_rules_without_scores_refresh_every_k_steps(rule, every):
    assert refreshes(subspace_of(rule, refresh_every=every), 11) == list(range(every, 11, every))
    assert scored_steps(subspace_of(rule, refresh_every=every), 11) == []


@pytest.mark.parametrize("rule", ["top", "multinomial_norm", "multinomial_norm_sq"])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_rules_with_scores_look_at_step_0_and_every_k_steps(rule, every):
    assert scored_steps(subspace_of(rule, refresh_every=every), 11) == list(range(0, 11, every))
    expected = [step + 1 for step in range(0, 10, every)]  # the refresh follows the scoring step
    assert refreshes(subspace_of(rule, refresh_every=every), 11) == expected


def test_an_infinite_period_keeps_the_first_selection_of_the_rule():
    for rule in UNSCORED:
        assert refreshes(subspace_of(rule, refresh_every=math.inf), 20) == []
    subspace = subspace_of("top", refresh_every=math.inf)
    assert scored_steps(subspace, 20) == [0]
    assert subspace.selection.indices.tolist() == sorted(scores_of(0).topk(4).indices.tolist())


@pytest.mark.parametrize("rule", SCORED)
def test_the_first_selection_of_every_rule_with_scores_is_that_of_cyclic(rule):
    assert history(subspace_of(rule), 1)[0][1:] == history(subspace_of("cyclic"), 1)[0][1:]


UNUSABLE = {
    "missing": None,
    "nan": torch.ones(SIZE).index_fill(0, torch.tensor([5]), math.nan),
    "inf": torch.ones(SIZE).index_fill(0, torch.tensor([5]), math.inf),
    "all zero": torch.zeros(SIZE),
}


@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("scores", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("failures", [1, 2, 4])
def test_unusable_scores_keep_the_selection_and_are_asked_for_again(rule, scores, failures):
    subspace = subspace_of(rule, refresh_every=3)
    first = subspace.selection
    for step in range(failures):
        assert subspace.scoring_due
        finish_steps([(subspace, scores)])
        assert subspace.selection is first
        assert subspace.step == step + 1
    assert scored_steps(subspace, 1) == [failures]
    assert subspace.selection.draw == first.draw + 1
    # The grid of K = 3 goes on.
    grid = [step for step in (3, 6, 9) if step > failures and rule != "frozen_top"]
    assert scored_steps(subspace, 10 - subspace.step) == grid


def test_many_weights_finish_a_step_together_as_each_does_alone():
    """Of all rules, blocks and ranks; some with scores that tell nothing, or with equal ones."""
    kinds = [{"selection": rule} for rule in RULES] + [
        {"selection": "top", "block": 2},
        {"selection": "top", "rank": 6},
        {"selection": "multinomial_norm", "replacement": True},
    ]
    several = [*UNUSABLE.values(), torch.ones(SIZE), *(scores_of(k) for k in range(6))]
    settings = [(kind, key, scores) for kind in kinds for key, scores in enumerate(several)]

    def run(finish):
        subspaces = [subspace_of(key=key, refresh_every=2, **kind) for kind, key, _ in settings]
        for step in range(4):
            scores = [None if s is None else s.roll(step) for _, _, s in settings]
            finish(list(zip(subspaces, scores, strict=True)))
        return [subspace.state() for subspace in subspaces]

    def alone(finished):
        for subspace, scores in finished:
            finish_steps([(subspace, scores)])

    for together, one_by_one in zip(run(finish_steps), run(alone), strict=True):
        assert together.keys() == one_by_one.keys()
        for name, value in together.items():
            assert torch.equal(value, one_by_one[name]), name


FREEZING = [(1, [2, 5, 7], [0, 2, 5, 7], [0, 2, 5, 7]), (2, [2, 3], [2, 9], [2, 3, 8, 9])]


@pytest.mark.parametrize(("block", "few", "enough", "frozen"), FREEZING)
def test_frozen_top_freezes_once_enough_units_score(block, few, enough, frozen):
    subspace = subspace_of("frozen_top", block=block)
    finish_steps([(subspace, torch.zeros(SIZE).index_fill(0, torch.tensor(few), 1.0))])
    assert set(few) < set(subspace.selection.indices.tolist())  # the rest is drawn
    history(subspace, 2)
    finish_steps([(subspace, torch.zeros(SIZE).index_fill(0, torch.tensor(enough), 1.0))])
    assert scored_steps(subspace, 10) == []
    assert subspace.selection.indices.tolist() == frozen


@pytest.mark.parametrize("rule", RULES)
def test_a_selection_kept_from_before_a_refresh_is_unchanged(rule):
    subspace = subspace_of(rule, refresh_every=1, replacement=RULES[rule].replacement)
    kept = []
    for _ in range(6):
        kept.append((subspace.selection, copy.deepcopy(subspace.selection)))
        take_step(subspace)
    last = 1 if rule == "frozen_top" else 5
    generations = [selection.draw - kept[0][0].draw for selection, _ in kept]
    assert generations == [min(i, last) for i in range(6)]
    for selection, then in kept:
        assert torch.equal(selection.indices, then.indices)
        torch.testing.assert_close(selection.scale, then.scale, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [1, 2])
def test_scales_of_rows_are_those_of_their_units(dtype, block):
    options = {"replacement": True, "block": block, "refresh_every": 1}
    subspace = subspace_of("multinomial_norm", dtype=dtype, **options)
    assert subspace.selection.scale.tolist() == [1.0] * 4  # rule 10: it had no scores
    uniform = subspace_of("uniform", **options).selection.scale
    assert torch.equal(uniform, torch.full((4,), SIZE / 4).sqrt())
    for step in range(5):
        take_step(subspace)
        norms = scores_of(step).double().view(-1, block).sum(1).sqrt()
        q = (norms / norms.sum()).repeat_interleave(block)
        rho, rows = subspace.selection.scale, subspace.selection.indices
        assert rho.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(rho, (4 // block * q[rows]).rsqrt().to(rho.dtype))
        assert bool((rows.view(-1, block).diff(dim=0) >= 0).all())


def test_draws_differ_by_seed_key_and_period_and_not_by_the_global_generator():
    def drawn(key, seed):
        return history(subspace_of("uniform", key, seed=seed, refresh_every=1), 5)

    expected = drawn(1, 0)
    torch.manual_seed(5)
    assert drawn(1, 0) == expected
    assert expected != drawn(0, 0) != drawn(0, 1) != expected
    assert len({tuple(rows) for _, rows, _ in expected}) == 5


def test_the_shape_of_the_compact_gradient():
    spec = spec_of()
    assert spec.compact_shape((SIZE, 5)) == (4, 5)
    assert replace(spec, dim=1).compact_shape(torch.Size([5, SIZE])) == (5, 4)
    assert replace(spec, dim=1).compact_shape((3, SIZE, 5)) == (3, 4, 5)


RESUMED = [("cyclic", {}), ("cyclic", {"block": 2}), ("uniform", {"replacement": True})]
RESUMED += [("uniform", {}), ("top", {}), ("frozen_top", {})]
RESUMED += [("multinomial_norm", {"replacement": True, "block": 2})]


@pytest.mark.parametrize(("rule", "options"), RESUMED)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("failed", [False, True])
def test_a_resumed_subspace_continues_exactly(rule, options, steps, failed, tmp_path):
    subspace = subspace_of(rule, key=1, refresh_every=2, **options)
    history(subspace, steps)
    if failed:
        finish_steps([(subspace, None)])  # where scores were due they are still
    state = subspace.state()
    expected = history(subspace, 11)  # five refreshes, which leave the state alone
    torch.save(state, tmp_path / "state.pt")
    # In another run the weight may stand elsewhere: the state says which stream is its own.
    resumed = subspace_of(rule, key=9, refresh_every=2, **options)
    resumed.load(torch.load(tmp_path / "state.pt"))
    assert history(resumed, 11) == expected


OTHERS = {
    "rank": subspace_of("uniform", rank=6),
    "block": subspace_of("uniform", block=2),
    "replacement": subspace_of("uniform", replacement=True),
    "size": Subspace(replace(spec_of("uniform"), size=16), 0, "w", CPU, torch.float32),
    "side": Subspace(replace(spec_of("uniform"), dim=1, side="in"), 0, "w", CPU, torch.float32),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_state_that_does_not_fit_changes_nothing(other):
    subspace = subspace_of("uniform")
    history(subspace, 4)
    selection, state = subspace.selection, subspace.state()
    with pytest.raises(StateError, match=r"^a\.weight: the saved selection has .* Compile with"):
        subspace.load(other.state())
    assert subspace.selection is selection
    torch.testing.assert_close(subspace.state(), state, rtol=0, atol=0)


def parameter():
    return nn.Parameter(torch.zeros(SIZE, 3))


def demand(registry, weight, **options):
    (subspace,) = registry.demand([weight], [spec_of(**options)], ["traced.name"])
    return subspace


def test_a_deleted_parameter_takes_its_subspace_along():
    registry, weight = Registry(), parameter()
    subspace = weakref.ref(demand(registry, weight))
    assert registry.get(weight) is subspace()
    del weight
    gc.collect()
    assert subspace() is None


def test_parameters_are_known_by_identity():
    registry, weight = Registry(), parameter()
    subspace = demand(registry, weight)
    copied = copy.deepcopy(weight)
    assert registry.get(copied) is None
    take_step(demand(registry, copied))
    assert (registry.get(copied).step, subspace.step) == (1, 0)
    weight.data = torch.ones(SIZE, 3)
    assert registry.get(weight) is subspace


def test_the_same_demand_is_the_same_subspace_and_another_starts_anew(caplog):
    registry, weight = Registry(), parameter()
    old = demand(registry, weight)
    history(old, 8)
    assert demand(registry, weight) is old
    assert not caplog.records
    with pytest.warns(GrassWarning, match="rank 4 -> 6"):
        new = demand(registry, weight, rank=6)
    assert "traced.name: compiled with other options" in caplog.text
    assert registry.get(weight) is new is demand(registry, weight, rank=6)
    assert (new.step, new.selection.indices.numel()) == (0, 6)
    assert new.selection.generation > old.selection.generation


def test_a_graphs_demand_is_remembered_until_another_graph_replaces_a_subspace():
    registry, weights = Registry(), [parameter(), parameter()]
    mine = Demand(registry, [spec_of(), spec_of()], ["a", "b"])
    first = mine(weights)
    version = registry.version
    assert mine(weights) == first == [registry.get(weight) for weight in weights]
    assert mine(weights[::-1]) == first[::-1] and registry.version == version
    other = Demand(registry, [spec_of(rank=6)], ["b"])
    with pytest.warns(GrassWarning, match="rank 4 -> 6"):
        (replaced,) = other(weights[1:])
    with pytest.warns(GrassWarning, match="rank 6 -> 4"):
        again = mine(weights)
    assert again[0] is first[0]
    assert again[1] is registry.get(weights[1]) not in (first[1], replaced)


def test_graphs_of_two_dtypes_have_a_scale_as_exact_as_the_weight_is_then():
    registry, weight = Registry(), parameter()
    spec = spec_of("uniform", replacement=True)
    graphs = {dtype: Demand(registry, [spec], ["a"]) for dtype in (torch.float32, torch.float64)}
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64, torch.float64):
        weight.data = weight.data.to(dtype)
        (subspace,) = graphs[dtype]([weight])
        assert subspace is registry.get(weight) and subspace.selection.scale.dtype == dtype


def test_another_parameter_in_the_place_of_a_deleted_one_has_its_own_subspace():
    registry, places = Registry(), []
    mine = Demand(registry, [spec_of()], ["a"])
    gc.collect()
    gc.freeze()  # what other tests have left is not looked through 20 times
    try:
        for _ in range(20):
            weight = parameter()
            places.append(id(weight))
            (subspace,) = mine([weight])
            assert subspace is registry.get(weight) is mine([weight])[0]
            assert subspace.step == 0
            take_step(subspace)
            subspace = weakref.ref(subspace)
            del weight
            gc.collect()
            assert subspace() is None
    finally:
        gc.unfreeze()
    assert len(set(places)) < len(places)


def test_the_order_of_the_optimizer_keys_the_streams():
    drawn = []
    for order in ([0, 1], [1, 0]):
        weights, registry = [parameter(), parameter()], Registry()
        optimizer = grass_fx.AdamW(weights)  # lives until the keys are known
        assert [demand(registry, weights[index]).key for index in order] == order
        drawn.append([history(registry.get(weight), 7) for weight in weights])
        del optimizer
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    # Without an optimizer, the order of first use.
    weights, registry = [parameter(), parameter()], Registry()
    assert [demand(registry, weight).key for weight in (*weights[::-1], weights[1])] == [0, 1, 0]


def test_an_optimizer_whose_parameters_are_exchanged_draws_the_same():
    """As libraries do that shard a model after its optimizer was built."""
    before, registry = [parameter(), parameter(), parameter()], Registry()
    optimizer = grass_fx.AdamW([(f"w{k}", p) for k, p in enumerate(before)])
    after = [parameter() for _ in before]
    optimizer.param_groups[0]["params"] = list(after)
    subspaces = [demand(registry, weight) for weight in after[::-1]]
    assert [subspace.key for subspace in subspaces] == [2, 1, 0]
    assert [subspace.name for subspace in subspaces] == ["w2", "w1", "w0"]


@pytest.mark.parametrize("used_before", [False, True])
def test_names_come_from_the_optimizer(used_before):
    registry, weight = Registry(), parameter()
    if used_before:
        assert demand(registry, weight).name == "traced.name"
    optimizer = grass_fx.AdamW([("layer.weight", weight)])
    subspace = demand(registry, weight)
    assert subspace.name == "layer.weight"
    assert subspace.selection.name == "layer.weight"  # what errors of its gradients say
    del optimizer


def test_a_state_restored_before_the_first_use_waits_for_it():
    registry, before, weight = Registry(), parameter(), parameter()
    history(demand(registry, before), 7)
    assert registry.saved_state(weight) == {}
    registry.restore(weight, registry.saved_state(before))
    assert registry.get(weight) is None
    assert registry.saved_state(weight).keys() == registry.saved_state(before).keys()
    assert history(demand(registry, weight), 7) == history(registry.get(before), 7)
    for load in (registry.check, registry.restore):
        with pytest.raises(StateError):
            load(weight, OTHERS["rank"].state())
