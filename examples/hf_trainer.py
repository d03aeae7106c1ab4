"""Train a LlamaForCausalLM with the Trainer of transformers, then resume it from a checkpoint.

    pip install transformers accelerate
    python examples/hf_trainer.py                      # a few minutes on two CPU cores
    python examples/hf_trainer.py --rank 0.125 --selection top --bf16
    python examples/hf_trainer.py --smoke              # only to see that it runs

The model has random weights, the text is the source of Python's own library, byte by byte: nothing
is downloaded. Two things differ from any other training: `model.compile(backend="grass")`, and the
optimizer. The second half is trained again, from the checkpoint in the middle: with Inductor on
several threads the weights differ in their last digits, else not at all.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import grass_fx
from data import load
from pretrain import bytes_held, megabytes, rank

SMOKE = {"hidden": 32, "seq": 32, "batch": 2, "steps": 6, "compiler": "aot_eager"}


class Held(TrainerCallback):
    """What gradients and optimizer state hold when a step has been taken."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.bytes = bytes_held(list(model.parameters()), optimizer)


def windows(text: Tensor, seq: int, limit: int | None = None) -> list[dict[str, Tensor]]:
    """The text cut into pieces of `seq` bytes; the model shifts the labels itself."""
    pieces = text[: len(text) // seq * seq].view(-1, seq)[:limit].long()
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=2,
        num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=args.seq,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(args: argparse.Namespace, out: Path, resume: str | None = None) -> tuple[Trainer, Held]:
    model = build(args)
    options = {"rank": args.rank, "selection": args.selection, "compiler": args.compiler}
    options |= {"refresh_every": max(2, args.steps // 10), "exclude": ["lm_head*"]}
    model.compile(backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.named_parameters(), lr=args.lr, weight_decay=0.0)
    arguments = TrainingArguments(
        str(out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        bf16=args.bf16,
        save_steps=args.steps // 2,
        logging_steps=max(1, args.steps // 10),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    corpus, held = load(), Held()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=windows(corpus.train, args.seq),
        eval_dataset=windows(corpus.held_out, args.seq, limit=64),
        optimizers=(optimizer, None),  # None: the schedule that the arguments name
        callbacks=[held],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss    {before:.3f} -> {after:.3f} nats/byte")
    return trainer, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seq", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per backward, two a step")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=rank, default=0.25, help="rows kept of each linear weight")
    parser.add_argument("--selection", default="cyclic")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--bf16", action="store_true", help="the Trainer's mixed precision")
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of a very small model")
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE)

    whole, held = train(args, args.out / "whole")
    full = sum(p.nbytes for p in whole.model.parameters())
    print(f"gradients        {megabytes(held.bytes['gradients'])} instead of {megabytes(full)}")
    print(f"optimizer state  {megabytes(held.bytes['state'])} instead of {megabytes(2 * full)}")

    middle = args.out / "whole" / f"checkpoint-{args.steps // 2}"
    resumed, _ = train(args, args.out / "resumed", resume=str(middle))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    apart = max((p - q).abs().max().item() for p, q in pairs)
    print(f"resumed from {middle}: weights differ by {apart:.1g} at most")


if __name__ == "__main__":
    main()
