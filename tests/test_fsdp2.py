"""torch's own fully_shard: compact gradients on sharded parameters, and one process's numbers."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_wrap import Lion
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import grass_fx
from grass_fx.errors import (
    DistributedError,
    OptionError,
    SelectionChangedError,
    StateError,
)
from grass_fx.state.registry import registry
from grass_fx.state.replicas import replicas_of
from grass_fx.testing.traffic import Traffic
from other_functions import Linear
from ranks import one_process, spawn

RANKS, STEPS = 2, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}
OPTIONS = {"rank": 8, "refresh_every": 2, "compiler": "aot_eager"}
RULES = {
    "cyclic": {},
    # By the norms of the averaged gradient, as one process has it.
    "top": {"selection": "top", "score_sync": "gradient"},
    "norms of inputs": {"selection": "input_norm"},
    "norms of outputs' gradients": {"selection": "input_norm", "side": "out"},
    "rows": {"side": "out"},
    "either side": {"side": "auto"},
    "blocks of columns": {"block": 2},
    "drawn with replacement": {
        "selection": "multinomial_norm",
        "replacement": True,
        "score_sync": "gradient",
    },
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Uneven(Block):
    """Blocks of 3 do not divide the 5 rows of each of 8 parts, nor the columns."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)


class Blocks(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([block(), block()]), nn.Linear(16, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    """A stack of matrices, which FSDP2 shards by matrix."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x):
        return x + torch.bmm(x.expand(4, *x.shape), self.experts).mean(0)


def batch(step, rank=0, ranks=1):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=gen, dtype=torch.float64).chunk(ranks)[rank]


def options(**more):
    return {"backend": "grass", "options": {**OPTIONS, **more}}


def build(block=Block):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Blocks(block).double()


def compile_blocks(model, **how):
    for block in model.blocks:
        block.compile(**how)


def shard(model, ranks=RANKS, mesh=None, **how):
    mesh = mesh or init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def adamw(model):
    return grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2, weight_decay=0.1)


def steps(compiled, model, optimizer, rank, ranks=RANKS, clip=None, micro=1, sync=False):
    """Trains; returns whole weights. ``micro`` batches a step, synchronised in each or once."""
    for step in range(STEPS):
        for k in range(micro):
            if micro > 1 and not sync:
                model.set_requires_gradient_sync(k == micro - 1)
            (compiled(batch(micro * step + k, rank, ranks)).square().mean() / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def whole(model):
    values = [p.detach() for p in model.parameters()]
    return [v.full_tensor() if isinstance(v, DTensor) else v.clone() for v in values]


def alone(block=Block, how=None, make=None, **more):
    """One process on whole batches; sharded over itself, which draws rows as several do."""
    model = build(block)
    compile_blocks(model, **(how or options()))
    if dist.get_world_size() > 1 and (how or {}).get("options", {}).get("side", "in") != "in":
        names = ("others", "itself")
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)
        shard(model, mesh=mesh["itself"])
    return steps(model, model, (make or adamw)(model), 0, 1, **more)


# --- orders in which people compile, shard and build the optimizer --------------------------------


def compile_then_shard(model, how):
    compile_blocks(model, **how)
    shard(model)
    return model, adamw(model)


def compile_fully_then_shard(model, how):
    return compile_then_shard(model, {**how, "fullgraph": True})


def shard_then_compile(model, how):
    shard(model)
    compile_blocks(model, **how)
    return model, adamw(model)


def shard_then_compile_the_model(model, how):
    shard(model)
    return torch.compile(model, **how), adamw(model)


def compiled_modules_then_shard(model, how):
    for k, block in enumerate(model.blocks):
        model.blocks[k] = torch.compile(block, **how)
    shard(model)
    return model, adamw(model)


def optimizer_first(model, how):
    """As accelerate and the Trainer of transformers do: they exchange its parameters afterwards."""
    optimizer, names = adamw(model), [name for name, _ in model.named_parameters()]
    compile_then_shard(model, how)
    (group,) = optimizer.param_groups
    group["params"] = [dict(model.named_parameters())[name] for name in names]
    return model, optimizer


ORDERS = (
    compile_then_shard,
    compile_fully_then_shard,
    shard_then_compile,
    shard_then_compile_the_model,
    compiled_modules_then_shard,
    optimizer_first,
)


def taken(model):
    return sum(isinstance(p.grad, grass_fx.CompactGrad) for p in model.parameters())


def check(got, want, what):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m: f"{what}: {m}")


def in_every_order(rank):
    want = alone()
    for order in ORDERS:
        model = build()
        compiled, optimizer = order(model, options())
        check(steps(compiled, model, optimizer, rank), want, order.__name__)
        compiled(batch(0, rank, RANKS)).sum().backward()
        assert taken(model) == 4, order.__name__
        for p in model.parameters():
            assert not isinstance(p.grad, grass_fx.CompactGrad) or isinstance(
                p.grad.compact, DTensor
            )


def by_every_rule(rank):
    for name, rule in RULES.items():
        want = alone(how=options(**rule))
        model = build()
        compiled, optimizer = compile_then_shard(model, options(**rule))
        check(steps(compiled, model, optimizer, rank), want, name)
    for rule in ({"side": "out", "rank": 24, "block": 3}, {"rank": 9, "block": 3}):
        want = alone(Uneven, how=options(**rule))
        model = build(Uneven)
        compiled, optimizer = compile_then_shard(model, options(**rule))
        check(steps(compiled, model, optimizer, rank), want, f"uneven {rule}")
        assert registry.get(model.blocks[0].up.weight).spec.units.uneven


def wrapped(cls, model, **given):
    return grass_fx.subspace(cls)(model.parameters(), **given)


def by_wrapped_classes(rank):
    """Elementwise classes step shards; of others an error names the weight."""
    sgd = {"lr": 0.1, "momentum": 0.9}
    decayed = {"lr": 1e-2, "weight_decay": 0.1}
    given_to = {
        torch.optim.SGD: sgd,
        torch.optim.Adam: {},
        torch.optim.AdamW: decayed,
        Lion: decayed,
    }
    for cls, given in given_to.items():
        for side in ("in", "out"):
            make = partial(wrapped, cls, **given)
            want = alone(how=options(side=side), make=make)
            model = build()
            compile_blocks(model, **options(side=side))
            shard(model)
            check(steps(model, model, make(model), rank), want, f"{cls.__name__}, {side}")
    for cls, given in ((torch.optim.Adafactor, {}), (torch.optim.Muon, {})):
        model = build()
        compiled, _ = compile_then_shard(model, options())
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = grass_fx.subspace(cls)(matrices, **given)
        compiled(batch(0, rank, RANKS)).sum().backward()
        with pytest.raises(OptionError, match=rf"weight is sharded .* subspace\({cls.__name__}\)"):
            optimizer.step()


def with_its_options(rank):
    """What users set on FSDP2, around it, and in it."""
    want, clipped = alone(), alone(clip=0.1)
    for reshard in (True, False):
        model = build()
        compile_blocks(model, **options())
        shard(model, reshard_after_forward=reshard)
        check(steps(model, model, adamw(model), rank), want, f"reshard {reshard}")
    model = build()
    compiled, optimizer = compile_then_shard(model, options())
    check(steps(compiled, model, optimizer, rank, clip=0.1), clipped, "clipped")
    model = build()
    compiled, optimizer = compile_then_shard(model, options())
    model.set_requires_all_reduce(False)  # there are no replicas to reduce over
    check(steps(compiled, model, optimizer, rank), want, "no all-reduce")
    model = build()
    compiled, optimizer = compile_then_shard(model, options())
    grass_fx.step_in_backward(optimizer)
    check(steps(compiled, model, optimizer, rank), want, "stepping in backward")
    model = build()  # as torchtitan: a sum over processes, of a loss that is divided already
    compiled, optimizer = compile_then_shard(model, options())
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
    half = lambda x: compiled(x) / RANKS**0.5  # noqa: E731
    check(steps(half, model, optimizer, rank), want, "divide factor")
    model = build()  # activation checkpointing inside what is sharded, and outside
    for k, block in enumerate(model.blocks):
        model.blocks[k] = checkpoint_wrapper(block)
    compiled, optimizer = compile_then_shard(model, options())
    check(steps(compiled, model, optimizer, rank), want, "checkpoint inside")
    model = build()
    compiled, optimizer = compile_then_shard(model, options())
    for k, block in enumerate(model.blocks):
        model.blocks[k] = checkpoint_wrapper(block)
    check(steps(compiled, model, optimizer, rank), want, "checkpoint outside")
    want = alone(Experts)
    model = build(Experts)
    compiled, optimizer = compile_then_shard(model, options())
    check(steps(compiled, model, optimizer, rank), want, "stacks")
    compiled(batch(0, rank, RANKS)).sum().backward()
    assert taken(model) == 2


def with_micro_batches(rank):
    for rule in ("cyclic", "top"):
        want = alone(how=options(**RULES[rule]), micro=3, sync=True)
        for sync in (True, False):
            model = build()
            compiled, optimizer = compile_then_shard(model, options(**RULES[rule]))
            got = steps(compiled, model, optimizer, rank, micro=3, sync=sync)
            check(got, want, f"{rule}, synchronised {'always' if sync else 'once'}")
    model = build()
    compiled, optimizer = compile_then_shard(model, options())
    model(batch(0, rank, RANKS)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.set_requires_gradient_sync(False)
    loss = model(batch(1, rank, RANKS)).sum()
    with Traffic() as traffic:
        loss.backward()
    assert traffic.bytes["reduce_scatter"] == 0 and taken(model) == 0
    with pytest.raises(DistributedError, match=r"up\.weight: a micro-batch without"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # which selections go on from
    model.set_requires_gradient_sync(True)
    with pytest.raises(SelectionChangedError, match=r"changed since a micro-batch without"):
        model(batch(2, rank, RANKS)).sum().backward()
    for before in ("nothing", "zeros", "a gradient"):
        with_what_was_held(rank, before)


def with_what_was_held(rank, before):
    """A synchronised backward that does not use a weight reduces what was held of it."""
    model, plain = build(), build()
    compile_then_shard(model, options())
    compile_blocks(plain, **options())
    optimizers = adamw(model), adamw(plain)  # which number the weights: both select alike
    for each in (model, plain):
        if before != "nothing":
            each(batch(0, rank, RANKS)).sum().backward()
        if before == "zeros":
            each.zero_grad(set_to_none=False)
    model.set_requires_gradient_sync(False)
    for each in (model, plain):
        each(batch(1, rank, RANKS)).sum().backward()
    model.set_requires_gradient_sync(True)
    for each in (model, plain):
        each.blocks[0](batch(2, rank, RANKS)).sum().backward()
    for p, q in zip(model.blocks.parameters(), plain.blocks.parameters(), strict=True):
        if isinstance(q.grad, grass_fx.CompactGrad):
            total = q.grad.compact.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(p.grad.compact.full_tensor(), total / RANKS, **EXACT)
    assert taken(model) == 4 and len(optimizers) == 2


def in_low_precision(rank):
    """C travels in the reduce dtype; shards, moments and gradients are as FSDP2 has them."""
    for reduce_dtype in (None, torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype)
        found = []
        for compiles in (True, False):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = Blocks()
            how = {"backend": "aot_eager"} if not compiles else options()
            compile_blocks(model, **how)
            shard(model, mp_policy=policy)
            model(batch(0, rank, RANKS).float()).float().square().mean().backward()
            found.append([p.grad for p in model.blocks.parameters() if p.dim() == 2])
        for got, want in zip(*found, strict=True):
            assert got.compact.dtype == want.dtype == torch.float32
            selected = got.selection.project(want.full_tensor())
            close = {"rtol": 2e-2, "atol": 1e-3}
            torch.testing.assert_close(got.compact.full_tensor(), selected, **close)


def moves_what_is_compact(rank):
    model = build()
    compiled, _ = compile_then_shard(model, options())
    loss = compiled(batch(0, rank, RANKS)).sum()
    with Traffic() as traffic:
        loss.backward()
    grads = [p.grad for p in model.parameters()]
    sent = sum(getattr(g, "compact", g).numel() for g in grads) * 8
    assert taken(model) == 4 and traffic.bytes["reduce_scatter"] == sent
    for side in ("in", "out"):
        model = build()
        compiled, _ = compile_then_shard(model, options(side=side))
        compiled(batch(0, rank, RANKS)).sum().backward()
        grad = model.blocks[0].up.weight.grad
        embedded = grad.selection.embed(grad.compact.full_tensor(), grad.shape)
        torch.testing.assert_close(grad.to_dense().full_tensor(), embedded)
    # One for the compact ones of each block, one for its vectors, and one for the head.
    assert traffic.calls["reduce_scatter"] == 5


WHOLE = StateDictOptions(full_state_dict=True)
SAVED = {"in": adamw, "out": adamw, "wrapped": lambda m: wrapped(torch.optim.AdamW, m)}


def ready(name, ranks):
    model = build()
    compile_blocks(model, **options(side="out" if name == "out" else "in"))
    shard(model, ranks)
    return model, SAVED[name](model)


def saves(rank, folder):
    for name in SAVED:
        model, optimizer = ready(name, RANKS)
        first = steps(model, model, optimizer, rank)
        states = get_state_dict(model, optimizer)
        assert isinstance(states[1]["state"]["blocks.0.up.weight"]["exp_avg"], DTensor)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{name}")
        states = get_state_dict(model, optimizer, options=WHOLE)
        if rank == 0:
            torch.save(states, f"{folder}/{name}.pt")
        after = steps(model, model, optimizer, rank)
        assert not torch.equal(first[0], after[0])
        if rank == 0:
            torch.save(after, f"{folder}/{name} after.pt")


def loaded(model, optimizer, saved):
    if saved.endswith(".pt"):
        states, how = torch.load(saved), WHOLE
    else:
        states, how = get_state_dict(model, optimizer), None
        both = {"model": states[0], "optimizer": states[1]}
        dcp.load(both, checkpoint_id=saved)
        states = both["model"], both["optimizer"]
    set_state_dict(
        model, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=how
    )


def resumes(rank, folder):
    """Any number of processes goes on to the same numbers, before a forward or after one."""
    ranks = dist.get_world_size()
    for name in SAVED:
        for saved in (name, f"{name}.pt"):
            model, optimizer = ready(name, ranks)
            grass_fx.lay_out_from(optimizer, f"{folder}/{saved}", model)
            loaded(model, optimizer, f"{folder}/{saved}")
            assert registry.get(model.blocks[0].up.weight) is None  # nothing has run
            want = torch.load(f"{folder}/{name} after.pt")
            check(steps(model, model, optimizer, rank, ranks), want, f"{saved} at once")
        model, optimizer = ready(name, ranks)
        model(batch(0, rank, ranks)).sum().backward()  # what is taken is known from here on
        assert replicas_of[model.blocks[0].up.weight].group is dist.group.WORLD
        optimizer.zero_grad()
        loaded(model, optimizer, f"{folder}/{name}")
        check(steps(model, model, optimizer, rank, ranks), want, f"{name} after a forward")
    for saved, problem in ((f"{folder}/none", "none"), (folder, "no optimizer state can be read")):
        model, optimizer = ready("in", ranks)
        grass_fx.lay_out_from(optimizer, saved, model)
        with pytest.raises(StateError, match=rf"lay_out_from: .*{problem}"):
            get_state_dict(model, optimizer)
    with pytest.raises(OptionError, match=r"lay_out_from\(SGD\)"):
        grass_fx.lay_out_from(torch.optim.SGD(model.parameters()), folder, model)


class Tied(nn.Module):
    """A table of tokens, also the head, and between them a layer inside of a function."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table, self.layer = nn.Embedding(vocabulary, 16), nn.Linear(16, 16, bias=False)

    def forward(self, tokens):
        x = Linear.apply(self.table(tokens).flatten(0, 1), self.layer.weight)
        return torch.tanh(x) @ self.table.weight.T


def looks_up(rank):
    """A table that is tied to the head, looked up in; a vocabulary that does not divide is left."""

    def trained(vocabulary, ranks, steps, **more):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Tied(vocabulary).double()
        model.compile(**options(**more))
        if ranks > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = adamw(model)
        for step in range(steps):
            gen = torch.Generator().manual_seed(step)
            tokens = torch.randint(vocabulary, (8, 5), generator=gen)
            loss = model(tokens.chunk(ranks)[rank % ranks]).square().mean()
            loss.backward()
            optimizer.step()
            compact = isinstance(model.table.weight.grad, grass_fx.CompactGrad)
            assert isinstance(model.layer.weight.grad, grass_fx.CompactGrad)
            optimizer.zero_grad()
        return whole(model), compact, registry.left(model.table.weight)

    want, got = (trained(24, ranks, STEPS, lookups=True, **RULES["top"]) for ranks in (1, RANKS))
    check(got[0], want[0], "lookups")
    assert want[1:] == got[1:] == (True, None)
    for lookups in (False, True):
        _, compact, left = trained(23, RANKS, 1, lookups=lookups)
        assert not compact and left.reason == "its dimension of 23 is not alike on 2 ranks"


def in_replicas(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    want = alone()
    for each, how in ((mesh, {}), (None, {"reshard_after_forward": 2})):
        model = build()
        compile_blocks(model, **options())
        shard(model, 4, each, **how)
        check(steps(model, model, adamw(model), rank, 4), want, f"{how or 'HSDP'}")


def two(rank, folder):
    in_every_order(rank)
    looks_up(rank)
    moves_what_is_compact(rank)
    saves(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("fsdp2"))
    spawn(two, RANKS, folder)
    return folder


def test_two_processes_train_as_one_in_every_order(folder):
    assert folder


@pytest.mark.slow
def test_one_process_resumes_what_two_saved(folder):
    for name in ("first group", "second group"):
        with one_process(folder, name):
            resumes(0, folder)


ALONE = (
    by_every_rule, by_wrapped_classes, with_its_options, with_micro_batches, in_low_precision
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("check_that", ALONE, ids=lambda function: function.__name__)
def test_two_processes_train_as_one(check_that):
    spawn(check_that, RANKS, timeout=120)


@pytest.mark.slow
def test_four_processes_resume_what_two_saved(folder):
    spawn(resumes, 4, folder, timeout=120)


@pytest.mark.slow
def test_replicas_of_shards():
    spawn(in_replicas, 4, timeout=120)
