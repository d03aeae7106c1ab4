"""Collectives run beside the backward's computation, though the forward keeps only what it must."""

import random
import re

import pytest
import torch
from test_keep_selected import saved_for_backward
from torch._inductor.utils import run_fw_bw_and_get_code

import grass_fx
from grass_fx.compile.overlap import early_order
from grass_fx.distributed import data_parallel
from helpers import mlp
from ranks import spawn

LAYERS = 4
LETTERS = {  # what generated code does, by a part of the line
    "all_reduce": "r",
    "wait_tensor": "w",
    "mm": "m",
}
CALLS = re.compile(rf"(?:_c10d_functional\.|extern_kernels\.)({'|'.join(LETTERS)})\w*(?:\.\w+)?\(")


def ordered(nodes):
    """Letters of nodes, each with the places of what it needs, in their new order."""
    letters, before = zip(*nodes, strict=True)
    starts, waits = ([each == letter for each in letters] for letter in "rw")
    return "".join(letters[k] for k in early_order(starts, waits, before))


def test_all_reduces_start_early_and_are_waited_for_late():
    m, n = ("m", set()), ("m", {0})
    assert ordered([m, n, n, ("r", {0}), ("w", {3}), ("r", {2}), ("w", {5})]) == "mrmmrww"
    assert ordered([m, ("r", {0}), ("w", {1}), n, ("p", {2}), n]) == "mrmwpm"  # p reads the average
    twice = [m, ("r", {0}), ("w", {1}), ("r", {2}), ("w", {3}), n, n]  # of an average
    assert ordered(twice) == "mrwrmmw"


def test_a_new_order_keeps_every_dependency_and_the_order_of_collectives():
    draw = random.Random(0)
    for _ in range(300):
        letters = ["m", *draw.choices("mmmrw", k=30)]
        before = [set()] + [
            {*draw.sample(range(k), min(k, draw.randint(0, 3)))} for k in range(1, 31)
        ]
        starts, waits = ([each == letter for each in letters] for letter in "rw")
        order = early_order(starts, waits, before)
        place = {k: at for at, k in enumerate(order)}
        assert sorted(order) == [*range(31)]
        assert all(place[other] < place[k] for k in order for other in before[k])
        begun = [k for k in order if starts[k]]
        assert begun == sorted(begun)


def order(**inductor):
    """The all-reduces (r), waits (w) and products (m) of a backward; gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = data_parallel(mlp(*[32] * (LAYERS + 1), bias=False))
    compiled = torch.compile(model, backend="grass", options={"rank": 8, "inductor": inductor})
    grass_fx.AdamW(model.parameters())  # numbers the weights: the same selections every time
    x = torch.randn(16, 32)
    _, codes = run_fw_bw_and_get_code(lambda: compiled(x).square().mean())
    grads = [p.grad for p in model.parameters()]
    assert all(isinstance(grad, grass_fx.CompactGrad) for grad in grads)
    return "".join(LETTERS[name] for name in CALLS.findall(codes[-1])), grads


def run(rank):
    """As torch schedules them most waits follow their collectives; here a product comes between."""
    off = {"reorder_for_compute_comm_overlap": False}
    (apart, want), (beside, got) = order(**off), order()
    assert apart.count("r") == beside.count("r") == LAYERS
    alone = [calls.count("rw") for calls in (apart, beside)]
    assert alone[1] <= 1 < alone[0], (apart, beside)  # beside the last nothing is left to do
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.compact, b.compact, rtol=0, atol=0)
    fused, fused_grads = order(bucket_all_reduces_fx="all")
    assert fused.count("r") == 1, fused
    for a, b in zip(fused_grads, got, strict=True):
        torch.testing.assert_close(a.compact, b.compact)


def run_keeping(rank):
    """Of a rule without scores averaged graphs keep what is selected, as other graphs do."""
    kept = {}
    for rule in ("cyclic", "top"):
        torch._dynamo.reset()
        model = data_parallel(mlp(*[32] * (LAYERS + 1), bias=False))
        options = {"rank": 8, "selection": rule, "compiler": "aot_eager"}
        compiled = torch.compile(model, backend="grass", options=options)
        kept[rule], loss = saved_for_backward(compiled, torch.randn(16, 32))
        loss.backward()
    assert kept["top"] - kept["cyclic"] > (LAYERS - 1) * 16 * 16 * 4, kept


@pytest.mark.slow
def test_averaged_graphs_keep_what_is_selected():
    spawn(run_keeping, 2, timeout=120)


@pytest.mark.slow
def test_products_run_while_gradients_are_averaged():
    spawn(run, 2, timeout=120)
