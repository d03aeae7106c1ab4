"""One process per device, as torchrun starts them: what `pretrain.py --parallel` needs.

`data`: every process has the whole model and a part of each batch. `sharded`: a part of the model
too. Without torchrun, and with `none`, there is one process and nothing to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from grass_fx.distributed import data_parallel

WAYS = ("none", "data", "sharded")


@contextmanager
def processes(way: str, device: str) -> Iterator[str]:
    """A process group while it lasts; gives this process's device."""
    if way == "none":
        yield device
        return
    if "RANK" not in os.environ:
        raise SystemExit(f"--parallel {way}: start it with torchrun --nproc-per-node N ...")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group()  # NCCL for CUDA tensors, gloo for others
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def distribute(model: nn.Module, way: str, method: str) -> nn.Module:
    """The model as several processes train it."""
    if way == "none":
        return model
    if way == "sharded":
        return fully_shard(model)
    return data_parallel(model) if method == "grass" else nn.parallel.DistributedDataParallel(model)


def part_of(batch: Tensor, way: str) -> Tensor:
    """This process's sequences of a batch."""
    if way == "none":
        return batch
    if len(batch) % dist.get_world_size():
        raise SystemExit(
            f"--batch {len(batch)} does not divide by {dist.get_world_size()} processes"
        )
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def mean(value: Tensor, way: str) -> float:
    """The average of a number over the processes."""
    if way == "none":
        return value.item()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, all of them on the first process."""
    if not dist.is_initialized():
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
