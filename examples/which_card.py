"""Which model fits which card: a table of ranks, printed in seconds. Nothing is allocated.

    python examples/which_card.py                # one GPU
    python examples/which_card.py --gpus 8       # weights, gradients and state shared by FSDP2
    python examples/which_card.py --tokens 8192 --models llama-8b qwen3-8b

Each cell says what fits: "full" for full rank, or the largest of r = n/4, n/8 and 64 that fits.
"+lookups" also takes the embeddings, "+backward" also steps in the backward; of these the first
that is enough is shown. All is bfloat16, AdamW, one sequence of 2,048 tokens on each GPU, and
each layer checkpointed. A card has its size in GiB; 1 GiB of it is left to
CUDA and the allocator.
docs/memory-planning.md has the tables.
"""

import argparse

import grass_fx

MODELS = (
    "Gemma-3-1B", "Llama-3.2-1B", "Llama-3.2-3B", "Qwen3-4B", "Mistral-7B", "Llama-3.1-8B",
    "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Mixtral-8x7B",
)  # fmt: skip
CARDS = (16, 24, 32, 48, 80)
RANKS = {"n/4": 0.25, "n/8": 0.125, "64": 64}
WAYS = {
    "": {},
    "+lookups": {"options": {"lookups": True}},
    "+backward": {"options": {"lookups": True}, "in_backward": True},
}
LEFT = 1
"""GiB that are not planned with."""


def plan(model: str, rank: int | float, way: str, args: argparse.Namespace):
    return grass_fx.plan(
        model, 0, rank=rank, tokens=args.tokens, checkpointing=True, gpus=args.gpus, **WAYS[way]
    )


def sizes(model: str, args: argparse.Namespace) -> dict[str, int]:
    """What fits best first -> its bytes on one GPU."""
    plans = {(rank, way): plan(model, rank, way, args) for way in WAYS for rank in RANKS.values()}
    found = {"full": plans[0.25, ""].full_total}
    for name, rank in RANKS.items():
        found |= {f"{name}{way}": plans[rank, way].total for way in WAYS}
    return found


def cell(found: dict[str, int], card: int) -> str:
    memory = (card - LEFT) * 2**30
    return next((name for name, size in found.items() if size <= memory), "-")


def table(args: argparse.Namespace) -> str:
    lines = [f"| | {' | '.join(f'{card} GB' for card in CARDS)} |", "|:--|" + ":--|" * len(CARDS)]
    for model in args.models:
        found = sizes(model, args)
        lines.append(f"| {model} | {' | '.join(cell(found, card) for card in CARDS)} |")
    return "\n".join(lines)


def needs(args: argparse.Namespace) -> str:
    """GiB on each GPU of every way to train."""
    columns = ["full", *(f"{name}{way}" for way in WAYS for name in RANKS)]
    lines = [f"| GiB | {' | '.join(columns)} |", "|:--|" + "--:|" * len(columns)]
    for model in args.models:
        found = sizes(model, args)
        lines.append(f"| {model} | {' | '.join(f'{found[k] / 2**30:.1f}' for k in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="processes of FSDP2 (1)")
    add("--tokens", type=int, default=2048, help="of one forward on one GPU (2048)")
    add("--models", nargs="+", default=MODELS, metavar="NAME", help="as for plan --shape (ten)")
    args = parser.parse_args()
    print(f"{args.gpus} GPU, {args.tokens} tokens each\n\n{table(args)}\n\n{needs(args)}")


if __name__ == "__main__":
    main()
