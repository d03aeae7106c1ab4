"""signature: the inputs that tapping adds, where they stand, and how a call fills them."""

import copy

import pytest
import torch

from grass_fx._torch_compat import compile_aot_eager
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.observers import PushReport
from grass_fx.passes.pipeline import GrassPasses, tapped
from grass_fx.passes.signature import REGULAR, LinearWeight, Role, Signature, Variant, proxy_of
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.spec import SubspaceSpec
from helpers import mlp


def weight(position, selection="top", **options):
    config = GrassConfig(rank=2, selection=selection, **options)
    return LinearWeight(position, f"w{position}", (6, 8), SubspaceSpec.of(config, 8, 1, "in"))


PLAIN = weight(1)
DRAWN = weight(4, selection="multinomial_norm", replacement=True)


def test_places_follow_the_graphs_own_inputs_weight_by_weight():
    signature = Signature([PLAIN, DRAWN], 5)
    assert dict(signature.places(PLAIN)) == {"d": 5, "e": 6, "indices": 7}
    assert dict(signature.places(DRAWN)) == {"d": 8, "e": 9, "indices": 10, "scale": 11}
    assert signature.with_scores


def test_only_weights_whose_rule_needs_scores_have_a_place_for_them():
    cyclic = weight(2, "cyclic")
    signature = Signature([PLAIN, cyclic], 5)
    assert dict(signature.places(PLAIN)) == {"d": 5, "e": 6, "indices": 7}
    assert dict(signature.places(cyclic)) == {"d": 8, "indices": 9}
    assert signature.with_scores and not Signature([cyclic], 5).with_scores
    w = torch.randn(6, 8)
    assert [len(p.shape) for p in signature.proxies([w, w])] == [2, 1, 2]


def test_examples_have_the_shapes_of_a_calls_inputs():
    signature = Signature([DRAWN], 1)
    w = torch.randn(6, 8, dtype=torch.bfloat16)
    examples = signature.examples(DRAWN, w)
    assert [*examples] == [*signature.places(DRAWN)]
    layouts = {role: (tuple(x.shape), x.dtype, x.requires_grad) for role, x in examples.items()}
    assert layouts == {
        "d": ((6, 2), torch.bfloat16, True),
        "e": ((8,), torch.float32, True),
        "indices": ((2,), torch.int64, False),
        "scale": ((2,), torch.float32, False),
    }


def test_a_call_fills_every_place_and_its_gradients_come_back_by_role():
    signature = Signature([PLAIN, DRAWN], 0)
    w = torch.randn(6, 8)
    proxies = signature.proxies([w, w])
    assert proxies[0] is proxies[2] and proxies[1] is proxies[3]  # alike, and never read
    rows, rho = torch.arange(2), torch.ones(2)
    added = signature.added(proxies, [[rows], [rows, rho]])
    for each, tensors in ((PLAIN, {"indices": rows}), (DRAWN, {"indices": rows, "scale": rho})):
        for role, tensor in tensors.items():
            assert added[signature.places(each)[role]] is tensor
    assert len(added) == 7
    assert signature.proxy_places == [{"d": 0, "e": 1}, {"d": 2, "e": 3}]


def test_variants_have_the_names_of_files_and_logs():
    names = [Variant(*each).name for each in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    assert names == ["regular", "scoring", "regular_local", "scoring_local"]
    assert Variant() == REGULAR


class WithOneMore(Signature):
    """One more input of every weight: a proxy between those that there are."""

    ROLES = (
        Signature.ROLES[0],
        Role("more", lambda spec, w: proxy_of([3], w.dtype, w.device), is_proxy=True),
        *Signature.ROLES[1:],
    )


@pytest.mark.parametrize("selection", ["cyclic", "top"])
def test_one_more_role_is_a_change_in_one_place(selection):
    """The pass, the compiled graph and the runtime take it from the class."""
    config, made = GrassConfig(rank=2, selection=selection), []

    def backend(gm, inputs):
        found = find_linear_weights_pass(gm.graph, DynamoFacts(config, inputs))
        signature = WithOneMore(found.taken, len(inputs))
        variants = [REGULAR, Variant(scoring=True)][: 1 + bool(config.scores)]
        graphs = {}
        for variant in variants:
            graph, extended = tapped(gm, TapFacts(config, inputs, signature, variant))
            names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
            for each in found.taken:
                for role, place in signature.places(each).items():
                    assert names[place].endswith(f"_{role}") and "more" in signature.places(each)
            joint = GrassPasses(JointFacts(bool(config.scores)))
            graphs[variant] = compile_aot_eager(graph, extended, joint)
        made.append(GrassCallable(signature, graphs, found, PushReport()))
        return made[-1]

    model = mlp(8, 12, 6)
    twin, x = copy.deepcopy(model), torch.randn(5, 8)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        if isinstance(got.grad, CompactGrad):
            torch.testing.assert_close(got.grad.compact, got.grad.selection.project(want.grad))
    assert isinstance(model[0].weight.grad, CompactGrad) and len(made) == 1
