"""What goes wrong with several processes is an error on each of them, in time."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_data_parallel import Model, batch, loss_of, options
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import grass_fx
from grass_fx.distributed import data_parallel, no_sync
from grass_fx.errors import CompactGradError, DistributedError
from ranks import one_process, spawn


def compiled(model, **more):
    torch._dynamo.reset()
    return torch.compile(model, backend="grass", options=options(**more))


def disagree(rank):
    """Each process raises; afterwards all are in step again."""
    with pytest.raises(DistributedError, match=r"options differ .* rank=8.* on rank 0.* rank=4"):
        loss_of(compiled(data_parallel(Model()), rank=8 - 4 * rank), batch(0))

    with pytest.raises(DistributedError, match=r"parameters differ .*\(4, 3\).*Build the same"):
        data_parallel(torch.nn.Linear(3, 4 + rank))

    model = data_parallel(Model())
    step = compiled(model)
    with pytest.raises(DistributedError, match=r"2 micro-batches.* 3 micro-batches.*drop_last"):
        with no_sync(model):
            for k in range(1 + rank):
                loss_of(step, batch(k)).backward()
        loss_of(step, batch(1)).backward()

    model = data_parallel(Model())
    step, optimizer = compiled(model), grass_fx.AdamW(model.parameters())
    loss_of(step, batch(0)).backward()
    optimizer.step()
    state = optimizer.state_dict()
    if rank == 1:  # as from another checkpoint
        first = next(s for s in state["state"].values() if "subspace_order" in s)
        first["subspace_order"] = first["subspace_order"].flip(0)
        optimizer.load_state_dict(state)
    with pytest.raises(DistributedError, match=r"selections differ .* load one checkpoint on all"):
        for k in range(1, 5):
            optimizer.zero_grad()
            loss_of(step, batch(k)).backward()
            optimizer.step()


def misuse(rank):
    step = DistributedDataParallel(compiled(Model()))
    with pytest.raises(CompactGradError, match=r"data_parallel\(model\) before Distributed"):
        loss_of(step, batch(0))
    part = torch.nn.Sequential(data_parallel(Model()))
    with pytest.raises(CompactGradError, match="with the same model, here Sequential"):
        loss_of(DistributedDataParallel(compiled(part)), batch(0))
    with pytest.raises(DistributedError, match="Call data_parallel.model. first"):
        data_parallel(step)
    with pytest.raises(DistributedError, match=r"no_sync: call .*data_parallel"), no_sync(Model()):
        pass
    with pytest.raises(DistributedError, match="process_group averages its compact gradient, and"):
        loss_of(compiled(Model(), process_group=dist.group.WORLD), batch(0))


def recover(rank):
    """A backward that fails is forgotten: the next one averages as ever."""
    model = data_parallel(Model().double())
    step, fails = compiled(model), [True]

    def hook(grad):
        if fails:
            raise ValueError("once")

    model.embed.weight.register_hook(hook)
    with pytest.raises(ValueError, match="once"):
        loss_of(step, batch(0)).backward()
    fails.clear()
    model.zero_grad()
    loss_of(step, batch(rank)).backward()
    for p in model.parameters():
        mine = getattr(p.grad, "compact", p.grad)
        first = mine.clone()
        dist.broadcast(first, 0)
        torch.testing.assert_close(mine, first, rtol=0, atol=0)


def in_turn(rank):
    disagree(rank)
    misuse(rank)
    recover(rank)


def test_every_process_is_told():
    spawn(in_turn, 2)


def die(rank):
    model = data_parallel(Model())
    step = compiled(model)
    loss_of(step, batch(0)).backward()
    model.zero_grad()
    loss = loss_of(step, batch(1))
    if rank == 1:
        os._exit(7)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert "peer" in str(caught.value) or "cannot reach the others" in str(caught.value)
    os._exit(0)


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others():
    with pytest.raises(ProcessExitedException, match="exit code 7"):
        spawn(die, 2, timeout=10)


class DiesWriting(dcp.FileSystemWriter):
    """The second process ends when it is to write its part."""

    def write_data(self, plan, planner):
        if dist.get_rank() == 1:
            os._exit(7)
        return super().write_data(plan, planner)


def sharded():
    """A model under FSDP2, compiled, and its optimizer."""
    model = fully_shard(Model())
    return model, compiled(model, rank=8), grass_fx.AdamW(model.parameters(), lr=1e-2)


def die_saving(rank, folder):
    model, call, optimizer = sharded()
    for step, writer in enumerate((dcp.FileSystemWriter, DiesWriting)):
        loss_of(call, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        if writer is DiesWriting:
            with pytest.raises(RuntimeError):
                dcp.save(states, storage_writer=writer(f"{folder}/{step}"))
            os._exit(0)
        dcp.save(states, storage_writer=writer(f"{folder}/{step}"))


@pytest.mark.slow
def test_a_process_that_dies_while_saving_leaves_no_checkpoint(tmp_path):
    """Parts of one may lie there: without their index nothing takes them for a checkpoint."""
    with pytest.raises(ProcessExitedException, match="exit code 7"):
        spawn(die_saving, 2, str(tmp_path), timeout=10)
    with one_process(tmp_path, "after"):
        model, *_ = sharded()
        fresh = get_model_state_dict(model)
        with pytest.raises(dcp.api.CheckpointException, match=r"metadata"):
            dcp.load({"model": fresh}, checkpoint_id=tmp_path / "1")
        before = [p.detach().full_tensor().clone() for p in model.parameters()]
        dcp.load({"model": fresh}, checkpoint_id=tmp_path / "0")
        for p, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(p.detach().full_tensor(), old)


def stop_early(rank):
    """An uneven last batch: one process has a batch more."""
    model = data_parallel(Model())
    step = compiled(model)
    for k in range(2 + rank):
        loss_of(step, batch(k)).backward()
        model.zero_grad()


@pytest.mark.slow
def test_a_batch_more_on_one_process_is_an_error():
    with pytest.raises(ProcessRaisedException):
        spawn(stop_early, 2, timeout=5)


def test_without_a_process_group():
    with pytest.raises(DistributedError, match="init_process_group"):
        data_parallel(Model())
