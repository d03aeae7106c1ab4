"""What the forward of a LLaMA keeps for its backward at long contexts, in GB.

    python examples/benchmarks/long_context.py
    python examples/benchmarks/long_context.py --sizes 1b --tokens 131072
    python examples/benchmarks/long_context.py --smoke

What a block keeps for each token is counted by grass_fx.explain on the blocks themselves, in
bfloat16, at a short context: with fused attention all of it grows with the tokens alone. "blocks
checkpointed" keeps the blocks' inputs, and one block whole while it is recomputed. "logits" is what
the head and a plain cross entropy keep besides; a loss that is fused with the head and made in
chunks keeps the head's input instead.

Below, explain's count is checked against what torch's CPU allocator holds between forward and
backward of a small model, in float32 and compiled by Inductor.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from llama import SIZES, build
from pretrain import rank

SHORT = 128  # tokens of what is traced
BFLOAT16 = 2  # bytes


def kept(size: str, selected: float) -> tuple[float, float]:
    """The bytes that a block keeps for each token, at full rank and with grass."""
    counts = []
    for layers in (1, 2):
        model = build(size, layers=layers, vocab=256).bfloat16()
        tokens = torch.zeros(1, SHORT, dtype=torch.long)
        counts.append(grass_fx.explain(model, tokens, options={"rank": selected}).activations)
    (full, more), (full_2, more_2) = counts
    return (full_2 - full) / SHORT, (more_2 - more) / SHORT


def held_by_forward(model: nn.Module, tokens: torch.Tensor, **given: object) -> int:
    """What the CPU allocator holds after the forward, less what it held before."""
    compiled = torch.compile(model, dynamic=False, **given)
    compiled(tokens, tokens).backward()  # compiles
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = compiled(tokens, tokens)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    loss.backward()
    return sum(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")


def check(size: str, selected: float) -> None:
    model, tokens = build(size), torch.randint(256, (4, 128))
    options = {"rank": selected, "exclude": ["head*"]}
    counted = grass_fx.explain(model, tokens, tokens, options=options).activations
    ways = {"full rank": {}, "grass": {"backend": "grass", "options": options}}
    print(f"\n{size}, 4 x 128 tokens, float32\n")
    print("| | counted, MB | measured | difference |\n|---|---|---|---|")
    for (name, given), expected in zip(ways.items(), counted, strict=True):
        measured = held_by_forward(model, tokens, **given)
        difference = f"{100 * (measured / expected - 1):+.1f} %"
        print(f"| {name} | {expected / 1e6:.2f} | {measured / 1e6:.2f} | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["1b", "7b"])
    add("--tokens", type=int, nargs="+", default=[8192, 32768], help="in all sequences together")
    add("--rank", type=rank, default=0.125)
    add("--smoke", action="store_true", help="a very small model")
    args = parser.parse_args()
    if args.smoke:
        args.sizes = ["smoke"]
    warnings.simplefilter("ignore")
    print(as_line(environment()))
    print(
        "| model | tokens | full rank | grass | blocks checkpointed | logits | in chunks |\n"
        "|---|---|---|---|---|---|---|"
    )
    for size in args.sizes:
        config, of_block = SIZES[size], kept(size, args.rank)
        inputs = BFLOAT16 * config.hidden
        whole = [config.layers * each for each in of_block]
        for tokens in args.tokens:
            each = [*whole, config.layers * inputs + of_block[0], BFLOAT16 * config.vocab, inputs]
            shown = " | ".join(f"{tokens * size / 1e9:.1f}" for size in each)
            print(f"| {size}, {config.layers} blocks | {tokens} | {shown} |")
    check("smoke" if args.smoke else "bench", args.rank)


if __name__ == "__main__":
    main()
