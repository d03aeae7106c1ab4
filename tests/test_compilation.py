"""What compilation does in real life: regions, checkpoints, casts, breaks and sizes that change.

Every gradient is compared with that of a copy that is not compiled.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import grass_fx
from grass_fx.compile.runtime import GrassCallable
from grass_fx.errors import GrassWarning
from grass_fx.state.gradient import CompactGrad
from helpers import Captured

MM = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
SUBSPACE = {"rank": 2, "refresh_every": 2}


class Block(nn.Module):
    """Two linear layers and a residual connection, run as ``run`` says."""

    def __init__(self, run=None):
        super().__init__()
        self.up, self.down, self.run = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), run

    def branch(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return x + (self.branch(x) if self.run is None else self.run(self, x))


class Stack(nn.Module):
    """Blocks between an embedding, so that all get inputs that need gradients, and a head."""

    def __init__(self, run=None, blocks=3):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 6)
        self.blocks = nn.ModuleList(Block(run) for _ in range(blocks))

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def check(model, twin, tolerance=1e-10):
    """Compact gradients select from the twin's full ones, all others equal them. Their names."""
    compact = []
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if isinstance(p.grad, CompactGrad):
            compact.append(name)
            close(p.grad.compact, p.grad.selection.project(q.grad), tolerance)
        else:
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                close(p.grad, q.grad, tolerance)
    return compact


def matrices(model):
    """The names of the weights of linear layers."""
    modules = model.named_modules()
    return [f"{name}.weight" for name, m in modules if isinstance(m, nn.Linear)]


def pushed(backend):
    """For each training graph the names of its taken weights, all of which were pushed."""
    graphs = [graph for graph in backend.graphs if isinstance(graph, GrassCallable)]
    names = [[weight.name for weight in graph.found.taken] for graph in graphs]
    assert [graph.report.stopped for graph in graphs] == [{}] * len(graphs)
    assert [sorted(g.report.pushed) for g in graphs] == [sorted(taken) for taken in names]
    return names


def step_both(optimizer, compiled, model, twin, *inputs, tolerance=1e-10):
    """One step of the model, checked against its twin, which then gets the same weights."""
    optimizer.zero_grad()
    twin.zero_grad()
    compiled(*inputs).square().mean().backward()
    twin(*inputs).square().mean().backward()
    compact = check(model, twin, tolerance)
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    return compact


def tokens(*shape):
    return torch.randint(11, shape or (3, 5))


# --- activation checkpointing ---------------------------------------------------------------------


def keep_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in MM else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def prefer_saving(ctx, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_SAVE


def checkpointed(block, x, policy=None):
    more = {}
    if policy is not None:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block.branch, x, use_reentrant=False, **more)


POLICIES = [None, keep_products, recompute_all, prefer_saving, list(MM)]
RULES = ["cyclic", "multinomial_norm"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: getattr(p, "__name__", str(p)[:11]))
def test_checkpoints_inside_the_region(policy, rule):
    model = Stack(partial(checkpointed, policy=policy)).double()
    twin, backend = copy.deepcopy(model), Captured(selection=rule, **SUBSPACE)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = grass_fx.AdamW(model.parameters())
    for _ in range(3):
        assert step_both(optimizer, compiled, model, twin, tokens()) == matrices(model)
    assert [sorted(names) for names in pushed(backend)] == [sorted(matrices(model))]


@pytest.mark.slow
def test_selective_checkpoints_with_inductor():
    model = Stack(partial(checkpointed, policy=keep_products)).double()
    twin = copy.deepcopy(model)
    options = {"selection": "top", **SUBSPACE}
    compiled = torch.compile(model, backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.parameters())
    for _ in range(3):
        assert step_both(optimizer, compiled, model, twin, tokens()) == matrices(model)


@pytest.mark.parametrize("policy", [None, keep_products])
@pytest.mark.parametrize("rule", RULES)
def test_checkpoints_around_compiled_branches(rule, policy):
    model = Stack(partial(checkpointed, policy=policy)).double()
    twin, backend = copy.deepcopy(model), Captured(selection=rule, **SUBSPACE)
    for block in model.blocks:
        block.branch = torch.compile(block.branch, backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    inside = [name for name in matrices(model) if name != "head.weight"]
    for _ in range(3):
        assert step_both(optimizer, model, model, twin, tokens()) == inside
    assert pushed(backend) == [["up.weight", "down.weight"]]


def test_a_graph_break_inside_a_checkpoint_trains_dense_and_says_so():
    """Dynamo never enters a checkpoint that it cannot trace whole: no weight is in a graph."""

    def run(block, x):
        return checkpoint(lambda x: explicit(block, x), x, use_reentrant=False)

    model = Stack(run).double()
    twin, backend = copy.deepcopy(model), Captured(**SUBSPACE)
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(GrassWarning, match="no compact gradient has arrived"):
        assert step_both(grass_fx.AdamW(model.parameters()), compiled, model, twin, tokens()) == []
    assert pushed(backend) == []


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_compiled_layers_of_a_llama_with_gradient_checkpointing(rule):
    """Transformers checkpoints each decoder layer from outside, around its compiled forward."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twin, backend = copy.deepcopy(model), Captured(selection=rule, **SUBSPACE)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    inside = [name for name in matrices(model) if "layers" in name]

    def loss_of(it, ids):
        return it(input_ids=ids, labels=ids).loss

    ids = tokens()
    for _ in range(3):
        run, run_twin = partial(loss_of, model), partial(loss_of, twin)
        optimizer.zero_grad()
        twin.zero_grad()
        run(ids).backward()
        run_twin(ids).backward()
        assert check(model, twin, 1e-5) == inside
        optimizer.step()
        twin.load_state_dict(model.state_dict())
    assert len(backend.graphs) == 1 and len(pushed(backend)[0]) == 7


# --- autocast ------------------------------------------------------------------------------------


def cast_inside(dtype, block, x):
    with torch.autocast("cpu", dtype):
        return block.branch(x).to(x.dtype)


def cast_first_half(dtype, block, x):
    with torch.autocast("cpu", dtype):
        x = torch.tanh(block.up(x))
        with torch.autocast("cpu", enabled=False):
            return block.down(x.float())


@pytest.mark.parametrize("run", [cast_inside, cast_first_half], ids=lambda run: run.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_region(run, dtype):
    model = Stack(partial(run, dtype))
    twin, backend = copy.deepcopy(model), Captured(**SUBSPACE)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = grass_fx.AdamW(model.parameters())
    tolerance = 2e-3  # of the 16-bit products; the gradients are about 0.1
    for _ in range(3):
        compact = step_both(optimizer, compiled, model, twin, tokens(), tolerance=tolerance)
        assert compact == matrices(model)
    assert model.head.weight.grad.dtype == torch.float32
    assert [sorted(names) for names in pushed(backend)] == [sorted(matrices(model))]


def test_leaving_autocast_compiles_again_and_both_are_right():
    model = Stack()
    twin, backend = copy.deepcopy(model), Captured(rank=2)
    compiled, ids = torch.compile(model, backend=backend), tokens()
    for enabled in (True, False, True):
        model.zero_grad()
        twin.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, want = (it(ids).float().square().mean() for it in (compiled, twin))
        loss.backward()
        want.backward()
        assert check(model, twin, 2e-3 if enabled else 1e-5) == matrices(model)
    assert len(pushed(backend)) == 2


# --- graph breaks --------------------------------------------------------------------------------


def explicit(block, x):
    x = torch.tanh(block.up(x))
    torch._dynamo.graph_break()
    return block.down(x)


def printing(block, x):
    x = torch.tanh(block.up(x))
    print("half way", x.shape[0], float(x.detach().sum()))
    return block.down(x)


def branching(block, x):
    x = torch.tanh(block.up(x))
    if x.sum() > 0:
        return block.down(x)
    return -2 * block.down(x.sin())


@pytest.mark.parametrize("run", [explicit, printing, branching], ids=lambda run: run.__name__)
def test_a_graph_break_in_the_middle_of_a_block(run, capsys):
    model = Stack(run).double()
    twin, backend = copy.deepcopy(model), Captured(**SUBSPACE)
    compiled = torch.compile(model, backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    # Dynamo leaves the loop over the blocks, and with it the head, to Python.
    inside = [name for name in matrices(model) if name != "head.weight"]
    for _ in range(4):
        assert step_both(optimizer, compiled, model, twin, tokens()) == inside
    assert {"up.weight", "down.weight"} == {name for (name,) in pushed(backend)}
    assert ("half way" in capsys.readouterr().out) == (run is printing)


# --- regions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "rule"),
    [("aot_eager", "cyclic"), ("aot_eager", "multinomial_norm"), ("inductor", "multinomial_norm")],
)
def test_equal_layers_compile_once_and_select_on_their_own(compiler, rule):
    model = Stack(blocks=4).double()
    twin = copy.deepcopy(model)
    counters.clear()
    options = {"compiler": compiler, "selection": rule, **SUBSPACE}
    for block in model.blocks:
        block.compile(backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.parameters())
    inside = [name for name in matrices(model) if name != "head.weight"]
    seen = {id(block): set() for block in model.blocks}
    for _ in range(6):
        assert step_both(optimizer, model, model, twin, tokens()) == inside
        rows = []
        for block in model.blocks:
            selection = block.up.weight.grad.selection
            rows.append(tuple(selection.indices.tolist()))
            seen[id(block)].add((selection.generation, rows[-1]))
        assert len(set(rows)) > 1
    assert counters["stats"]["unique_graphs"] == 1
    assert all(len({rows for _, rows in history}) >= 3 for history in seen.values())


# --- sizes ---------------------------------------------------------------------------------------


def marked(ids):
    for dim in range(2):
        torch._dynamo.mark_dynamic(ids, dim)
    return ids


SIZES = [(3, 5), (4, 7), (2, 9), (6, 4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dynamic", "prepare", "graphs"),
    [(True, lambda ids: ids, 1), (None, marked, 1), (None, lambda ids: ids, 2)],
    ids=["dynamic=True", "mark_dynamic", "automatic"],
)
def test_batches_and_sequences_of_many_sizes(dynamic, prepare, graphs, rule):
    model = Stack().double()
    twin, backend = copy.deepcopy(model), Captured(selection=rule, **SUBSPACE)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    optimizer = grass_fx.AdamW(model.parameters())
    for size in SIZES:
        ids = prepare(tokens(*size))
        assert step_both(optimizer, compiled, model, twin, ids) == matrices(model)
    assert len(backend.graphs) == graphs
    assert [len(names) for names in pushed(backend)] == [7] * graphs


def test_one_size_stays_static_while_another_becomes_dynamic():
    model = Stack().double()
    twin, backend = copy.deepcopy(model), Captured(**SUBSPACE)
    compiled = torch.compile(model, backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    for size, graphs in [((3, 5), 1), ((3, 7), 2), ((3, 9), 2), ((4, 9), 3), ((5, 6), 3)]:
        assert step_both(optimizer, compiled, model, twin, tokens(*size)) == matrices(model)
        assert len(backend.graphs) == graphs
    assert pushed(backend)


# --- ways to compile -----------------------------------------------------------------------------


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def its_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model


def closure(model, backend):
    return torch.compile(lambda ids: model(ids), backend=backend, fullgraph=True)


@pytest.mark.parametrize("how", [whole, in_place, its_forward, closure], ids=lambda h: h.__name__)
def test_ways_to_compile_a_model(how):
    model = Stack().to(torch.float64)
    twin, backend = copy.deepcopy(model), Captured(**SUBSPACE)
    compiled = how(model, backend)
    optimizer = grass_fx.AdamW(model.parameters())
    for _ in range(3):
        assert step_both(optimizer, compiled, model, twin, tokens()) == matrices(model)
    assert [sorted(names) for names in pushed(backend)] == [sorted(matrices(model))]


def test_a_model_converted_before_it_is_compiled_has_gradients_of_its_dtype():
    model = Stack().to(torch.bfloat16)
    twin, backend, ids = copy.deepcopy(model), Captured(rank=2), tokens()
    compiled = torch.compile(model, backend=backend)
    for it in (compiled, twin):
        F.cross_entropy(it(ids).float().flatten(0, 1), ids.flatten() % 6).backward()
    assert check(model, twin, 2e-2) == matrices(model)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(pushed(backend)) == 1
