"""Train the LLaMA of llama.py as a LightningModule.

    pip install lightning
    python examples/lightning_module.py                # a few minutes on two CPU cores
    python examples/lightning_module.py --precision bf16-mixed --selection top
    python examples/lightning_module.py --save-every 50
    python examples/lightning_module.py --resume runs/lightning/epoch=0-step=50.ckpt
    python examples/lightning_module.py --smoke        # only to see that it runs

The module compiles its network in `__init__` and returns grass_fx.AdamW from
`configure_optimizers`; the Trainer accumulates, clips, schedules and saves as it always does.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import grass_fx
from data import held_out_loss, load
from llama import SIZES, build
from pretrain import bytes_held, megabytes, rank

SMOKE = {"size": "smoke", "seq": 32, "batch": 2, "steps": 4, "compiler": "aot_eager"}


class Training(lightning.LightningModule):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.args, self.bytes = args, {}
        self.net = build(args.size)
        options = {"rank": args.rank, "selection": args.selection, "compiler": args.compiler}
        options |= {"refresh_every": args.refresh_every, "exclude": ["head*"], "seed": args.seed}
        self.net.compile(backend="grass", options=options, dynamic=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.net(*batch)

    def configure_optimizers(self) -> dict:
        optimizer = grass_fx.AdamW(self.named_parameters(), lr=self.args.lr, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, self.args.steps * self.args.epochs)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step's first backward: the gradients of the step before are still there."""
        if optimizer.state:
            self.bytes = bytes_held(list(self.net.parameters()), optimizer)


class Resumable(DataLoader):
    """A loader that goes on where a checkpoint was written: Lightning saves its state_dict."""

    done = skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        for self.done, batch in enumerate(super().__iter__(), 1):
            if self.done > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


def batches(text: Tensor, args: argparse.Namespace) -> DataLoader:
    """An epoch: as many windows as `--steps` steps need, the same ones in every epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    count = 2 * args.batch * args.steps
    starts = torch.randint(len(text) - args.seq, (count,), generator=generator)
    pieces = text[starts[:, None] + torch.arange(args.seq + 1)].long()
    data = TensorDataset(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())
    return Resumable(data, batch_size=args.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=tuple(SIZES))
    parser.add_argument("--seq", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per backward, two a step")
    parser.add_argument("--steps", type=int, default=75, help="optimizer steps of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=rank, default=0.25, help="rows kept of each linear weight")
    parser.add_argument("--selection", default="cyclic")
    parser.add_argument("--refresh-every", type=int, default=20)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--precision", default="32-true", help="as the Trainer's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="", help="a file to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    parser.add_argument("--save-every", type=int, help="steps; default: at each epoch's end")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a very small model")
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE, refresh_every=2)

    lightning.seed_everything(args.seed)
    corpus, module = load(args.data), Training(args)
    plain = module.net.forward  # not compiled: no graph for evaluation alone
    window = {"batch": args.batch, "seq": args.seq}
    before = held_out_loss(plain, corpus.held_out, **window)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(args.out, save_top_k=-1, every_n_train_steps=args.save_every)],
        devices=1,
        logger=False,
        enable_model_summary=False,
        default_root_dir=args.out,
    )
    trainer.fit(module, batches(corpus.train, args), ckpt_path=args.resume)

    if not module.bytes:
        raise SystemExit("no step was left to train: the checkpoint is the end of the last epoch")
    after = held_out_loss(plain, corpus.held_out, **window)
    full = sum(p.nbytes for p in module.parameters())
    print(f"held-out loss    {before:.3f} -> {after:.3f} nats/byte")
    print(f"gradients        {megabytes(module.bytes['gradients'])} instead of {megabytes(full)}")
    print(f"optimizer state  {megabytes(module.bytes['state'])} instead of {megabytes(2 * full)}")


if __name__ == "__main__":
    main()
