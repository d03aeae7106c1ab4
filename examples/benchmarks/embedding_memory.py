"""Peak memory of training models whose embedding is tied to the head, with and without `lookups`.

    python examples/benchmarks/embedding_memory.py
    python examples/benchmarks/embedding_memory.py --models gpt2 --rank 0.25
    python examples/benchmarks/embedding_memory.py --smoke

    full        Inductor and torch.optim.AdamW(fused=True)
    dense       grass, and the embedding trains dense
    lookups     grass with lookups=True: the embedding is taken as well

The models have the shapes of the published ones, random weights, and come from transformers. Each
run is a process: a forward and backward that compile, two steps that make the state, and two that
count. A peak is the most that torch's allocator holds, by torch.profiler's record, without scratch
memory inside oneDNN and MKL. "expected" is the sum of weights, gradients and state that
grass_fx.plan gives: activations and temporaries come on top.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from memory import history_of_cpu
from peer_optimizers import nbytes
from pretrain import rank

METHODS = {"full": None, "dense": {}, "lookups": {"lookups": True}}
STEPS, FIRST = 4, 2


def config_of(name: str):
    import transformers

    if name == "gpt2":
        return transformers.GPT2Config()  # the defaults are the smallest published one
    sizes = {
        "qwen2.5-0.5b": {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        },
        "smoke": {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        },
    }  # fmt: skip
    return transformers.Qwen2Config(**sizes[name], tie_word_embeddings=True)


def build(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(name)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config).train()


def options_of(method: str, args: argparse.Namespace) -> dict:
    return {"rank": args.rank, "refresh_every": 2, **METHODS[method]}


def measure(name: str, method: str, args: argparse.Namespace) -> dict:
    model = build(name)
    parameters = list(model.parameters())
    given, make, settings = {}, torch.optim.AdamW, {"lr": 1e-4, "fused": True}
    if method != "full":
        given = {"backend": "grass", "options": options_of(method, args)}
        make = grass_fx.AdamW
    compiled = torch.compile(model, dynamic=False, **given)
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.seq))
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()
    optimizer = make(parameters, **settings)
    held = sum(each.nbytes for each in (*parameters, *model.buffers()))
    profiler = torch.profiler.profile(profile_memory=True)
    profiler.start()
    for _ in range(STEPS):
        with torch.profiler.record_function("a step"):
            compiled(input_ids=tokens, labels=tokens).loss.backward()
            gradients = sum(nbytes(p.grad) for p in parameters)
            optimizer.step()
            model.zero_grad()
    changes, spans = history_of_cpu(profiler)
    line = [(at, held := held + change) for at, change in changes]
    start = spans[FIRST][0]
    state = sum(nbytes(each) for own in optimizer.state.values() for each in own.values())
    return {
        "held": [sum(p.nbytes for p in parameters), gradients, state],
        "expected": expected(model, method, args),
        "peak": max(size for at, size in line if at >= start),
    }


def expected(model: nn.Module, method: str, args: argparse.Namespace) -> int:
    if method == "full":
        return 4 * sum(p.nbytes for p in model.parameters())
    options = options_of(method, args)
    plan = grass_fx.plan(model, "1TB", rank=options.pop("rank"), options=options)
    return plan.total - plan.parts.get("optimizer step", 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ("gpt2", "qwen2.5-0.5b", "smoke")
    add("--models", nargs="+", default=names[:2], choices=names)
    add("--batch", type=int, default=1, help="sequences per step (default: 1)")
    add("--seq", type=int, default=128, help="tokens per sequence (default: 128)")
    add("--rank", type=rank, default=0.125, help="number or fraction (default: 0.125)")
    add("--smoke", action="store_true", help="a very small model")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.models, args.seq = ("smoke",), 16
    return args


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(measure(*args.child, args)))
        return
    print(as_line(environment()), args, sep="\n", end="\n\n")
    print("| MB | | weights | gradients | state | expected | peak | / full |")
    print("|:--|:--|--:|--:|--:|--:|--:|--:|")
    for name in args.models:
        full = None
        for method in METHODS:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name, method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            full = full or result["peak"]
            sizes = [*result["held"], result["expected"], result["peak"]]
            cells = " | ".join(f"{size / 1e6:.1f}" for size in sizes)
            print(f"| {name} | {method} | {cells} | {result['peak'] / full:.3f} |", flush=True)


if __name__ == "__main__":
    main()
