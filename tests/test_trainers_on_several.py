"""The trainers people already have, on two processes: as one that accumulates twice as much."""

import importlib.util
import logging
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from test_trainers import CYCLIC, STEPS, Net, adamw, fresh, hf_trainer, loss_of, pairs, tiny_llama

import grass_fx
from grass_fx.distributed import data_parallel
from ranks import spawn

RANKS, ACCUMULATED = 2, 2
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def accumulated():
    """Micro-batches of a process in a step."""
    return ACCUMULATED if dist.is_initialized() else RANKS * ACCUMULATED


def batches():
    """As many for each of two processes as for one, in which case it accumulates them."""
    return pairs(STEPS * RANKS)


def compiled(model):
    model.compile(backend="grass", options=CYCLIC)
    return data_parallel(model) if dist.is_initialized() else model


def with_transformers(folder):
    import transformers

    model = compiled(tiny_llama(transformers))
    optimizer = adamw(model.named_parameters())
    how = {"gradient_accumulation_steps": accumulated(), "bf16": False, "save_strategy": "no"}
    if dist.is_initialized():
        how["ddp_backend"] = "gloo"
    hf_trainer(transformers, folder, model, optimizer, **how).train()
    return model, optimizer


def with_accelerate(folder):
    import accelerate

    net = compiled(fresh(Net))
    inner = adamw(net.named_parameters())
    acc = accelerate.Accelerator(gradient_accumulation_steps=accumulated(), cpu=True)
    model, optimizer, loader = acc.prepare(net, inner, batches())
    for batch in loader:
        with acc.accumulate(model):
            acc.backward(loss_of(model, batch))
            if acc.sync_gradients:
                acc.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return net, inner


def with_lightning(folder):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.net.compile(backend="grass", options=CYCLIC)

        def setup(self, stage):
            if dist.is_initialized():
                data_parallel(self)

        def training_step(self, batch, index):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return adamw(self.parameters())

    module = fresh(Module)
    several = {"strategy": "ddp", "devices": RANKS} if dist.is_initialized() else {"devices": 1}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", **several, accumulate_grad_batches=accumulated(),
        gradient_clip_val=0.1, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    sampler = torch.utils.data.DistributedSampler
    loader = batches()
    if dist.is_initialized():
        loader = torch.utils.data.DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=sampler(loader.dataset, shuffle=False),
        )
    trainer.fit(module, loader)
    return module.net, trainer.optimizers[0]


WAYS = {
    "transformers": with_transformers,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}


def run(rank, ways, folder):
    if dist.is_initialized():  # as torchrun would
        os.environ.update(
            LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost"
        )
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", grass_fx.GrassWarning)
    for way in ways:
        model, optimizer = WAYS[way](folder)
        assert sum("indices" in optimizer.state[p] for p in model.parameters()) >= 2, way
        got = [p.detach().clone() for p in model.parameters()]
        if not dist.is_initialized():
            torch.save(got, f"{folder}/{way}.pt")
        for mine, want in zip(got, torch.load(f"{folder}/{way}.pt"), strict=True):
            torch.testing.assert_close(mine, want, **CLOSE, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    ways = [way for way in WAYS if importlib.util.find_spec(way) is not None]
    if not ways:
        pytest.skip("no trainer is installed")
    run(0, ways, str(tmp_path))
    spawn(run, RANKS, ways, str(tmp_path), timeout=120)
