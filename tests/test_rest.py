"""rest="sign": what is not selected moves against the signs of its gradients."""

import copy
import io
import itertools
import pickle

import pytest
import test_fsdp2
import torch
import torch.distributed as dist
from test_training import Shared, compare, options_of, tokens_loss

import grass_fx
from grass_fx.config import REST_SCALE, GrassConfig
from grass_fx.distributed import data_parallel, no_sync
from grass_fx.errors import CompactGradError, DistributedError, GrassWarning, OptionError
from grass_fx.ops import pack
from grass_fx.ops.bits import packed_shape
from grass_fx.optim import compiled, rest
from grass_fx.state.gradient.votes import Votes
from helpers import Captured, mlp
from ranks import spawn

LR = 1e-2


def signs_of(grad, m=None, n=None):
    """What the votes of a gradient say, (m, n)."""
    m, n = m or grad.shape[:-1].numel(), n or grad.shape[-1]
    votes = grad.votes if hasattr(grad, "votes") else grad
    turned = hasattr(grad, "votes") and grad.selection.dim == 0
    m, n = (n, m) if turned else (m, n)
    signs = torch.cat([votes.majority(part, m, n, torch.float64) for part in votes.parts(100)])
    return signs.t() if turned else signs


def others(selection, size):
    mask = torch.ones(size, dtype=torch.bool)
    mask[selection.indices] = False
    return mask.nonzero().flatten()


# --- votes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (256, 32), (300, 70), (1, 1)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_votes_count_gradients_and_who_has_none_abstains(shape, as_tensor):
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for _ in range(6)]
    gradients[1][:, shape[1] // 2] = 0
    gradients[2].zero_()
    factors = [1.0, -2.0, 1.0, 0.5, -1.0, 3.0]
    total, votes = torch.zeros(shape).double(), None
    for g, factor in zip(gradients, factors, strict=True):
        more = Votes((pack(g),)).times(torch.tensor(factor) if as_tensor else factor)
        assert torch.equal(signs_of(more, *shape), (g * factor).sign().double())
        votes = more if votes is None else votes.plus(more)
        total += (g * factor).sign()
        for sign in (1.0, -1.0):
            want = (total * sign).sign()
            assert torch.equal(signs_of(votes.times(sign), *shape[:1], n=shape[1]), want)
    assert len(votes.planes) == 3  # the binary digits of 6


def test_counts_take_as_many_bits_as_their_number_has_digits():
    """In whatever order votes are added, and no carry is lost."""
    torch.manual_seed(0)
    gradients = torch.randn(33, 6, 40)
    gradients[:, 0] = 1  # all of them count
    one_by_one = [Votes((pack(g),)) for g in gradients]
    total = one_by_one[0]
    for k, votes in enumerate(one_by_one[1:], 2):
        total = total.plus(votes)
        assert len(total.planes) == k.bit_length()
    pairs = [left.plus(right) for left, right in itertools.pairwise(one_by_one[:4])]
    of_pairs = pairs[0].plus(pairs[2]).times(-1.0).plus(one_by_one[4])
    assert len(of_pairs.planes) == 3
    for votes, want in (
        (total, gradients.sign().sum(0)),
        (of_pairs, gradients[4].sign() - gradients[:4].sign().sum(0)),
    ):
        assert torch.equal(signs_of(votes, 6, n=40), want.sign().double())


@pytest.mark.parametrize("factor", [0.0, torch.tensor(0.0)])
def test_a_gradient_times_zero_has_no_vote(factor):
    g = torch.randn(6, 8)
    votes = Votes((pack(g),)).times(factor)
    assert not signs_of(votes, 6, n=8).any()
    assert torch.equal(signs_of(votes.plus(Votes((pack(g),))), 6, n=8), g.sign().double())


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "replacement", "side", "block", "more"),
    [
        ("mlp", "cyclic", False, "in", 1, {}),
        ("mlp", "top", False, "out", 2, {"rest_every": 2}),
        ("uneven", "uniform", True, "in", 1, {"rest_every": 3}),
        ("uneven", "multinomial_norm", False, "out", 1, {"scoring": "tiles"}),
        ("llama", "cyclic", False, "in", 2, {}),
    ],
)
def test_training_is_that_of_the_reference(name, rule, replacement, side, block, more):
    """Two micro-batches a step, three refreshes, with weight decay."""
    options = {**options_of(rule, replacement, side, block), "rest": "sign", **more}
    compare(name, "aot_eager", torch.float64, options, 1e-10, weight_decay=0.1)


def test_maximize_goes_up():
    options = {**options_of("cyclic", False, "in", 1), "rest": "sign"}
    compare("mlp", "inductor", torch.float64, options, 1e-10, maximize=True, rest_scale=0.5)


def test_a_weight_that_is_used_twice_forms_its_gradient_and_says_so():
    torch.manual_seed(0)
    model = Shared().double()
    twin = copy.deepcopy(model)
    backend = Captured(rank=4, rest="sign")
    tokens_loss(torch.compile(model, backend=backend), 0).backward()
    tokens_loss(twin, 0).backward()
    reasons = backend.graphs[0].report.stopped
    assert "signs" in reasons["layer.weight"]
    assert torch.equal(signs_of(model.layer.weight.grad), twin.layer.weight.grad.sign())


def test_rows_of_tokens_that_do_not_occur_stand_still():
    """In a table that is not tied. Rows that occur move in all columns; then only by momentum."""
    model = torch.nn.Sequential(torch.nn.Embedding(12, 8), torch.nn.Linear(8, 5)).double()
    compiled = torch.compile(model, backend=Captured(rank=3, rest="sign", lookups=True))
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for tokens, seen in (([1, 3, 3, 0], {0, 1, 3}), ([11, 3, 3, 7], {0, 1, 3, 7, 11})):
        before = model[0].weight.detach().clone()
        compiled(torch.tensor(tokens)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = model[0].weight != before
        assert {*moved.all(1).nonzero().flatten().tolist()} == {*tokens}
        assert {*moved.any(1).nonzero().flatten().tolist()} == seen


class Experts(torch.nn.Module):
    """Each token goes to one of three experts; the last one gets none."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 16, 12) / 4)

    def forward(self, x):
        return torch.einsum("ebi,eio->ebo", x, self.up).tanh()


@pytest.mark.parametrize("compile", [False, True])
def test_an_expert_without_tokens_stands_still(compile):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Experts().double()
    before = model.up.detach().clone()
    run = torch.compile(model, backend=Captured(rank=8, rest="sign"))
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR, weight_decay=0.0, compile=compile)
    x = torch.randn(3, 5, 16).double()
    x[2] = 0
    run(x).square().sum().backward()
    assert model.up.grad.votes is not None
    optimizer.step()
    moved = (model.up.detach() != before).flatten(1).float().mean(1)
    assert moved[:2].tolist() == [1, 1] and moved[2] == 0


class Transposed(torch.nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n, m) / 4)

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dead_inputs_and_dead_outputs_stand_still(transposed, side, compile):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Transposed(16, 300) if transposed else torch.nn.Linear(16, 300, bias=False)
    run = torch.compile(model, backend=Captured(rank=8, rest="sign", side=side))
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR, weight_decay=0.0, compile=compile)
    x, out = torch.randn(4, 16), torch.ones(300)
    dead = [k for k in range(16) if k % 5 == 0]
    x[:, dead] = 0
    out[200:] = 0
    before = model.weight.detach().clone()
    (run(x) * out).square().sum().backward()
    optimizer.step()
    moved = model.weight.detach() != before
    moved = moved.t() if transposed else moved
    alive = [k for k in range(16) if k not in dead]
    assert moved[:200, alive].all()
    assert not moved[200:].any() and not moved[:, dead].any()


def trained(make=grass_fx.AdamW, steps=6, dtype=torch.float32, options=None, model=None, **more):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = model or mlp(16, 24, 8).to(dtype)
    settings = {"rank": 8, "refresh_every": 3, "rest": "sign", **(options or {})}
    run = torch.compile(model, backend=Captured(**settings))
    optimizer = make(model.parameters(), lr=LR, **more)
    train(model, run, optimizer, range(steps))
    return model, run, optimizer


def train(model, run, optimizer, steps):
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        x = torch.randn(5, 16, generator=gen).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        run(x).float().square().mean().backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 4.0), ({"rest_scale": 0.25}, 4.0), ({"rest_scale": 0.0}, 8.0), ({"scale": 3.0}, 3.0)],
    ids=str,
)
@pytest.mark.parametrize("kind", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_where_other_columns_move_the_selected_ones_need_less(kind, settings, scale):
    """In the first step AdamW moves every element by its rate."""
    model = torch.nn.Linear(32, 24, bias=False).double()
    options = {"rank": 4, "rest": "sign", "compiler": "aot_eager"}
    run, before = torch.compile(model, backend="grass", options=options), model.weight.clone()
    optimizer = kind(model.parameters(), lr=LR, warmup_steps=0, weight_decay=0.0, **settings)
    run(torch.randn(40, 32, dtype=torch.float64)).square().mean().backward()
    selected = model.weight.grad.selection.indices
    optimizer.step()
    moved = (model.weight.detach() - before).abs() / LR
    assert moved[:, selected].flatten().tolist() == pytest.approx([scale] * 96, rel=1e-3)
    rest = moved[:, [k for k in range(32) if k not in selected]].flatten().tolist()
    assert rest == pytest.approx([settings.get("rest_scale", REST_SCALE)] * 672, rel=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_wrapped_and_compiled_steps_are_those_of_eager_adamw(dtype):
    want, *_ = trained(dtype=dtype)
    for make, more in (
        (grass_fx.AdamW, {"compile": True}),
        (grass_fx.subspace(torch.optim.AdamW), {}),
    ):
        got, *_ = trained(make, dtype=dtype, **more)
        torch.testing.assert_close(weights(got), weights(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_small_steps_are_not_lost_in_bfloat16(compile):
    """A step of a 50th of the last bit, 500 times, also with rounding to nearest asked for."""
    torch._dynamo.reset()
    linear = torch.nn.Linear(64, 256, bias=False).bfloat16()
    torch.nn.init.constant_(linear.weight, 1.5)
    run = torch.compile(linear, backend=Captured(rank=16, rest="sign", refresh_every=1000))
    optimizer = grass_fx.AdamW(
        linear.parameters(), lr=1.5e-3, weight_decay=0.0, rest_scale=0.1,
        stochastic_rounding=False, compile=compile,
    )  # fmt: skip
    for _ in range(500):
        optimizer.zero_grad()
        run(torch.ones(2, 64).bfloat16()).float().sum().backward()
        optimizer.step()
    selection = linear.weight.grad.selection
    moved = linear.weight.detach().float()[:, others(selection, 64)]
    assert moved.mean().item() == pytest.approx(1.5 - 500 * 1.5e-4, abs=2e-3)


def test_weight_decay_goes_along_and_nothing_is_left_pending():
    model, _, optimizer = trained(steps=1, weight_decay=0.1, rest_scale=0.5)
    assert optimizer.state[model[0].weight]["pending_decay"] == 1
    plain, *_ = trained(steps=0)
    decayed, *_ = trained(steps=1, weight_decay=0.1, rest_scale=0.5)
    free, *_ = trained(steps=1, weight_decay=0.0, rest_scale=0.5)
    grad = decayed[0].weight.grad
    rest_of = others(grad.selection, 16)
    change = (decayed[0].weight - free[0].weight).detach()[:, rest_of]
    want = -LR * 0.1 * plain[0].weight.detach()[:, rest_of]
    torch.testing.assert_close(change, want, rtol=1e-3, atol=1e-7)


def test_in_between_steps_decay_is_kept_and_applied_with_the_next_signs():
    model, run, optimizer = trained(steps=2, options={"rest_every": 2, "refresh_every": 4})
    state = optimizer.state[model[0].weight]
    assert state["pending_decay"] == 1 - LR * 1e-2
    train(model, run, optimizer, [2])
    assert state["pending_decay"] == 1


def test_the_default_changes_no_graph_and_no_state(tmp_path):
    texts = []
    for name, options in (("a", {}), ("b", {"rest_every": 4})):
        folder = tmp_path / name
        options = {"rest": "none", "dump_dir": str(folder), **options}
        model, *_ = trained(steps=1, options=options)
        assert model[0].weight.grad.votes is None
        lines = [f.read_text().splitlines() for f in sorted(folder.rglob("*.py"))]
        texts.append([[line for line in each if "#" not in line] for each in lines])
    assert texts[0] == texts[1] and len(texts[0]) > 3
    assert "signs" not in str(texts)


# --- loops ----------------------------------------------------------------------------------------


def test_clipping_unscaling_and_skipping_leave_signs_alone():
    model, run, optimizer = trained(steps=1)
    weight = model[0].weight
    x = torch.randn(5, 16)
    run(x).square().mean().backward()
    want = signs_of(weight.grad)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    assert torch.equal(signs_of(weight.grad), want)
    weight.grad.mul_(-1)
    assert torch.equal(signs_of(weight.grad), -want)
    weight.grad.zero_()
    assert weight.grad.votes is None
    optimizer.zero_grad(set_to_none=False)
    run(x).square().mean().backward()
    assert torch.equal(signs_of(weight.grad), signs_of(weight.grad.clone()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(run(x).square().mean()).backward()
    weight.grad.compact.fill_(torch.inf)
    before = weights(model)
    scaler.step(optimizer)
    assert torch.equal(weights(model), before)


def test_gradients_with_signs_are_copied_pickled_and_moved():
    model, *_ = trained(steps=1)
    grad = model[0].weight.grad
    copies = [copy.deepcopy(grad), pickle.loads(pickle.dumps(grad)), grad.clone(), grad.double()]
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=True))
    copies.append(torch.zeros_like(grad).copy_(grad))
    for each in copies:
        assert torch.equal(signs_of(each), signs_of(grad))


def test_stepping_in_backward_moves_the_rest_too():
    want, *_ = trained()
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlp(16, 24, 8)
    run = torch.compile(model, backend=Captured(rank=8, refresh_every=3, rest="sign"))
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR)
    grass_fx.step_in_backward(optimizer)
    for step in range(6):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
        run(x).float().square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(want))


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.NAdam)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_goes_on_to_the_last_bit(make, every):
    dtype, options = torch.bfloat16, {"rest_every": every}
    want, *_ = trained(make, 7, dtype, options)
    model, _, optimizer = trained(make, 4, dtype, options)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, run, optimizer = trained(make, 0, dtype, options)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, run, optimizer, range(4, 7))
    assert torch.equal(weights(model), weights(want))


def test_an_interrupted_step_moves_nothing_twice(monkeypatch):
    want, *_ = trained(steps=2)
    model, run, optimizer = trained(steps=1)
    run(torch.randn(5, 16, generator=torch.Generator().manual_seed(1))).square().mean()
    optimizer.zero_grad()
    run(torch.randn(5, 16, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    real, calls = rest._move_part, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(rest, "_move_part", fails_once)
    with pytest.warns(GrassWarning, match="interrupted"), pytest.raises(MemoryError):
        optimizer.step()
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(want))


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest": "signs"}, "did you mean 'sign'"),
        ({"rest_every": 0}, "rest_every=0"),
        ({"rest_every": True}, "rest_every=True"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(OptionError, match=message):
        GrassConfig.from_options(options)


def test_impossible_scales_are_errors():
    with pytest.raises(OptionError, match="rest_scale=-1"):
        grass_fx.AdamW([torch.nn.Parameter(torch.ones(2))], rest_scale=-1)


def test_where_lr_is_no_size_of_a_step_the_scale_has_to_be_given():
    sgd = grass_fx.subspace(torch.optim.SGD)
    with pytest.raises(OptionError, match=r"subspace\(SGD\).*Give rest_scale"):
        trained(sgd, steps=1)
    model, *_ = trained(sgd, steps=1, rest_scale=0.01)
    assert model[0].weight.grad.votes is not None
    trained(sgd, steps=1, options={"rest": "none"})


def test_a_mask_that_signs_would_not_see_is_refused():
    model, *_ = trained(steps=1)
    grad = model[0].weight.grad
    assert repr(grad).endswith("with signs)")
    for change in (lambda: grad.mul_(torch.zeros(24, 1)), lambda: grad.masked_fill_(grad > 0, 0)):
        with pytest.raises(CompactGradError):
            change()
    with pytest.raises(CompactGradError, match=r"0\.weight: with rest=.sign. a mask"):
        grad * torch.zeros(24, 16)


def test_looking_for_nan_in_bits_is_refused():
    model, run, _ = trained(steps=1)
    x = torch.randn(5, 16)
    with torch.autograd.detect_anomaly(), pytest.raises(OptionError, match="check_nan=False"):
        run(x)
    with torch.autograd.detect_anomaly(check_nan=False):
        run(x).square().mean().backward()
    assert model[0].weight.grad.votes is not None


def test_a_scale_of_zero_moves_nothing():
    still, *_ = trained(steps=3, rest_scale=0.0)
    want, *_ = trained(steps=3, options={"rest": "none"})
    torch.testing.assert_close(weights(still), weights(want))


# --- generated code -------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_moves_the_rest_in_one_kernel_without_memory(planes, dtype):
    pytest.importorskip("triton")
    from grass_fx.testing.kernels import compile_kernel
    from grass_fx.testing.virtual_gpu import generate_in_place

    m, n, wide = 512, 300, torch.float32
    shapes = [
        ((m, n), dtype),
        ((1, n), wide),
        ((1, n), wide),
        ((m, 1), torch.bool),
        ((2,), torch.int32),
    ]
    shapes += [(packed_shape(m, n), wide)] * planes
    layouts = [
        (torch.Size(shape), torch.empty(shape, device="meta").stride(), kind, torch.device("cpu"))
        for shape, kind in shapes
    ]
    module = generate_in_place(compiled.move_rest, layouts, {})
    (kernel,) = module.kernels
    assert module.extern_calls == [] and module.buffers == []
    assert compile_kernel(kernel, 90).spilled == 0


# --- several processes ----------------------------------------------------------------------------


def _train_as_one(rank, micro_batches):
    torch.manual_seed(0)
    model = mlp(16, 24, 8).double()
    data_parallel(model)
    run = torch.compile(
        model, backend="grass",
        options={"rank": 8, "refresh_every": 2, "rest": "sign", "compiler": "aot_eager"},
    )  # fmt: skip
    twin = copy.deepcopy(model)
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        total = torch.zeros_like(model[0].weight)
        twin.load_state_dict(model.state_dict())
        for micro in range(micro_batches):
            parts = [
                torch.randn(
                    5, 16, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(100 * step + 10 * micro + k),
                )
                for k in range(2)
            ]  # fmt: skip
            for part in parts:
                twin.zero_grad()
                twin(part).square().mean().backward()
                total += twin[0].weight.grad.sign()
            if micro + 1 < micro_batches:
                with no_sync(model):
                    run(parts[rank]).square().mean().backward()
            else:
                run(parts[rank]).square().mean().backward()
        before, selection = model[0].weight.detach().clone(), model[0].weight.grad.selection
        optimizer.step()
        columns = others(selection, 16)
        change = (model[0].weight.detach() - before)[:, columns]
        torch.testing.assert_close(change, -REST_SCALE * LR * total.sign()[:, columns])
        everyones = [torch.empty_like(before) for _ in range(2)]
        dist.all_gather(everyones, model[0].weight.detach())
        assert torch.equal(*everyones)


def _leaves_a_layer_out(rank):
    """One process in one micro-batch."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 24).double() for _ in range(2)]
    model = data_parallel(torch.nn.ModuleList(layers))
    options = {"rank": 8, "rest": "sign", "compiler": "aot_eager"}
    runs = [torch.compile(layer, backend="grass", options=options) for layer in layers]
    optimizer = grass_fx.AdamW(model.parameters(), lr=LR, weight_decay=0.0)

    def loss_of(calls, process, micro_batch):
        gen = torch.Generator().manual_seed(10 * process + micro_batch)
        x = torch.randn(5, 16, generator=gen).double()
        used = calls[:1] if (process, micro_batch) == (1, 2) else calls
        return sum(call(x).square().mean() for call in used)

    for micro_batch in range(2):
        with no_sync(model):
            loss_of(runs, rank, micro_batch).backward()
    loss_of(runs, rank, 2).backward()
    before, total = layers[1].weight.detach().clone(), torch.zeros_like(layers[1].weight)
    for process in range(2):
        for micro_batch in range(3 - process):
            loss = loss_of(layers, process, micro_batch)
            total += torch.autograd.grad(loss, layers[1].weight)[0].sign()
    optimizer.step()
    columns = others(layers[1].weight.grad.selection, 16)
    change = (layers[1].weight.detach() - before)[:, columns]
    torch.testing.assert_close(change, -REST_SCALE * LR * total.sign()[:, columns])


def _calls_one_more(rank):
    """One process calls the layer five times in a micro-batch: its counts would take more bits."""
    torch.manual_seed(0)
    model = data_parallel(torch.nn.Linear(16, 24))
    run = torch.compile(
        model, backend="grass", options={"rank": 8, "rest": "sign", "compiler": "aot_eager"}
    )
    x = torch.randn(5, 16)
    with no_sync(model):
        sum(run(x).square().mean() for _ in range(1 + 4 * rank)).backward()
    with pytest.raises(DistributedError, match=r"the signs of 2 gradients.*call compiled layers"):
        run(x).square().mean().backward()


def _refuses_shards(rank):
    model = test_fsdp2.build()
    test_fsdp2.compile_blocks(model, **test_fsdp2.options(rest="sign"))
    test_fsdp2.shard(model)
    with pytest.raises(Exception, match=r"rest=.sign. with fully_shard(.|\n)*data_parallel"):
        model(test_fsdp2.batch(0, rank, 2))


def _all_of_it(rank):
    """In one pair of processes, because to start one takes longer than any of it."""
    _train_as_one(rank, 1)
    _train_as_one(rank, 3)
    _leaves_a_layer_out(rank)
    _refuses_shards(rank)
    _calls_one_more(rank)


def test_processes_step_by_the_votes_of_all_or_are_told_why_not():
    spawn(_all_of_it, 2)
