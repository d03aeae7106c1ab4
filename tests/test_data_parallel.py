"""Data parallelism: several processes train as one, and only compact gradients travel."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grass_fx
from grass_fx.distributed import data_parallel, no_sync
from grass_fx.testing.traffic import Traffic
from ranks import spawn

STEPS, K, BATCH, HIDDEN = 13, 4, 8, 16
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Model(nn.Module):
    """Linear weights of both sides, one left dense, an embedding and vectors."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 12)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


def batch(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randint(12, (BATCH, 5), generator=gen)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def options(**more):
    defaults = {"rank": 4, "refresh_every": K, "exclude": ["head*"], "compiler": "aot_eager"}
    return {**defaults, **more}


def trained_alone(rule, micro_batches=1, scored_parts=1):
    """One process on whole batches; ``scored_parts``: how many parts add up their scores."""
    torch.manual_seed(0)
    model = Model().double()
    compiled = torch.compile(model, backend="grass", options=options(selection=rule))
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)
    for step in range(STEPS):
        parts = batch(step).chunk(scored_parts)
        for part in parts:
            (loss_of(compiled, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def wrapped(way, rule, score_sync):
    """(what to call, its model) of a way to combine with DDP and torch.compile."""
    torch.manual_seed(dist.get_rank())  # other values on each rank: those of the first are taken
    if dist.get_rank() == 0:
        torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().double()
    given = options(selection=rule, score_sync=score_sync)
    if way == "compile after":
        data_parallel(model)
        return torch.compile(model, backend="grass", options=given), model
    if way == "compile before":
        compiled = torch.compile(model, backend="grass", options=given)
        return data_parallel(compiled), model
    if way == "DDP(compile)":
        compiled = torch.compile(data_parallel(model), backend="grass", options=given)
        return DistributedDataParallel(compiled), model
    assert way == "compile(DDP)"
    ddp = DistributedDataParallel(data_parallel(model))
    return torch.compile(ddp, backend="grass", options=given), model


def train(rank, way, rule, score_sync, micro_batches):
    ranks = dist.get_world_size()
    compiled, model = wrapped(way, rule, score_sync)
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)
    for step in range(STEPS):
        parts = batch(step).chunk(ranks)[rank].chunk(micro_batches)
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            wrapper = compiled if hasattr(compiled, "no_sync") else None
            if last:
                (loss_of(compiled, part) / len(parts)).backward()
            else:
                with wrapper.no_sync() if wrapper is not None else no_sync(model):
                    (loss_of(compiled, part) / len(parts)).backward()
        for name, p in model.named_parameters():
            taken = name in ("up.weight", "down.weight")
            assert isinstance(p.grad, grass_fx.CompactGrad) == taken, name
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


CASES = [
    # way, rule, score_sync, micro-batches of each rank, parts that one process scores apart
    ("compile after", "cyclic", "norms", 1, 1),
    ("compile before", "uniform", "norms", 1, 1),
    ("compile after", "cyclic", "norms", 2, 1),
    ("compile after", "top", "gradient", 1, 1),
    ("compile after", "top", "norms", 1, 2),
    ("compile after", "top", "norms", 2, 4),
    # Squared norms of inputs add up over processes and micro-batches.
    ("compile after", "input_norm", "norms", 2, 1),
    ("compile after", "input_norm", "gradient", 1, 1),
    ("DDP(compile)", "cyclic", "norms", 1, 1),
    ("compile(DDP)", "cyclic", "norms", 1, 1),
    ("DDP(compile)", "top", "gradient", 2, 4),
]


def equal_one_process(rank, folder):
    for k, (way, rule, score_sync, micro_batches, _) in enumerate(CASES):
        if dist.get_world_size() > 2 and k > 1:
            break
        got = train(rank, way, rule, score_sync, micro_batches)
        for value, want in zip(got, torch.load(f"{folder}/{k}.pt"), strict=True):
            torch.testing.assert_close(value, want, **EXACT, msg=lambda m, k=k: f"{CASES[k]}: {m}")
    if dist.get_world_size() == 2:
        count(rank, "aot_eager")


def count(rank, compiler):
    """A regular step moves compact and dense gradients, and nothing else to speak of."""
    torch._dynamo.reset()
    model = data_parallel(Model())
    compiled = torch.compile(model, backend="grass", options=options(compiler=compiler))
    loss_of(compiled, batch(0)).backward()
    stored = [getattr(p.grad, "compact", p.grad) for p in model.parameters()]
    model.zero_grad()
    loss = loss_of(compiled, batch(1))
    with Traffic() as traffic:
        loss.backward()
    assert traffic.calls["all_reduce"] == 3  # in the graph two, and a bucket
    assert traffic.bytes["all_reduce"] == sum(each.nbytes for each in stored)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with what one process trains in each case."""
    folder = tmp_path_factory.mktemp("alone")
    for k, (_, rule, _, _, parts) in enumerate(CASES):
        torch._dynamo.reset()
        torch.save(trained_alone(rule, scored_parts=parts), folder / f"{k}.pt")
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(ranks, alone):
    spawn(equal_one_process, ranks, str(alone))


@pytest.mark.slow
def test_only_gradients_travel_by_inductors_code_too():
    spawn(count, 2, "inductor")
