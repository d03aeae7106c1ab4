"""Libraries that shard with FSDP2 train as one process does."""

import os

import pytest
import test_fsdp2 as fsdp2

from ranks import spawn


def with_accelerate(rank):
    """``Accelerator.prepare`` with an FSDP2 plugin: it shards, and exchanges the parameters."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", ACCELERATE_USE_CPU="true")
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    want = fsdp2.alone()
    model = fsdp2.build()
    optimizer = fsdp2.adamw(model)
    fsdp2.compile_blocks(model, **fsdp2.options())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs it would take DDP; what follows is what it does where there are GPUs.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(fsdp2.STEPS):
        accelerator.backward(model(fsdp2.batch(step, rank, 2)).square().mean())
        assert fsdp2.taken(model) == 4
        optimizer.step()
        optimizer.zero_grad()
    fsdp2.check(fsdp2.whole(model), want, "accelerate")


@pytest.mark.slow
def test_accelerate():
    pytest.importorskip("accelerate")
    spawn(with_accelerate, fsdp2.RANKS)
