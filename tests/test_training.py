"""Training through the backend equals grass_fx/testing/reference.py, step by step."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grass_fx
import llama
from grass_fx.config import GrassConfig
from grass_fx.state.gradient import CompactGrad
from grass_fx.testing.reference import Reference
from helpers import Captured, mlp

STEPS, K = 12, 4  # three refreshes
RULES = [
    ("cyclic", False),
    ("uniform", False),
    ("uniform", True),
    ("multinomial_norm", False),
    ("multinomial_norm", True),
    ("multinomial_norm_sq", False),
    ("multinomial_norm_sq", True),
    ("top", False),
    ("frozen_top", False),
]
RULE_IDS = [f"{rule}{'-replacement' if replacement else ''}" for rule, replacement in RULES]
VARIANTS = [
    pytest.param(rule, replacement, side, block, id=f"{name}-{side}-{block}")
    for ((rule, replacement), name), side, block in itertools.product(
        zip(RULES, RULE_IDS, strict=True), ["out", "in"], [1, 2]
    )
]
# Every rule, with the sides and blocks in turn; and the same with others.
SOME_VARIANTS = [VARIANTS[4 * i + i % 4] for i in range(len(RULES))]
OTHER_VARIANTS = [VARIANTS[4 * i + (i + 2) % 4] for i in range(len(RULES))]
# Input features, with blocks of one or two, by four of the rules.
LOOKUP_VARIANTS = [VARIANTS[4 * i + 2 + i % 2] for i in (0, 2, 5, 7)]


class Shared(nn.Module):
    """A layer used twice, a matrix used both ways, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layer = nn.Linear(8, 8)
        self.tied = nn.Parameter(torch.randn(8, 10) / 3)

    def forward(self, tokens):
        x = self.layer(torch.tanh(self.layer(self.embed(tokens))))
        x = torch.tanh(x @ self.tied) @ self.tied.t()
        return x @ self.embed.weight.t()


def tokens_loss(model, seed):
    """A loss of a language model on random tokens."""
    tokens = torch.randint(12, (3, 9), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def vectors_loss(model, seed):
    """A loss of an MLP on random vectors."""
    gen, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    sizes = model.get_parameter("0.weight").shape[1], model.get_parameter("2.weight").shape[0]
    x, y = (torch.randn(10, n, generator=gen, dtype=torch.float64).to(dtype) for n in sizes)
    return (model(x) - y).square().mean()


def make(name):
    """(model, loss, output dimension of each linear weight), the last found without the library."""
    if name == "mlp":
        model, loss = mlp(8, 12, 6), vectors_loss
    elif name == "uneven":
        model, loss = mlp(11, 14, 10), vectors_loss
    elif name == "llama":
        sizes = {"vocab": 12, "hidden": 16, "ffn": 24, "layers": 1, "heads": 2}
        model, loss = llama.build("tiny", **sizes), tokens_loss
    elif name == "layers":
        model, loss = Layers(), vectors_loss
    else:
        model, loss = Shared(), tokens_loss
    out_dims = {
        f"{path}.weight": 0 for path, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    if name in ("shared", "lookups"):
        out_dims["tied"] = 1
    if name == "lookups":  # the same model, with this option
        out_dims["embed.weight"] = 0
    return model, loss, out_dims


class Layers(nn.ModuleDict):
    """A layer that is used three times, and nothing else but layers."""

    def __init__(self):
        super().__init__({"0": nn.Linear(8, 12), "1": nn.Linear(12, 12), "2": nn.Linear(12, 6)})

    def forward(self, x):
        x = self["0"](x)
        for _ in range(3):
            x = torch.tanh(self["1"](x))
        return self["2"](x)


class InputNorms(Reference):
    """Scores each weight by the inputs of its layers, or with side "out" by their gradients."""

    def __post_init__(self):
        super().__post_init__()
        self.seen = {}
        for layer in (m for m in self.model.modules() if isinstance(m, nn.Linear)):
            layer.register_forward_hook(partial(self.see, layer.weight))

    def see(self, weight, layer, inputs, output):
        def note(x):
            s = x.detach().double().flatten(0, -2).square().sum(0).float()
            self.seen[weight] = self.seen.get(weight, 0) + s

        if self.config.side == "in":
            note(inputs[0])
        else:
            output.register_hook(note)

    def gather(self, weight):
        before, seen = weight.scores, self.seen.pop(weight.w)
        super().gather(weight)
        if weight.scores is not None:
            weight.scores = seen if before is None else before + seen


def compare(name, compiler, dtype, options, tolerance, **adamw):
    """Train both; compare gradients, scores, selections at every step, and weights at the end."""
    model, loss, out_dims = make(name)
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    options = {**options, "lookups": name == "lookups"}
    config = GrassConfig(**options)
    side = {"out": 0, "in": 1}[config.side]
    taken = {n: d if side == 0 else 1 - d for n, d in out_dims.items()}
    backend = Captured(compiler=compiler, **options)
    compiled = torch.compile(model, backend=backend)
    adamw = {"lr": 1e-2, "warmup_steps": 3, **adamw}
    optimizer = grass_fx.AdamW(model.named_parameters(), **adamw)
    kind = InputNorms if config.selection == "input_norm" else Reference
    reference = kind(twin, taken, config, **adamw)
    close = {"rtol": tolerance, "atol": tolerance}
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in (0, 1):
            loss(compiled, 2 * step + micro).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        selected = {n: (list(w.rows), list(w.rho)) for n, w in reference.weights.items()}
        optimizer.step()
        reference.step([lambda m, s=2 * step + micro: loss(m, s) for micro in (0, 1)])
        compacts = {n for n, g in grads.items() if isinstance(g, CompactGrad)}
        assert compacts == set(taken)
        for n, weight in reference.weights.items():
            grad, (rows, rho) = grads[n], selected[n]
            assert grad.selection.indices.tolist() == rows
            if grad.selection.scale is not None:
                given, want = grad.selection.scale.double(), torch.tensor(rho).double()
                torch.testing.assert_close(given, want, rtol=1e-6, atol=0)  # from float32 scores
            torch.testing.assert_close(grad.compact, weight.turned(weight.compact), **close)
            p = torch.zeros(weight.w.shape[weight.dim], weight.rank, dtype=dtype)
            p[rows, range(weight.rank)] = torch.tensor(rho, dtype=dtype)
            torch.testing.assert_close(grad.to_dense(), weight.turned(p @ weight.compact), **close)
            assert (grad.scores is None) == (weight.scores is None)
            if grad.scores is not None:
                torch.testing.assert_close(grad.scores, weight.scores)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, **close)
    assert all(not graph.report.stopped for graph in backend.graphs)
    return backend


def options_of(rule, replacement, side, block):
    options = {"rank": 4, "refresh_every": K, "seed": 3, "side": side, "block": block}
    return {**options, "selection": rule, "replacement": replacement}


@pytest.mark.parametrize(
    ("name", "rule", "replacement", "side", "block"),
    [
        pytest.param(name, *variant.values, id=f"{name}-{variant.id}")
        for name, variants in (
            ("mlp", VARIANTS),
            ("llama", SOME_VARIANTS),
            ("shared", OTHER_VARIANTS),
            ("lookups", LOOKUP_VARIANTS),
        )
        for variant in variants
    ],
)
def test_equals_the_reference_aot_eager(name, rule, replacement, side, block):
    options = options_of(rule, replacement, side, block)
    backend = compare(name, "aot_eager", torch.float64, options, 1e-10)
    scores = rule.startswith(("multinomial", "top", "frozen"))
    assert [variant.name for variant in backend.only.graphs] == ["regular", "scoring"][: 1 + scores]


@pytest.mark.parametrize(("rule", "replacement", "side", "block"), SOME_VARIANTS)
def test_equals_the_reference_inductor(rule, replacement, side, block):
    options = options_of(rule, replacement, side, block)
    compare("mlp", "inductor", torch.float64, options, 1e-10)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize(
    ("name", "compiler", "replacement", "block"),
    [
        ("mlp", "aot_eager", True, 2),
        ("llama", "aot_eager", False, 1),
        ("layers", "aot_eager", False, 2),
        ("mlp", "inductor", False, 1),
    ],
)
def test_equals_the_reference_by_norms_of_inputs(name, compiler, replacement, side, block):
    options = options_of("input_norm", replacement, side, block)
    backend = compare(name, compiler, torch.float64, options, 1e-10)
    assert not backend.only.report.scored_by_gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule", "replacement", "side", "block"),
    [
        pytest.param(("llama", "shared")[i % 2], *variant.values, id=variant.id)
        for i, variant in enumerate(OTHER_VARIANTS[::2])
    ],
)
def test_equals_the_reference_inductor_models(name, rule, replacement, side, block):
    options = options_of(rule, replacement, side, block)
    compare(name, "inductor", torch.float64, options, 1e-10)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("rule", "replacement"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("side", ["out", "in"])
def test_equals_the_reference_where_blocks_do_not_divide(compiler, rule, replacement, side):
    """Units of 3 of 11, 14 and 10 rows: the last ones have two or one, and k is 2."""
    options = {**options_of(rule, replacement, side, 3), "rank": 6}
    compare("uneven", compiler, torch.float64, options, 1e-10)


def by_both(*slow):
    """Every model by both compilers; ``slow`` ones by Inductor only where slow tests run."""
    return [
        pytest.param(name, compiler, marks=[pytest.mark.slow] if name in marked else [])
        for compiler, marked in (("aot_eager", ()), ("inductor", slow))
        for name in ("mlp", "llama", "shared")
    ]


@pytest.mark.parametrize(("name", "compiler"), by_both("llama", "shared"))
def test_equals_the_reference_in_float32(name, compiler):
    compare(name, compiler, torch.float32, options_of("top", False, "out", 1), 1e-5)


@pytest.mark.parametrize(("rule", "replacement", "side", "block"), SOME_VARIANTS)
def test_equals_the_reference_with_reset(rule, replacement, side, block):
    options = options_of(rule, replacement, side, block)
    adamw = {"on_refresh": "reset", "scale": 0.5, "weight_decay": 0.1, "warmup_steps": 0}
    compare("mlp", "aot_eager", torch.float64, options, 1e-10, **adamw)


def test_equals_the_reference_where_it_maximizes():
    options = options_of("multinomial_norm", True, "in", 1)
    compare("shared", "aot_eager", torch.float64, options, 1e-10, maximize=True, weight_decay=0.1)


@pytest.mark.parametrize(("name", "compiler"), by_both("llama", "shared"))
def test_full_rank_is_torchs_adamw(name, compiler):
    """r = m for every weight, no warm-up, K = ∞: AdamW on the same compiled model."""
    if name == "llama" and compiler == "inductor" and torch.__version__ < "2.12":
        pytest.skip("Inductor cannot compile the backward of attention in float64")
    model, loss, out_dims = make(name)
    model = model.double()
    twin = copy.deepcopy(model)
    sizes = {n: model.get_parameter(n).shape for n in out_dims}
    # One rank for all: the weights whose smaller dimension is that size, in turns.
    for rank in sorted({min(shape) for shape in sizes.values()}):
        torch._dynamo.reset()
        names = [n for n, shape in sizes.items() if min(shape) == rank]
        backend = Captured(
            compiler=compiler, rank=rank, refresh_every=math.inf, include=names, side="auto", seed=1
        )
        compiled = torch.compile(model, backend=backend)
        optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=0)
        theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        for step in range(6):
            for m, o in ((compiled, optimizer), (twin, theirs)):
                o.zero_grad()
                loss(m, step).backward()
                o.step()
        assert {w.name for w in backend.only.found.taken} == set(names)
        assert all(w.spec.rank == w.spec.size for w in backend.only.found.taken)
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_tied_head_is_left_with_its_reason():
    model, loss, _ = make("shared")
    backend = Captured(rank=4)
    loss(torch.compile(model, backend=backend), 0)
    assert list(backend.only.found.left) == ["embed.weight"]
    assert "embedding" in backend.only.found.left["embed.weight"]


def test_no_full_gradient_in_the_backward_of_a_llama():
    """In the regular variant no node but a weight has the full shape of a taken weight."""
    sizes = {"vocab": 11, "hidden": 16, "ffn": 40, "layers": 1, "heads": 2}
    model = llama.build("tiny", **sizes)
    graphs = []

    def keep(graph):  # a user's pass: it sees every node's value after ours
        graphs.append(graph)

    # The head stays dense: the embedding's dense gradient has its shape.
    options = {"rank": 4, "exclude": ["head*"], "inductor": {"joint_custom_pre_pass": keep}}
    backend = Captured(compiler="inductor", **options)
    tokens = torch.randint(11, (3, 8))
    logits = torch.compile(model, backend=backend)(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    shapes = {tuple(weight.shape) for weight in backend.only.found.taken}
    assert len(backend.only.found.taken) == 7 and len(graphs) == 1
    full = shapes | {shape[::-1] for shape in shapes}
    weights = set(graphs[0].find_nodes(op="placeholder"))
    views = (torch.ops.aten.permute.default, torch.ops.aten.view.default, torch.ops.aten.t.default)

    def is_weight(node):
        while node.target in views:
            node = node.args[0]
        return node in weights

    offenders = [
        node
        for node in graphs[0].nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        and tuple(value.shape) in full
        and not is_weight(node)
    ]
    assert not offenders
