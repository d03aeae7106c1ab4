"""Fine-tune all weights of a pretrained language model with the Trainer of transformers.

    pip install transformers accelerate
    python examples/recipes/finetune_hf.py --model PATH_OR_NAME --data my/text.txt --out runs/tuned
    python examples/recipes/finetune_hf.py ... --resume     # goes on from the last checkpoint
    python examples/recipes/finetune_hf.py --smoke          # a small model made on the spot

The model is loaded in bfloat16, its layers are checkpointed, and all of it is compiled with
`backend="grass"`. docs/recipes/finetune.md has the command for 8 billion weights on 24 GB.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

import grass_fx

SMOKE = {"seq": 32, "steps": 6, "save_every": 3, "rank": 8, "refresh_every": 2, "lr": 1e-3}


class Blocks(Dataset):
    """Texts one after the other, cut into blocks of `seq` tokens: all batches have one shape."""

    def __init__(self, tokens: Tensor, seq: int):
        self.rows = tokens[: len(tokens) // seq * seq].view(-1, seq)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}  # the model shifts the labels itself


def tokens_of(path: Path, tokenizer, held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """The tokens of a text file, or of a folder's *.txt and *.md: to train on, and held out."""
    files = [path] if path.is_file() else sorted({*path.rglob("*.txt"), *path.rglob("*.md")})
    if not files:
        raise SystemExit(f"--data {path}: no such file, and no folder with *.txt or *.md files")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    tokens = torch.tensor(ids, dtype=torch.int32)
    kept = len(tokens) - int(len(tokens) * held_out)
    return tokens[:kept], tokens[kept:]


def blocks(args: argparse.Namespace, tokenizer) -> tuple[Blocks, Blocks]:
    train, held_out = (Blocks(part, args.seq) for part in tokens_of(args.data, tokenizer))
    if not len(train) or not len(held_out):
        raise SystemExit(f"--data {args.data}: too few tokens for blocks of --seq {args.seq}")
    held_out.rows = held_out.rows[: args.held_out]
    return train, held_out


def load(args: argparse.Namespace) -> nn.Module:
    """The pretrained model in bfloat16, some of it frozen, compiled in place."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    freeze(model, args.freeze)
    model.compile(
        backend="grass",
        options={
            "rank": args.rank,
            "refresh_every": args.refresh_every,
            "lookups": args.lookups,
            "compiler": args.compiler,
            **(signs(model, args.lookups) if args.signs else {}),
        },
    )
    return model


def signs(model: nn.Module, lookups: bool) -> dict:
    """Options by which all columns move, and the head stays dense: see docs/quality.md."""
    head = model.get_output_embeddings().weight
    if lookups and head is model.get_input_embeddings().weight:
        raise SystemExit("--signs leaves the head dense, which is the embedding: omit --lookups")
    return {"rest": "sign", "exclude": [name for name, p in model.named_parameters() if p is head]}


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        named = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not named:
            raise SystemExit(f"--freeze {pattern!r}: no parameter of the model has such a name")
        for parameter in named:
            parameter.requires_grad_(False)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters of the optimizer: no decay for norms and biases; an embedding that grass takes
    (--lookups) wants the rate as it is, and not n/r times it: see docs/quality.md."""
    embedding = model.get_input_embeddings().weight
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = {
        "matrices": ([n for n in named if n[1].dim() > 1 and n[1] is not embedding], {}),
        "vectors": ([n for n in named if n[1].dim() == 1], {"weight_decay": 0.0}),
        "embedding": ([n for n in named if n[1] is embedding], {"scale": 1.0}),
    }
    groups = [{"params": params, **more} for params, more in parts.values() if params]
    return [{"weight_decay": weight_decay, **group} for group in groups]


def arguments_of(args: argparse.Namespace) -> dict:
    """What goes to TrainingArguments, and to TRL's SFTConfig."""
    return {
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, args.steps // 20),
        "save_steps": args.save_every,
        "save_total_limit": 2,
        "logging_steps": 1 if args.smoke else 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": ["tensorboard"] if args.tensorboard else [],
        "seed": args.seed,
    }


def train(args: argparse.Namespace) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, held_out = blocks(args, tokenizer)
    model = load(args)
    groups = groups_of(model, args.weight_decay)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments_of(args)),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # blocks of one length need no padding
        optimizers=(grass_fx.AdamW(groups, lr=args.lr, seed=args.seed), None),
    )
    return finish(trainer, args)


def finish(trainer: Trainer, args: argparse.Namespace) -> Trainer:
    """Train to the end, from the last checkpoint if --resume, and save the model."""
    last = get_last_checkpoint(args.out) if args.resume and args.out.is_dir() else None
    if args.resume and last is None:
        raise SystemExit(f"--resume: there is no checkpoint in {args.out}")
    if last is None:
        print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f} nats/token before")
    trainer.train(resume_from_checkpoint=last)
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f} nats/token after")
    trainer.save_model(str(args.out / "model"))  # save_pretrained, of model and tokenizer
    if torch.cuda.is_available():
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(f"wrote {args.out / 'model'}")
    return trainer


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--model", help="a folder, or a name on the hub, as from_pretrained takes it")
    add("--data", type=Path, help="a text file, or a folder of *.txt and *.md")
    add(
        "--out",
        type=Path,
        default=Path("runs/finetuned"),
        help="checkpoints, and the model (%(default)s)",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add(
        "--rank",
        type=rank,
        default=0.0625,
        help="trained columns, number or fraction (%(default)s)",
    )
    add("--refresh-every", type=int, default=100, help="steps between two selections (%(default)s)")
    add("--lookups", action="store_true", help="take embeddings too: less memory, a higher loss")
    add("--signs", action="store_true", help="move all columns: a lower loss, slower; a dense head")
    add("--freeze", nargs="*", default=[], metavar="PATTERN", help="names that do not train")
    add("--lr", type=float, default=1e-5, help="as for AdamW with full gradients (%(default)s)")
    add("--weight-decay", type=float, default=0.0)
    add("--seq", type=int, default=2048, help="tokens per sequence (%(default)s)")
    add("--batch", type=int, default=1, help="sequences per backward (%(default)s)")
    add("--accumulate", type=int, default=16, help="backwards per optimizer step (%(default)s)")
    add("--steps", type=int, default=1000, help="optimizer steps (%(default)s)")
    add("--save-every", type=int, default=200, help="steps between two checkpoints (%(default)s)")
    add("--held-out", type=int, default=32, help="sequences that are evaluated (%(default)s)")
    add("--compiler", default="inductor", choices=("inductor", "aot_eager"))
    add("--tensorboard", action="store_true", help="write scalars; pip install tensorboard")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a few steps of a small model made on the spot")
    return made


def quiet_in_a_file() -> None:
    """No progress bars of transformers where nobody sees them."""
    if not sys.stderr.isatty():
        disable_progress_bar()


def rank(text: str) -> int | float:
    """`64` is a number of columns, `0.25` a fraction of them."""
    return int(text) if text.isdigit() else float(text)


def main(description: str = __doc__.splitlines()[0], train=train) -> None:
    made = parser(description)
    args = made.parse_args()
    quiet_in_a_file()
    if torch.cuda.device_count() > 1:  # the Trainer would copy the model to all of them
        made.error("this is for one GPU: set CUDA_VISIBLE_DEVICES=0, or take finetune_fsdp2.py")
    if args.smoke:
        return smoke(args, train)
    if args.model is None or args.data is None:
        made.error("--model and --data are needed (or --smoke)")
    train(args)


def smoke(args: argparse.Namespace, train) -> None:
    """The same, with a small model in a folder: train, save, resume; both runs are the same."""
    import small_model

    torch.set_num_threads(1)  # sums of one order, so that equal means equal
    with tempfile.TemporaryDirectory() as folder:
        small_model.save(Path(folder))
        vars(args).update(SMOKE, model=f"{folder}/model", data=Path(folder, "text.txt"))
        vars(args).update(accumulate=2, compiler="aot_eager", out=Path(folder, "out"))
        whole = train(args)
        (args.out / f"checkpoint-{args.steps}").rename(Path(folder, "end"))
        args.resume = True
        resumed = train(args)

        again, first = losses(resumed), losses(whole)
        assert again == first and len(first) == args.steps, (again, first)
        saved = AutoModelForCausalLM.from_pretrained(args.out / "model").state_dict()
        for name, p in whole.model.state_dict().items():
            assert torch.equal(p, resumed.model.state_dict()[name]) and torch.equal(p, saved[name])
    state = whole.optimizer.optimizer.state.values()
    compact = sum("indices" in each for each in state)
    print(f"{compact} of {len(state)} parameters train by columns")
    print(f"resumed after step {args.save_every}: the same losses, the same weights")


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
