"""The pass manager: what Inductor's caches see of it, and the user's own passes."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import grass_fx
from grass_fx._torch_compat import compile_aot_eager
from grass_fx.compile.runtime import GrassCallable
from grass_fx.compile.sources import source_hash
from grass_fx.config import PASSES, GrassConfig
from grass_fx.errors import OptionError
from grass_fx.ops import SELECT
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.observers import DISABLED, PushReport
from grass_fx.passes.pipeline import AOT, INDUCTOR, JOINT, LATE, GrassPasses, tapped
from grass_fx.passes.signature import REGULAR, Signature
from helpers import Captured, mlp, uncached


class CountMatmuls(CustomGraphPass):
    """A user's pass: it sees the graph after ours."""

    def __init__(self, name="count"):
        self.name, self.seen = name, []

    def __call__(self, graph):
        self.seen.append({str(n.target) for n in graph.nodes if n.op == "call_function"})

    def uuid(self):
        return self.name


def manager(*users):
    return GrassPasses(JointFacts(), users=users)


def test_uuid_is_the_same_for_the_same_passes_and_differs_with_the_users():
    assert manager().uuid() == manager().uuid()
    assert manager(CountMatmuls("a")).uuid() == manager(CountMatmuls("a")).uuid()
    ids = {manager(*users).uuid() for users in [(), (CountMatmuls("a"),), (CountMatmuls("b"),)]}
    assert len(ids) == 3


def test_uuid_is_none_if_a_users_pass_has_none():
    assert manager(lambda graph: None).uuid() is None


def test_uuid_follows_every_source_file_of_the_package(tmp_path):
    """A change in a helper, not only in the pass, must change it."""
    script = (
        "import shutil, sys, pathlib, grass_fx, grass_fx.passes, grass_fx.compile.sources as p\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "shutil.copytree(pathlib.Path(grass_fx.__file__).parent, root / 'grass_fx')\n"
        "passes = pathlib.Path(grass_fx.passes.__file__).parent\n"
        "shutil.copytree(passes, root / 'passes', dirs_exist_ok=True)\n"
        "p.__file__ = str(root / 'grass_fx/compile/sources.py')\n"
        "grass_fx.passes.__spec__.submodule_search_locations[:] = [str(root / 'passes')]\n"
        "hashes = [p.source_hash()]\n"
        "lowering = 'grass_fx/compile/lowering/__init__.py'\n"
        "names = 'grass_fx/ops/__init__.py', lowering, 'passes/push_selection.py'\n"
        "for name in names:\n"
        "    (root / name).write_text((root / name).read_text() + '# changed\\n')\n"
        "    p.source_hash.cache_clear()\n"
        "    hashes.append(p.source_hash())\n"
        "assert len(set(hashes)) == 4, hashes\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def train_once(rank=4, **options):
    model = mlp(8, 16, 12)
    compiled = torch.compile(model, backend="grass", options={"rank": rank, **options})
    compiled(torch.randn(32, 8)).square().mean().backward()
    assert isinstance(model[0].weight.grad, grass_fx.CompactGrad)
    return model


def test_the_second_compilation_hits_the_caches():
    with fresh_cache():
        counters.clear()
        train_once()
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
        torch._dynamo.reset()
        first = train_once(seed=5, refresh_every=7)  # no pass reads these: the same graph
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert first[0].weight.grad.compact.abs().sum() > 0  # all works though no pass was called
        torch._dynamo.reset()
        train_once(rank=6)
        assert counters["aot_autograd"]["autograd_cache_miss"] == 2


def test_the_scoring_variants_forward_comes_from_the_cache():
    with fresh_cache():
        counters.clear()
        model = mlp(8, 16, 12)
        compiled = torch.compile(model, backend="grass", options={"rank": 4, "selection": "top"})
        optimizer = grass_fx.AdamW(model.parameters())
        for _ in range(2):  # a scoring step, then a regular one
            compiled(torch.randn(32, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        # Two forwards and two backwards: one forward is compiled, and found again.
        assert counters["inductor"]["fxgraph_cache_miss"] == 3
        assert counters["inductor"]["fxgraph_cache_hit"] == 1


@pytest.mark.parametrize("slot", ["joint_custom_pre_pass", "joint_custom_post_pass"])
@pytest.mark.parametrize("where", ["config", "options"])
def test_a_pass_the_user_configured_still_runs(slot, where):
    theirs = CountMatmuls(f"{slot} {where}")
    with uncached():
        if where == "config":
            with inductor_config.patch({slot: theirs}):
                train_once()
        else:
            train_once(inductor={slot: theirs})
    assert "grass.selected_mm.default" in theirs.seen[0]


def test_inference_graphs_run_the_users_pass_alone():
    theirs = CountMatmuls("inference")
    model = mlp(8, 16, 12)
    compiled = torch.compile(
        model, backend="grass", options={"inductor": {"joint_custom_pre_pass": theirs}}
    )
    with uncached(), torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(4, 8)), model(torch.ones(4, 8)))
    assert theirs.seen and not any("grass" in name for name in theirs.seen[0])


def test_source_hash_is_remembered():
    assert source_hash() is source_hash()


# --- the order, its observers, and disable_passes -------------------------------------------------


def test_the_names_that_disable_passes_takes_are_those_of_the_pipeline():
    passes = [each for each in JOINT + LATE if each not in (AOT, INDUCTOR)]
    assert tuple(each.name for each in passes) == PASSES


def test_what_the_passes_go_by_is_in_the_uuid():
    facts = [JointFacts(), JointFacts(with_scores=True)]
    facts += [JointFacts(disabled=(name,)) for name in PASSES]
    assert len({GrassPasses(each).uuid() for each in facts}) == len(facts)


def test_an_unknown_pass_is_an_error_that_names_the_nearest():
    for given, remedy in (
        (["keep_select"], "'keep_selected'"),
        ("tap_weights", "'push_norms'"),
        (3, "names"),
    ):
        with pytest.raises(OptionError, match=rf"disable_passes.*{remedy}"):
            GrassConfig.from_options({"disable_passes": given})
    assert GrassConfig(disable_passes="push_norms").disable_passes == ("push_norms",)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("selection", ["cyclic", "top"])
def test_without_any_one_pass_gradients_are_the_same(name, selection):
    options = {"rank": 4, "selection": selection, "scoring": "tiles", "disable_passes": name}
    model, x, backend = mlp(8, 16, 12), torch.randn(32, 8), Captured(**options)
    torch.compile(model, backend=backend)(x).square().mean().backward()
    weights = [model[0].weight, model[2].weight]
    full = torch.autograd.grad(model(x).square().mean(), weights)
    for w, g in zip(weights, full, strict=True):
        torch.testing.assert_close(w.grad.compact, w.grad.selection.project(g))
        if selection == "top":
            torch.testing.assert_close(w.grad.scores, g.square().sum(0))
    report = backend.only.report
    if name == "push_selection":
        assert [*report.stopped.values()] == [DISABLED, DISABLED] and not report.pushed
    else:
        assert not report.stopped and len(report.pushed) == 2


def test_observers_see_every_graph_of_one_run_and_what_was_left_out():
    seen = []

    def observer(graph, event):
        gathers = len(graph.find_nodes(op="call_function", target=SELECT))
        seen.append((event.by.name, event.disabled, event.result.count, gathers))

    def backend(gm, inputs):
        config = GrassConfig(rank=4)
        found = find_linear_weights_pass(gm.graph, DynamoFacts(config, inputs))
        signature = Signature(found.taken, len(inputs))
        graph, extended = tapped(gm, TapFacts(config, inputs, signature, REGULAR))
        passes = GrassPasses(JointFacts(disabled=("push_norms",)), [observer])
        return GrassCallable(
            signature, {REGULAR: compile_aot_eager(graph, extended, passes)}, found, PushReport()
        )

    model = mlp(8, 16, 12)
    torch.compile(model, backend=backend)(torch.randn(32, 8)).sum().backward()
    assert seen == [
        ("AOTAutograd", False, 0, 2),
        ("push_norms", True, 0, 2),
        ("push_selection", False, 2, 0),
        ("Inductor", False, 0, 0),  # it has not run here
        ("keep_selected", False, 1, 1),  # the first layer's input is one of the graph
        ("read_padded", False, 0, 1),
    ]
