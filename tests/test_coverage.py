"""Every linear weight of the zoo is taken and pushed, and every gradient of it is right.

With the option ``lookups`` the same holds of every embedding.

To change the page: python examples/model_coverage.py --update, and read the diff.
"""

import fnmatch

import pytest
import torch
from torch import nn

import model_coverage
from grass_fx.state.gradient import CompactGrad
from helpers import uncached
from zoo import FROM_TRANSFORMERS, ZOO

TIED = "used by embedding, which is no matrix product with it; lookups=True takes it"

# Of these models these weights stay dense, for these reasons; all others are taken.
LEFT = {
    "llama, tied head": {"lm_head.weight": TIED},
    "gemma": {"lm_head.weight": TIED},
    "qwen2, tied head": {"lm_head.weight": TIED},
    "gemma2": {"lm_head.weight": TIED},
    "gemma3": {"lm_head.weight": TIED},
    "opt": {"lm_head.weight": TIED},
    "gpt2": {"lm_head.weight": TIED},
    "bert": {"cls.predictions.decoder.weight": TIED},
    "roberta": {"lm_head.decoder.weight": TIED},
    "t5": {"lm_head.weight": TIED},
    "whisper": {"proj_out.weight": TIED},
    "head tied to an embedding": {"table.weight": TIED},
    # A loop over the experts that tokens were sent to: Dynamo runs it in plain Python.
    "mixtral, eager experts": {"*.experts.*_proj": "in no compiled graph"},
    "weight norm": {"it.parametrizations.weight.original1": "no matrix product"},
}

# With the option `lookups` no embedding is left, except one that runs in plain Python, too.
LEFT_WITH_LOOKUPS = {
    name: {path: why for path, why in known.items() if why != TIED} for name, known in LEFT.items()
}
LEFT_WITH_LOOKUPS["mixtral, eager experts"]["model.embed_tokens.weight"] = "in no compiled graph"

# Each graph decides for itself: the one with the head takes what another one looks rows up in.
# The gradients of both uses add up to a compact one.
TAKEN_IN_PART = {"head tied across a graph break": {"table.weight": TIED}}

# The product of all experts and its gradient are one opaque operator of transformers in float32.
OPAQUE = "full gradient formed: no rule for transformers.grouped_mm_fallback_backward.default"
FULL = {
    "mixtral": {
        f"model.layers.{k}.mlp.experts.{w}_proj": OPAQUE
        for k in (0, 1)
        for w in ("gate_up", "down")
    }
}

# Modules whose matrices are no linear weights: they are looked up, or slid over an image.
NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd)

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}

PLAIN_TIED = ["head tied to an embedding", "head tied across a graph break"]
WITH_EMBEDDING = [name for name in FROM_TRANSFORMERS if name != "vit"] + PLAIN_TIED
# Of the models of transformers, those that run also where slow tests do not: each differs from the
# others in what it multiplies by, or how it looks rows up.
SOON = ["llama, tied head", "gpt2", "mixtral, bfloat16", "bert"]


def case(name, *lookups):
    late = name in FROM_TRANSFORMERS and name not in SOON
    id = f"{name}, lookups" if any(lookups) else name
    return pytest.param(name, *lookups, id=id, marks=[pytest.mark.slow] if late else [])


every_model = pytest.mark.parametrize("name", [case(name) for name in ZOO])
every_step = pytest.mark.parametrize(
    ("name", "lookups"),
    [case(name, False) for name in ZOO] + [case(name, True) for name in WITH_EMBEDDING],
)


def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()


@pytest.fixture
def lookups():
    return False


@pytest.fixture
def covered(name, lookups):
    if name in FROM_TRANSFORMERS:
        transformers()
    return model_coverage.covered(name, **({"lookups": True} if lookups else {}))


def check_close(actual, expected):
    """Relative to the largest element: what cancels has the rounding of what it is made of."""
    relative = RELATIVE[expected.dtype]
    bound = relative * expected.abs().max().item() + 1e-12
    torch.testing.assert_close(actual, expected, rtol=relative, atol=bound)


@every_step
def test_every_weight_is_taken_or_left_for_a_known_reason(name, lookups, covered):
    assert covered.weights
    left = {w.name: w.reason for w in covered.weights if not w.taken}
    known = (LEFT_WITH_LOOKUPS if lookups else LEFT).get(name, {})
    unknown = {
        path: reason
        for path, reason in left.items()
        if not any(fnmatch.fnmatchcase(path, p) and why in reason for p, why in known.items())
    }
    assert unknown == {}
    idle = [p for p in known if not any(fnmatch.fnmatchcase(path, p) for path in left)]
    assert idle == [], "no longer left: take it off the list"


@every_step
def test_every_taken_weight_is_pushed(name, lookups, covered):
    full = {w.name: w.reason for w in covered.weights if w.taken and not w.pushed}
    assert full == {**({} if lookups else TAKEN_IN_PART), **FULL}.get(name, {})


@every_step
def test_the_compact_gradient_is_the_selection_of_the_full_one(covered):
    for weight in covered.weights:
        if weight.taken:
            grad, full = covered.gradients[weight.name], covered.plain[weight.name]
            assert isinstance(grad, CompactGrad), weight.name
            check_close(grad.compact, grad.selection.project(full))


@pytest.mark.slow
@every_model
def test_the_bits_are_the_signs_of_the_full_gradient(name):
    """Of every element that is not lost in rounding; of more than one call a majority."""
    if name in FROM_TRANSFORMERS:
        transformers()
    covered, taken = model_coverage.covered(name, rest="sign"), 0
    for weight in covered.weights:
        if not weight.taken:
            continue
        grad, full = covered.gradients[weight.name], covered.plain[weight.name]
        if len(grad.votes.planes) > 1:  # several graphs, or calls of one, have each had a vote
            continue
        taken += 1
        full = full.reshape(-1, full.shape[-1])
        full = full if grad.selection.dim == 1 else full.t()
        every = grad.votes.parts(len(full))
        signs = torch.cat([grad.votes.majority(k, *full.shape, torch.float64) for k in every])
        clear = full.abs() > RELATIVE[full.dtype] * full.abs().max()
        assert torch.equal(signs[clear], full[clear].sign().double()), weight.name
        assert not signs[:, (full == 0).all(0)].any(), weight.name
    assert taken or not any(weight.taken for weight in covered.weights)


@every_step
def test_what_is_said_of_lookups_is_what_they_do(name, lookups, covered):
    """The second table is made without running a model with ``lookups``."""
    said = model_coverage.covered(name).fates
    for path, fate in said.items():
        taken = fate.with_lookups if lookups else fate.taken
        assert isinstance(covered.gradients[path], CompactGrad) == taken, path
    embedding = any(isinstance(m, nn.Embedding) for m in covered.case.model.modules())
    assert embedding == (name in WITH_EMBEDDING)
    if not embedding:
        assert all(fate.with_lookups == fate.taken for fate in said.values())


@every_step
def test_all_other_gradients_are_unchanged(covered):
    taken = {weight.parameter for weight in covered.weights if weight.taken}
    for path, parameter in covered.case.model.named_parameters():
        grad, plain = covered.gradients[path], covered.plain[path]
        if parameter in taken:
            continue
        assert (grad is None) == (plain is None) and not isinstance(grad, CompactGrad), path
        if plain is not None:
            check_close(grad, plain)


@every_model
def test_the_walk_over_the_modules_overlooks_no_matrix(covered):
    named = {weight.parameter for weight in covered.weights}
    for path, parameter in covered.case.model.named_parameters():
        owner = covered.case.model.get_submodule(path.rpartition(".")[0])
        added = parameter.dim() < 2 or 1 in parameter.shape  # biases, scales, positions
        assert parameter in named or added or isinstance(owner, NOT_LINEAR), path


@every_model
def test_the_page_has_the_line_of_every_model(name, covered):
    lines = model_coverage.PAGE.read_text(encoding="utf-8").splitlines()
    assert model_coverage.row(name) in lines
    of_parameters = model_coverage.row_of_parameters(name)
    assert of_parameters is None or of_parameters in lines


@pytest.mark.slow
def test_the_page_is_up_to_date():
    """Here most models have run already."""
    transformers()
    assert model_coverage.PAGE.read_text(encoding="utf-8") == model_coverage.page()


@pytest.mark.parametrize(
    "name",
    [pytest.param("nn.MultiheadAttention, cross", marks=pytest.mark.slow), "linear in a loop"],
)
def test_inductor_takes_and_computes_the_same(name):
    with uncached():  # else no pass may run, and none can tell what it pushed
        by_inductor = model_coverage.covered(name, compiler="inductor")
    for weight, other in zip(
        by_inductor.weights, model_coverage.covered(name).weights, strict=True
    ):
        assert (weight.taken, weight.pushed) == (other.taken, other.pushed), weight.name
        if weight.taken:
            grad, full = by_inductor.gradients[weight.name], by_inductor.plain[weight.name]
            check_close(grad.compact, grad.selection.project(full))
