"""Lightning: runs resumed inside an epoch, and processes that it starts itself."""

import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from test_trainers import (
    ACCUMULATED,
    BATCH,
    CYCLIC,
    SAVED_AT,
    STEPS,
    Net,
    adamw,
    assert_same_weights,
    fresh,
    loss_of,
    pairs,
    sgd,
)
from torch.utils.data import DataLoader, DistributedSampler

import grass_fx
from grass_fx.distributed import data_parallel

lightning = pytest.importorskip("lightning")
from lightning_module import Resumable  # noqa: E402

GRASS = {"backend": "grass", "options": CYCLIC}
FULL_RANK = {"backend": "grass", "options": {"compiler": "aot_eager", "rank": 16, "side": "auto"}}
INSIDE = (1, 5)  # steps before a checkpoint in the first epoch and one in the second
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Module(lightning.LightningModule):
    def __init__(self, make, compiled):
        super().__init__()
        self.net, self.make, self.seen = Net(), make, []
        self.net.compile(**compiled)

    def training_step(self, batch, index):
        self.seen.append(batch[0].sum().item())
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return self.make(self.named_parameters())


def fit(module, loader, resume=None, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(accelerator="cpu", gradient_clip_val=0.1, **QUIET, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.simplefilter("error", grass_fx.GrassWarning)
        trainer.fit(module, loader, ckpt_path=resume)
    assert trainer.world_size > 1 or trainer.global_step == STEPS
    return module


def run(folder, loader, make, compiled, resume=None):
    """6 steps in two epochs, each with the data in another order; saved after every step."""
    data = pairs(SAVED_AT).dataset
    order = DistributedSampler(data, num_replicas=1, rank=0)
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    return fit(
        fresh(lambda: Module(make, compiled)),
        loader(data, batch_size=BATCH, sampler=order),
        resume,
        max_epochs=2,
        devices=1,
        accumulate_grad_batches=ACCUMULATED,
        callbacks=[save],
        default_root_dir=folder,
    )


@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_run_resumed_inside_an_epoch_sees_the_same_data_and_has_the_same_weights(tmp_path, make):
    whole = run(tmp_path, Resumable, make, GRASS)
    assert whole.seen[: len(whole.seen) // 2] != whole.seen[len(whole.seen) // 2 :]
    for step in (*INSIDE, SAVED_AT):  # the last one between two epochs
        saved = tmp_path / f"step={step}.ckpt"
        resumed = run(tmp_path / "resumed", Resumable, make, GRASS, saved)
        assert resumed.seen == whole.seen[step * ACCUMULATED :]
        assert_same_weights(whole, resumed)


def test_with_a_loader_that_starts_anew_a_resumed_run_is_as_without_grass(tmp_path):
    """Lightning goes on counting, and such a loader begins at its first batch, grass or not."""
    ways = {
        "grass": (lambda named: grass_fx.AdamW(named, lr=1e-2, warmup_steps=0), FULL_RANK),
        "torch": (lambda named: torch.optim.AdamW(named, lr=1e-2), {"backend": "aot_eager"}),
    }
    ended = {}
    for way, (make, compiled) in ways.items():
        run(tmp_path / way, DataLoader, make, compiled)
        saved = tmp_path / way / f"step={INSIDE[0]}.ckpt"
        ended[way] = run(tmp_path / "resumed", DataLoader, make, compiled, saved)
    assert ended["grass"].seen == ended["torch"].seen
    for p, q in zip(ended["grass"].parameters(), ended["torch"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


# --- processes that Lightning starts ------------------------------------------------------------


class OnSeveral(Module):
    """Compiled in ``setup``: a module that was pickled, as for a process, is compiled no more."""

    def __init__(self, folder):
        lightning.LightningModule.__init__(self)
        self.net, self.folder, self.seen = Net(), folder, []

    def setup(self, stage):
        torch.set_num_threads(1)
        if dist.is_initialized():
            data_parallel(self)
        self.net.compile(**GRASS)

    def train_dataloader(self):
        data = pairs(2 * STEPS).dataset
        if not dist.is_initialized():
            return DataLoader(data, batch_size=2 * BATCH)
        return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))

    def configure_optimizers(self):
        return adamw(self.named_parameters())

    def on_train_end(self):
        compact = sum("indices" in state for state in self.optimizers().optimizer.state.values())
        assert self.trainer.global_step == STEPS
        ended = {"compact": compact, "weights": self.net.state_dict()}
        torch.save(ended, f"{self.folder}/{self.trainer.world_size}-{self.global_rank}.pt")


@pytest.mark.slow
def test_processes_that_lightning_starts_train_as_one(tmp_path):
    options = {
        "max_epochs": 1,
        "accumulate_grad_batches": ACCUMULATED,
        "default_root_dir": tmp_path,
    }
    for several in ({"devices": 1}, {"devices": 2, "strategy": "ddp_spawn"}):
        module = fresh(lambda: OnSeveral(str(tmp_path)))
        fit(module, None, enable_checkpointing=False, **several, **options)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for each in (one, first, second):
        assert each["compact"] == 2
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=2e-5, atol=2e-6)
