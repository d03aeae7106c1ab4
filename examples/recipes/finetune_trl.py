"""Fine-tune all weights of a pretrained language model with TRL's SFTTrainer.

    pip install trl
    python examples/recipes/finetune_trl.py --model PATH_OR_NAME --data my/text.txt --out runs/tuned
    python examples/recipes/finetune_trl.py --model PATH_OR_NAME --data my/chats.jsonl
    python examples/recipes/finetune_trl.py ... --resume    # goes on from the last checkpoint
    python examples/recipes/finetune_trl.py --smoke         # a small model made on the spot

All options are those of finetune_hf.py. `--data` is text, or a *.jsonl file in TRL's formats, such
as one {"messages": [...]} per line. TRL computes the loss in tiles, which Dynamo does not trace: so
the output head trains dense, or not at all with `--freeze "lm_head*"`.
"""

import argparse
import inspect
import sys

import finetune_hf as hf
import grass_fx

try:
    from datasets import Dataset, load_dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as missing:
    if "--smoke" in sys.argv:
        print(f"skipped, {missing.name} is not installed: pip install trl")
        sys.exit(0)
    if not {"-h", "--help"} & {*sys.argv}:
        sys.exit(f"{missing.name} is not installed: pip install trl")


def data_of(args: argparse.Namespace, tokenizer) -> tuple:
    """What is trained on, and what is held out: blocks of one length, or the lines of the file."""
    if args.data.suffix == ".jsonl":
        lines = load_dataset("json", data_files=str(args.data), split="train")
        parts = lines.train_test_split(test_size=0.05, seed=args.seed)
        held_out = parts["test"]
        return parts["train"], held_out.select(range(min(args.held_out, len(held_out))))
    return tuple(
        Dataset.from_dict({"input_ids": part.rows.tolist()}) for part in hf.blocks(args, tokenizer)
    )


def train(args: argparse.Namespace) -> "SFTTrainer":
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    data, held_out = data_of(args, tokenizer)
    model = hf.load(args)
    groups = hf.groups_of(model, args.weight_decay)
    # Chats differ in length: packed, all batches have one shape, and compile once.
    chats = args.data.suffix == ".jsonl"
    length = {"max_length": args.seq, "packing": chats, "packing_strategy": "wrapped"}
    known = inspect.signature(SFTConfig).parameters
    arguments = {k: v for k, v in {**hf.arguments_of(args), **length}.items() if k in known}
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments, bf16=False),  # the weights are in bfloat16 already
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(grass_fx.AdamW(groups, lr=args.lr, seed=args.seed), None),
    )
    return hf.finish(trainer, args)


if __name__ == "__main__":
    hf.main(__doc__.splitlines()[0], train)
