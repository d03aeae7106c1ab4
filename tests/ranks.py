"""Several gloo processes on this machine, for tests."""

import datetime
import os
import sys
import tempfile
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60


def _start(rank, ranks, function, store, timeout, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()  # of every rank, not only of the one that mp.spawn hears of first
        raise
    dist.barrier()  # a process that leaves while others still talk makes these abort
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads free tensors; while Python shuts down that aborts the process


def spawn(function, ranks, *args, timeout=TIMEOUT):
    """``function(rank, *args)`` in each of ``ranks`` processes with a process group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, (ranks, function, f"{folder}/store", timeout, args), nprocs=ranks)


@contextmanager
def one_process(folder, name):
    """A group of this process alone."""
    store = f"file://{folder}/{name}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
