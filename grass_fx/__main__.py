"""``python -m grass_fx plan``: what fits into a memory, from the command line."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

import torch

from grass_fx.config import RULES, SCORINGS
from grass_fx.cost import LLAMA, MOMENTS
from grass_fx.errors import GrassError
from grass_fx.planning import plan


def _tokens(text: str) -> int:
    return math.prod(int(each) for each in text.split("x"))


def _rank(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of torch")
    return dtype


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan", help="the largest rank that fits into a memory", description=plan.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--memory", required=True, help='such as "40GB" (decimal) or "24GiB" (binary)')
    add("--shape", required=True, choices=[*LLAMA], help="the model")
    add("--rank", type=_rank, help="this rank, rows or a fraction, instead of the largest")
    add("--tokens", type=_tokens, metavar="BxT", help="of one step, for the FLOPs: 8x2048")
    add("--dtype", type=_dtype, default=torch.bfloat16, help="of all parameters (bfloat16)")
    add("--optimizer", choices=[*MOMENTS], default="adamw", help="(adamw)")
    add("--activations", metavar="MEMORY", help="what they take, such as 6GB (not counted)")
    add("--in-backward", action="store_true", help="with grass_fx.step_in_backward")
    add("--selection", choices=[*RULES], default="cyclic", help="the rule (cyclic)")
    add("--scoring", choices=SCORINGS, default="auto", help="of rules that look at norms (auto)")
    add("--block", type=int, default=1, help="rows selected together (1)")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="weights that stay dense")
    add("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("selection", "scoring", "block", "exclude")}
    found = plan(
        args.shape,
        args.memory,
        rank=args.rank,
        tokens=args.tokens,
        dtype=args.dtype,
        optimizer=args.optimizer,
        activations=args.activations,
        in_backward=args.in_backward,
        options=options,
    )
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    return 0 if found.fits else 1


COMMANDS = (_add_plan,)
"""Each adds its subcommand, and sets ``run`` to what carries it out and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m grass_fx", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except GrassError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
