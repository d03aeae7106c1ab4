"""Which model fits which card: tables of cards, printed in seconds. Nothing is allocated.

    python examples/which_card.py                # one GPU
    python examples/which_card.py --gpus 8       # weights, gradients and state shared by FSDP2
    python examples/which_card.py --tokens 8192 --models llama-8b qwen3-8b --gib

Each cell is the smallest card that is enough, in GiB: with 2,048 tokens / with 8,192. One number
stands for both, and "-" means that no card is enough. --gib prints the GiB that training takes
instead. Columns are full rank, and r = n/4, n/8 and 64: each plain, with embeddings taken
("lookups"), and with these and a step in the backward ("backward"). All is bfloat16, AdamW, one
sequence on each GPU, and each layer checkpointed. 1 GiB of a card is left to CUDA and the
allocator. docs/memory-planning.md has the tables.
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
    ", lookups": {"options": {"lookups": True}},
    ", backward": {"options": {"lookups": True}, "in_backward": True},
}
LEFT = 1
"""GiB that are not planned with."""


def sizes(model: str, gpus: int, tokens: int) -> dict[str, float]:
    """Way to train -> GiB on each GPU."""
    plans = {
        f"{name}{way}": grass_fx.plan(
            model, 0, rank=rank, tokens=tokens, checkpointing=True, gpus=gpus, **WAYS[way]
        )
        for way in WAYS
        for name, rank in RANKS.items()
    }
    found = {"full": plans["n/4"].full_total, **{way: each.total for way, each in plans.items()}}
    return {way: size / 2**30 for way, size in found.items()}


def smallest(size: float) -> str:
    return next((str(card) for card in CARDS if size <= card - LEFT), "-")


def row(model: str, gpus: int, tokens: list[int], gib: bool) -> list[str]:
    """A line of the table: the model, and a cell for each way."""
    several = [sizes(model, gpus, each) for each in tokens]
    cells = [model]
    for way in several[0]:
        told = [f"{each[way]:.1f}" if gib else smallest(each[way]) for each in several]
        cells.append(" / ".join(dict.fromkeys(told)))
    return cells


def table(args: argparse.Namespace) -> str:
    head = ["GiB" if args.gib else "", "full", *(f"{name}{way}" for way in WAYS for name in RANKS)]
    rows = [row(model, args.gpus, args.tokens, args.gib) for model in args.models]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|:--|" + "--:|" * (len(head) - 1))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="processes of FSDP2 (1)")
    add("--tokens", type=int, nargs="+", default=[2048, 8192],
        help="of the one sequence on each GPU (2048 8192)")  # fmt: skip
    add("--models", nargs="+", default=MODELS, metavar="NAME", help="as for plan --shape (ten)")
    add("--gib", action="store_true", help="print GiB instead of cards")
    print(table(parser.parse_args()))


if __name__ == "__main__":
    main()
