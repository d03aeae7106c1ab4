"""Nothing is compiled twice, and what CUDA graphs need of the added inputs: addresses that stay."""

import copy
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import grass_fx
from grass_fx._torch_compat import (
    compile_aot_eager,
    compile_inductor,
    trace_static,
)
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.observers import PushReport
from grass_fx.passes.pipeline import GrassPasses, tapped
from grass_fx.passes.signature import REGULAR, Signature
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.subspace import graph_inputs
from helpers import Captured, mlp

RUN = uuid.uuid4()  # no other run's code is found


def train(compiled, optimizer, steps, batch=5):
    for step in range(steps):
        optimizer.zero_grad()
        size = batch(step) if callable(batch) else batch
        compiled(torch.randn(size, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rule", ["cyclic", "uniform with replacement", "top"])
def test_twenty_steps_with_refreshes_compile_one_graph(rule):
    model = mlp(8, 12, 6)
    options = {"selection": rule.split()[0], "replacement": "with" in rule}
    backend = Captured(rank=2, refresh_every=3, **options)
    optimizer = grass_fx.AdamW(model.parameters())
    counters.clear()
    train(torch.compile(model, backend=backend), optimizer, 20)
    assert len(backend.graphs) == 1 and counters["stats"]["unique_graphs"] == 1
    assert registry.get(model[0].weight).period >= 7


def test_a_dynamic_batch_size_compiles_once(compiler):
    model = mlp(8, 12, 6)
    backend = Captured(rank=2, refresh_every=3, compiler=compiler)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    train(compiled, grass_fx.AdamW(model.parameters()), 8, batch=lambda step: 5 + step)
    assert len(backend.graphs) == 1
    twin, x = copy.deepcopy(model), torch.randn(21, 8)
    model.zero_grad()
    compiled(x).square().mean().backward()
    twin(x).square().mean().backward()
    grad = model[0].weight.grad
    assert isinstance(grad, CompactGrad) and len(backend.graphs) == 1
    torch.testing.assert_close(grad.compact, grad.selection.project(twin[0].weight.grad))


@pytest.mark.parametrize("rule", ["cyclic", "top", "uniform with replacement"])
def test_the_added_inputs_keep_their_addresses(rule):
    """Through refreshes, and the selection that labels a gradient is another tensor."""
    model, seen = mlp(8, 12, 12, 6), []
    options = {"selection": rule.split()[0], "replacement": "with" in rule}
    backend = Captured(rank=2, refresh_every=2, **options)
    compiled = torch.compile(model, backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        compiled(torch.randn(5, 8)).square().mean().backward()
        graph = backend.only
        made = graph._stored
        subspace = registry.get(model[0].weight)
        given = graph_inputs([subspace], [torch.device("cpu")])[0]
        seen.append(tuple(t.data_ptr() for t in (*made, *given)))
        label = model[0].weight.grad.selection
        assert torch.equal(given[0], label.indices) and given[0] is not label.indices
        if label.scale is not None:
            assert torch.equal(given[1], label.scale)
        optimizer.step()
    assert len(set(seen)) == 1 and subspace.period > 2


class StaticInputs(CustomGraphPass):
    """Notes which inputs AOTAutograd takes for static."""

    def __call__(self, graph):
        metadata = torch._guards.TracingContext.get().fw_metadata
        self.seen = metadata.static_input_indices, len(metadata.input_info)

    def uuid(self):
        return "static inputs"


def test_aot_autograd_takes_the_added_inputs_for_static():
    model, look = mlp(8, 12, 6), StaticInputs()
    options = {"rank": 2, "selection": "uniform", "replacement": True}
    inductor = {"post_grad_custom_pre_pass": look, "fx_graph_cache": False}
    compiled = torch.compile(model, backend="grass", options={**options, "inductor": inductor})
    x = torch.randn(5, 8)
    compiled(x).sum().backward()
    # x alone is not: the parameters are, and d, indices and scale of two weights.
    static, total = look.seen
    assert total == 1 + 4 + 6 and len(static) == 4 + 6


A_PROCESS = """
import json, sys, torch, grass_fx
from torch._dynamo.utils import counters
from helpers import mlp
device, made = sys.argv[1], {}
for rule in ("cyclic", "uniform with replacement", "top"):
    torch._dynamo.reset(), counters.clear(), torch.manual_seed(0)
    model = mlp(16, 24, 12).to(device)
    options = {"rank": 4, "selection": rule.split()[0], "refresh_every": 3}
    options["replacement"] = "with" in rule
    compiled = torch.compile(model, backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.parameters(), compile=True)
    for _ in range(20):
        compiled(torch.randn(32, 16, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = {**counters["aot_autograd"], **counters["inductor"], **counters["stats"]}
    kinds = "_miss", "_bypass", "_hit", "unique_graphs"
    made[rule] = {key: n for key, n in counts.items() if key.endswith(kinds)}
    made[rule]["weights"] = [p.double().sum().item() for p in model.parameters()]
print(json.dumps(made))
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_warm_second_process_compiles_nothing(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folders = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    variables = {**os.environ, **dict.fromkeys(folders, str(tmp_path))}
    command, runs = [sys.executable, "-c", A_PROCESS, device], []
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=Path(__file__).parent
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    for first, second in zip(*(run.values() for run in runs), strict=True):
        assert first["fxgraph_cache_miss"] > 0 and first["unique_graphs"] == 1
        missed = [key for key in second if key.endswith(("_miss", "_bypass"))]
        assert not missed and second["autograd_cache_hit"] == first["autograd_cache_miss"]
        assert second["weights"] == first["weights"]


def test_code_of_another_version_is_not_found():
    layout = torch.Size([4]), (1,), torch.float32, torch.device("cpu")
    for version, kind in (("a", "miss"), ("a", "hit"), ("b", "miss"), ("b", "hit")):
        graph, fakes = trace_static(lambda x: [x.sin()], [layout])
        counters.clear()
        with torch.no_grad():
            compile_inductor(graph, fakes, {}, cacheable={"grass_fx": f"{version} {RUN}"})
        assert counters["inductor"][f"fxgraph_cache_{kind}"] == 1


# --- CUDA graphs ----------------------------------------------------------------------------------


def replayed(graph):
    """A backward that returns the same memory each time, as a CUDA graph does."""
    stored = []

    def run(*args):
        outputs = graph(*args)
        if not stored:
            stored.extend(outputs)
        for kept, new in zip(stored, outputs, strict=True):
            if kept is not None:
                kept.copy_(new)
        return stored

    return run


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gradients_outlive_the_memory_of_a_cuda_graph(cuda_graphs):
    def backend(gm, inputs):
        config = GrassConfig(rank=4)
        found = find_linear_weights_pass(gm.graph, DynamoFacts(config, inputs))
        signature = Signature(found.taken, len(inputs))
        graph, extended = tapped(gm, TapFacts(config, inputs, signature, REGULAR))
        compiled = compile_aot_eager(graph, extended, GrassPasses(JointFacts()), replayed)
        return GrassCallable(signature, {REGULAR: compiled}, found, PushReport(), cuda_graphs)

    model = mlp(8, 12, bias=False)
    twin, compiled = copy.deepcopy(model), torch.compile(model, backend=backend)
    for x in torch.randn(3, 5, 8):
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    grad = model[0].weight.grad
    equal = torch.allclose(grad.compact, grad.selection.project(twin[0].weight.grad), atol=1e-5)
    assert equal is cuda_graphs  # without the copy the first gradients are overwritten


class Recorded(CustomGraphPass):
    """Notes for each graph whether Inductor is to record it."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(torch._inductor.config.triton.cudagraphs)

    def uuid(self):
        return "recorded"


@pytest.mark.parametrize(("rule", "recorded"), [("cyclic", [True]), ("top", [True, False])])
def test_reduce_overhead_records_all_but_the_scoring_variant(rule, recorded):
    look = Recorded()
    inductor = {"joint_custom_pre_pass": look, "fx_graph_cache": False}
    options = {"rank": 4, "selection": rule, "mode": "reduce-overhead", "inductor": inductor}
    backend = Captured(**{"compiler": "inductor", **options})
    torch.compile(mlp(8, 12), backend=backend)(torch.randn(5, 8)).sum().backward()
    assert look.seen == recorded and backend.only.cuda_graphs
