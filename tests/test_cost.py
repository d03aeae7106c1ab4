"""The cost model against counted FLOPs and real bytes, and plans against their own arithmetic."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import grass_fx
from grass_fx import ops
from grass_fx.__main__ import main
from grass_fx.errors import OptionError
from grass_fx.inspect import cost
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.planning import activation_bytes, parse_memory
from grass_fx.inspect.shapes import llama_shapes
from helpers import mlp
from llama import build

PAGE = Path(__file__).resolve().parent.parent / "docs/memory-planning.md"


def counted(f):
    with FlopCounterMode(display=False, custom_mapping=INSIDE) as counter:
        f()
    return counter.get_total_flops()


def inside(f):
    """The counter does not look into operators that are not torch's: count what they call."""

    def flops(*args, out_val=None, **kwargs):
        return counted(lambda: f(*args, **kwargs))

    flops._get_raw = True
    return flops


INSIDE = {
    torch.ops.grass.selected_mm: inside(ops.selected_mm),
    torch.ops.grass.mm_squared_norms: inside(ops.mm_squared_norms),
}


# --- formulas -------------------------------------------------------------------------------------


def test_the_flops_of_a_linear_layer_are_those_counted():
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48, requires_grad=True)
    of = LinearCost(m=32, n=48, r=8, b=20)
    assert counted(lambda: layer(x)) == of.forward_flops
    assert counted(lambda: layer(x).sum().backward()) == of.full_step_flops


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(5461, 2048), (2048, 5461), (7, 33), (3, 130, 40)])
def test_signs_have_the_bytes_of_their_words(shape, side):
    """Of G where columns are selected, of its transpose where rows are, as in a stack."""
    *stack, m, n = shape
    side, count = "out" if stack else side, math.prod(stack)
    weight = LinearCost(m, n, 1, signs_every=1, matrices=count, side=side)
    g = torch.randn(count * m, n)
    assert weight.sign_bytes == ops.signs(g, 1 if side == "in" else 0).nbytes
    assert LinearCost(m, n, 1).sign_bytes == 0


def test_signs_are_one_bit_an_element_and_a_128th_more():
    formula = LinearCost(signs_every=1).sign_bytes
    exact = LinearCost(2048, 4096, 1, signs_every=1).sign_bytes
    assert exact == formula.subs({"m": 2048, "n": 4096}) == 2048 * 4096 // 8 * 129 // 128


@pytest.mark.parametrize("side", ["out", "in"])
def test_the_flops_of_the_compact_gradient_are_those_counted(side):
    d, x, indices = torch.randn(20, 32), torch.randn(20, 48), torch.arange(8)
    of, dim = LinearCost(m=32, n=48, r=8, b=20, side=side), 0 if side == "out" else 1
    product = ops.SELECTED_MM
    assert counted(lambda: product(d.t(), x, indices, None, dim)) == of.compact_gradient_flops
    assert counted(lambda: ops.SELECT(d.t() @ x, indices, None, dim)) == of.full_gradient_flops
    assert product(d.t(), x, indices, None, dim).nbytes == of.gradient_bytes.subs({"e": 4})


@pytest.mark.parametrize("scoring", ["gradient", "tiles"])
def test_the_flops_of_a_compiled_step_are_those_counted(scoring):
    """A regular step and a scoring one, as they run."""
    torch._dynamo.reset()
    layer, x = nn.Linear(48, 32, bias=False), torch.randn(20, 48, requires_grad=True)
    options = {"rank": 8, "selection": "top", "scoring": scoring, "compiler": "aot_eager"}
    compiled = torch.compile(layer, backend="grass", options={**options, "refresh_every": 2})
    optimizer = grass_fx.AdamW(layer.parameters())
    of = LinearCost(m=32, n=48, r=8, b=20, K=2, side="in", scoring=scoring)
    backwards = []
    for _ in range(2):  # step 0 scores, step 1 does not
        loss = compiled(x).square().sum()  # under the counter, Dynamo would leave it eager
        backwards.append(counted(loss.backward))
        optimizer.step()
        optimizer.zero_grad()
    products = [of.scoring_gradient_flops, of.compact_gradient_flops]
    assert backwards == [of.input_gradient_flops + each for each in products]
    assert sum(backwards) + 2 * of.forward_flops == 2 * of.step_flops


def test_symbols_stay_symbols():
    of = LinearCost()
    assert of.step_flops == 4 * cost.b * cost.m * cost.n + 2 * cost.b * cost.r * cost.m
    assert of.full_optimizer_traffic == 7 * cost.m * cost.n * cost.e
    assert of.state_bytes == 2 * cost.r * cost.m * cost.e + 16 * cost.r + 16
    assert (of.all_reduce_bytes / of.full_all_reduce_bytes).simplify() == cost.r / cost.n
    eighth = (of.full_step_flops / of.step_flops).simplify().subs({"n": 64, "r": 8})
    assert float(eighth) == pytest.approx(1.41, abs=0.002)  # as docs/method.md says
    numbers = {"b": 20, "m": 32, "n": 48, "r": 8, "K": 10, "e": 2, "p": 4}
    for side in ("out", "in"):
        for scoring in (None, "gradient", "tiles"):
            symbolic = LinearCost(side=side, scoring=scoring, replacement=True)
            given = LinearCost(32, 48, 8, 20, 10, 2, side, scoring, True, ranks=4)
            properties = [k for k, v in vars(LinearCost).items() if isinstance(v, property)]
            assert len(properties) > 20
            for each in properties:
                left = getattr(symbolic, each)
                left = left.subs(numbers) if hasattr(left, "subs") else left
                assert float(left) == pytest.approx(getattr(given, each)), each


# --- plans ----------------------------------------------------------------------------------------


def bytes_of_a_step(model, x, replacement=False, selection="uniform"):
    torch._dynamo.reset()
    options = {"rank": 8, "selection": selection, "replacement": replacement}
    compiled = torch.compile(model, backend="grass", options={**options, "compiler": "aot_eager"})
    optimizer = grass_fx.AdamW(model.parameters())
    compiled(x).square().sum().backward()
    optimizer.step()
    found = dict.fromkeys(("compact gradients", "dense gradients", "scores"), 0)
    found |= {"weights": sum(p.nbytes for p in model.parameters())}
    found |= {"compact state": 0, "dense state": 0}
    for p in model.parameters():
        kind = "compact" if isinstance(p.grad, grass_fx.CompactGrad) else "dense"
        found[f"{kind} gradients"] += (p.grad.compact if kind == "compact" else p.grad).nbytes
        if kind == "compact" and p.grad.scores is not None:
            found["scores"] += p.grad.scores.nbytes
        found[f"{kind} state"] += sum(t.nbytes for t in optimizer.state[p].values())
    return found, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_plan_has_the_bytes_of_a_real_step(dtype, replacement):
    model = nn.Sequential(nn.Embedding(40, 24), mlp(24, 64, 16), nn.LayerNorm(16)).to(dtype)
    found, options = bytes_of_a_step(model, torch.randint(40, (12,)), replacement)
    del options["rank"], found["scores"]
    plan = grass_fx.plan(model, "1MB", rank=8, options=options)
    assert {name: plan.parts[name] for name in found} == found
    assert plan.taken == {"1.0.weight": 8, "1.2.weight": 8}


def test_a_scoring_step_has_scores_and_one_gradient():
    model = mlp(24, 64, 16)
    found, options = bytes_of_a_step(model, torch.randn(12, 24), selection="top")
    plan = grass_fx.plan(model, "1MB", rank=8, options={"selection": "top"})
    assert plan.parts["scoring step"] == found["scores"] + model[0].weight.nbytes
    tiles = grass_fx.plan(model, "1MB", rank=8, options={"selection": "top", "scoring": "tiles"})
    assert tiles.parts["scoring step"] == found["scores"] == 4 * (24 + 64)


def test_a_stack_of_matrices_has_a_selection_each():
    plan = grass_fx.plan({"experts": (4, 32, 16)}, "1MB", rank=8, dtype=torch.float32)
    assert plan.parts["compact gradients"] == 4 * 8 * 16 * 4
    assert plan.parts["compact state"] == 2 * 4 * 8 * 16 * 4 + 4 * 8 * 16 + 16


@pytest.mark.parametrize("memory", ["8MB", "9MB", "12MiB", "40MB"])
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_the_rank_is_the_largest_that_fits(memory, rule):
    shapes = {"a": (512, 512), "b": (1376, 512), "c": (512, 256), "norm": (512,), "x": (512, 512)}
    options = {"exclude": ["x"], "selection": rule}
    plan = grass_fx.plan(shapes, memory, options=options)
    assert plan.fits and plan.size == 512 and plan.rows % 8 == 0
    assert plan.rank == plan.rows / 512 and "x" not in plan.taken and "norm" not in plan.taken
    if plan.rows < 504:
        more = grass_fx.plan(shapes, memory, rank=(plan.rows + 8) / 512, options=options)
        assert not more.fits and more.total > plan.memory >= plan.total
    # The same options reach torch.compile: the fraction gives these ranks there.
    config = grass_fx.inspect.planning.GrassConfig(rank=plan.rank)
    assert plan.taken["c"] == config.rank_of(256)


def test_blocks_and_small_weights():
    assert grass_fx.plan([(64, 64)], "1MB", options={"block": 16}).rows == 48
    assert grass_fx.plan([(64, 8)], "1MB").rows == 7
    assert grass_fx.plan([(64, 1)], "1MB").rows == 1


def test_a_model_on_the_meta_device_is_measured_without_memory():
    with torch.device("meta"):
        model, tokens = build("7b", layers=2).bfloat16(), torch.zeros(1, 128, dtype=torch.long)
    plan = grass_fx.plan(model, "5GB", inputs=[tokens, tokens], tokens=128)
    assert plan.parts["buffers"] == sum(each.nbytes for each in model.buffers())
    assert plan.parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert 0 < plan.parts["activations"] < activation_bytes(model, tokens, tokens)
    assert plan.full_parts["activations"] > plan.parts["activations"]
    assert "embed.weight" not in plan.taken and "head.weight" in plan.taken
    assert plan.flops["subspace"] < plan.flops["full rank"]


def test_activations_are_what_autograd_keeps():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(10, 8)
    assert activation_bytes(model, x) == 4 * 10 * (8 + 16)  # the input and tanh's output, once


def test_tied_and_frozen_weights_are_dense():
    model = build("smoke")
    model.head.weight = model.embed.weight
    model.layers[0].mlp.up.weight.requires_grad_(False)
    plan = grass_fx.plan(model, "1MB", rank=8)
    assert len(plan.taken) == 6
    free = [p for p in model.parameters() if p.requires_grad]
    dense = plan.parts["dense gradients"] + sum(
        p.nbytes for name, p in model.named_parameters() if name in plan.taken
    )
    assert dense == sum(p.nbytes for p in free)


@pytest.mark.parametrize("name", [*cost.LLAMA])
def test_named_shapes_are_those_of_the_example(name):
    with torch.device("meta"):
        model = build(name.removeprefix("llama-"))
    assert llama_shapes(name) == {k: tuple(p.shape) for k, p in model.named_parameters()}


def test_the_13b_of_the_method_page():
    options = {"exclude": ["head*"], "side": "auto"}
    plans = [grass_fx.plan("llama-13b", 0, rank=rank, options=options) for rank in (64, 0.125)]
    gib = [(plan.total - plan.parts["optimizer step"]) / 2**30 for plan in plans]
    assert gib == pytest.approx([27.0, 34.9], abs=0.05)
    full = grass_fx.plan("llama-13b", 0, rank=64).full_total / 2**30
    assert full == pytest.approx(97.0, abs=0.05)


def test_fewer_gradients_and_moments_take_less():
    def total(**arguments):
        return grass_fx.plan("llama-60m", "1GB", rank=64, **arguments).total

    assert total(in_backward=True) < total()
    assert total(optimizer="sgd") < total(optimizer="momentum") < total()
    temporary = grass_fx.plan("llama-60m", "1GB", rank=64).parts["optimizer step"]
    assert total(activations="1GB") == total() - temporary + 10**9  # not at the same time
    assert total(dtype=torch.float32) > total()


def test_stepping_in_backward_holds_the_gradients_of_a_layer():
    up, down, norm = (64, 32), (32, 64), (32,)
    shapes = {"layers.0.up": up, "layers.0.down": down, "layers.0.norm": norm}
    shapes |= {"layers.1.up": up, "head": (16, 32)}
    plan = grass_fx.plan(shapes, "1MB", rank=8, in_backward=True)  # of bfloat16
    assert plan.parts["gradients of a layer"] == 2 * (8 * 64 + 8 * 32 + 32)
    assert any("compiled one by one" in note for note in plan.notes)


def test_the_flops_of_a_stack_are_those_of_all_tokens_in_each():
    one, stack = (
        grass_fx.plan([shape], "1MB", rank=4, tokens=64, options={"side": "out"})
        for shape in ((16, 8), (3, 16, 8))
    )
    assert stack.flops["subspace"] == 3 * one.flops["subspace"]
    assert any("all tokens" in note for note in stack.notes)
    assert not any("all tokens" in note for note in one.notes)


@pytest.mark.parametrize(
    "text, size",
    [("40GB", 40 * 10**9), ("24GiB", 24 * 2**30), ("1.5 TB", 15 * 10**11), (7, 7), ("512b", 512)],
)
def test_memory_is_decimal_or_binary(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["40", "40 G", "GB", "-1GB", "3iB", -3, 2.5, True, None])
def test_what_is_no_memory_is_an_error(text):
    with pytest.raises(OptionError, match="decimal"):
        parse_memory(text)


def test_mistakes_are_told():
    with pytest.raises(OptionError, match=r"too little: the smallest rank, .* needs 14\.8\d\d GB"):
        grass_fx.plan("llama-7b", "10GB")
    with pytest.raises(OptionError, match="did you mean 'llama-7b'"):
        grass_fx.plan("lama-7b", "10GB")
    with pytest.raises(OptionError, match="did you mean 'adamw'"):
        grass_fx.plan("llama-7b", "40GB", optimizer="adam")
    with pytest.raises(OptionError, match="no linear weight"):
        grass_fx.plan({"a": (8, 8)}, "1GB", options={"exclude": "*"})
    with pytest.raises(OptionError, match="exceeds the selected dimension"):
        grass_fx.plan([(8, 8)], "1GB", rank=16)
    with pytest.raises(OptionError, match="rank as an argument"):
        grass_fx.plan([(8, 8)], "1GB", options={"rank": 4})
    with pytest.raises(OptionError, match="inputs"):
        grass_fx.plan([(8, 8)], "1GB", inputs=[torch.ones(1)])


# --- command line ---------------------------------------------------------------------------------


def test_the_page_shows_what_the_commands_print(capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n\$ python -m grass_fx (.*)\n((?:.*\n)*?)```$", text, re.M)
    assert len(blocks) >= 2
    for command, printed in blocks:
        assert main(command.replace("'", "").split()) == 0
        assert capsys.readouterr().out == printed


def test_the_command_line_tells_mistakes_and_speaks_json(capsys):
    small = ["plan", "--shape", "llama-60m", "--memory"]
    assert main([*small, "1MB"]) == 2
    assert "too little" in capsys.readouterr().err
    assert main([*small, "1GB", "--json", "--rank", "0.5", "--selection", "top"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == 0.5 and found["total"] == sum(found["parts"].values())
    assert main([*small, "150MB", "--rank", "256"]) == 1  # asked for, does not fit
    with pytest.raises(SystemExit):
        main(["plan", "--shape", "llama-60m"])
