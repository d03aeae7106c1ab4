"""``python -m grass_fx``: ``explain`` a model, show its ``graphs``, or ``plan`` its memory."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import unified_diff
from typing import Any

import torch
from torch import Tensor, nn

from grass_fx.config import RESTS, RULES, SCORINGS, SIDES, GrassConfig
from grass_fx.errors import GrassError, OptionError
from grass_fx.inspect import hf
from grass_fx.inspect.cost import MOMENTS
from grass_fx.inspect.explain import explain
from grass_fx.inspect.graphs import layer_graphs
from grass_fx.inspect.planning import plan
from grass_fx.inspect.shapes import NAMES
from grass_fx.inspect.speed import PEAKS

DEFAULTS = GrassConfig()


def _batch(text: str) -> tuple[int, int]:
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) > 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8x2048")
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _rank(text: str) -> int | float | dict[str, int | float]:
    if text.startswith("{"):
        ranks: dict[str, int | float] = json.loads(text)
        return ranks
    return float(text) if "." in text else int(text)


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of torch")
    return dtype


CHOSEN = ("selection", "scoring", "block", "side", "lookups", "rest", "rest_every", "exclude")
"""Options of the backend that all commands take."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add options of the backend, with its defaults."""
    group = parser.add_argument_group("options of the backend, as in training")

    def add(name: str, text: str, **settings: Any) -> None:
        default = getattr(DEFAULTS, name.replace("-", "_"))
        group.add_argument(f"--{name}", default=default, help=f"{text} (%(default)s)", **settings)

    add("selection", "the rule that selects columns", choices=[*RULES])
    add("scoring", "how a rule by norms gets them", choices=SCORINGS)
    add("block", "columns that are selected together", type=int, metavar="N")
    add("side", "select input or output features", choices=SIDES)
    group.add_argument("--lookups", action="store_true", help="also take embeddings")
    add("rest", "the update of columns that are not selected", choices=RESTS)
    add("rest-every", "with --rest sign: update them every N steps", type=int, metavar="N")
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN",
        help="names of weights that stay dense")  # fmt: skip


PLAN = """\
Print the largest rank with which training fits into a memory, and what uses that memory. If full
rank fits, say so. Nothing is allocated. With --card, also print predicted tokens/s.

Which weights are taken is an estimate, made without tracing the model: all matrices but those of
embeddings and convolutions. Activations are those of --tokens: by a formula for models with a name,
and counted as explain does for --hf and --model.

  python -m grass_fx plan --memory 24GB --shape llama-8b --checkpointing --lookups
  python -m grass_fx plan --memory 80GB --shape qwen3-8b --tokens 1x8192 --checkpointing --card h100
"""


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan", help="the largest rank that fits into a memory", description=PLAN
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    group = parser.add_argument_group("the model")
    models = group.add_mutually_exclusive_group(required=True)
    models.add_argument("--shape", metavar="NAME", help=f"by its name: {', '.join(NAMES)}")
    models.add_argument("--hf", metavar="PATH",
        help="by a config.json, or a folder that has one; needs transformers")  # fmt: skip
    models.add_argument("--model", metavar="MODULE:FUNCTION",
        help="by a function that makes it, as for explain")  # fmt: skip
    add = group.add_argument
    add("--inputs", nargs="+", default=[], metavar="SHAPE[:DTYPE[:BELOW]]",
        help="inputs of --model, as for explain")  # fmt: skip
    add("--dtype", type=_dtype, help="of all parameters (bfloat16; of --model as it is made)")
    group = parser.add_argument_group("memory and training")
    add = group.add_argument
    add("--memory", required=True, help='of one GPU: "40GB" (decimal) or "24GiB" (binary)')
    add("--gpus", type=int, default=1, metavar="N",
        help="GPUs that share weights, gradients and state by FSDP2 (1)")  # fmt: skip
    add("--freeze", nargs="+", default=[], metavar="PATTERN",
        help="names of parameters that do not train")  # fmt: skip
    add("--card", metavar="NAME",
        help=f"predict tokens/s on this GPU: {', '.join(PEAKS)}")  # fmt: skip
    add("--rank", type=_rank, help="plan with this rank, a number or a fraction, instead of the "
        'largest; or by names, as JSON: {"*.mlp.*": 0.125, "*": 0.25}')  # fmt: skip
    add("--tokens", type=_batch, metavar="BxT", default=(1, 2048),
        help="sequences x tokens of one forward on one GPU, not for --model (1x2048)")  # fmt: skip
    add("--checkpointing", action="store_true", help="each layer is checkpointed")
    add(
        "--activations",
        metavar="MEMORY",
        help="bytes of activations, such as 6GB, instead of a count",
    )
    add("--optimizer", choices=[*MOMENTS], default="adamw", help="(adamw)")
    add("--in-backward", action="store_true", help="train with grass_fx.step_in_backward")
    _add_options(parser)
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in CHOSEN}
    model, inputs, activations = args.shape, None, args.activations
    tokens: tuple[int, int] | None = args.tokens
    if args.hf:
        config = hf.read_config(args.hf)
        model = hf.build(config, args.dtype)
        if activations is None:
            ranked = options if args.rank is None else {**options, "rank": args.rank}
            activations = hf.activations(config, args.dtype, args.tokens, ranked)
    elif args.model:
        tokens = None
        with torch.device("meta"):
            model, inputs, _ = _built(args)
        model = model.to("meta")
        if activations is not None:
            inputs = None
        elif isinstance(inputs, Tensor):
            inputs = [inputs]
    found = plan(
        model,
        args.memory,
        rank=args.rank,
        tokens=tokens,
        dtype=args.dtype,
        optimizer=args.optimizer,
        activations=activations,
        inputs=inputs,
        checkpointing=args.checkpointing,
        in_backward=args.in_backward,
        gpus=args.gpus,
        card=args.card,
        frozen=args.freeze,
        options=options,
    )
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    return 0 if found.fits else 1


def _built(args: argparse.Namespace) -> tuple[nn.Module, Any, bool]:
    """The model of --model, its inputs, and whether these are made up."""
    built = _factory(args.model)()
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise OptionError(f"--model {args.model}: it made no torch.nn.Module.")
    model = model.to(args.dtype)
    if args.inputs:
        return model, [_input(text) for text in args.inputs], False
    if inputs is None:
        return model, [_input_for(model)], True
    return model, inputs, False


def _arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional arguments and those with names, from a tensor, several, or a dict."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return ((inputs,) if isinstance(inputs, Tensor) else inputs), {}


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add what says which model it is, and on which inputs."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODULE:FUNCTION",
        help="what makes the model, without arguments, from the current folder: "
        "examples.llama:build. It may return (model, inputs): a tensor, several, or a dict "
        "of keyword arguments")  # fmt: skip
    add("--inputs", nargs="+", default=[], metavar="SHAPE[:DTYPE[:BELOW]]",
        help="random ones: 8x512 or 2x128:int64:32000. Without: some that fit the first "
        "embedding or linear layer")  # fmt: skip
    add("--dtype", type=_dtype, help="of the model's parameters (as they are made)")


def _add_graphs(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "graphs",
        help="the graph of one layer, before and after each pass",
        description="The model's forward runs once on the inputs; nothing is trained. Lines begin "
        "with + that a pass has added to the graph before it, and with - that it has removed.",
    )
    _add_model(parser)
    parser.add_argument("--layer", required=True, metavar="NAME",
        help="a module's name, or a pattern: layers.0.mlp.gate, '*.gate'")  # fmt: skip
    parser.add_argument("--rank", type=_rank, default=DEFAULTS.rank, help="as for explain")
    _add_options(parser)
    parser.set_defaults(run=_graphs)


def _graphs(args: argparse.Namespace) -> int:
    model, inputs, _ = _built(args)
    options = {name: getattr(args, name) for name in ("rank", *CHOSEN)}
    several, named = _arguments(inputs)
    before: list[str] | None = None
    for stage, text in layer_graphs(model, args.layer, several, named, options).items():
        lines = text.splitlines()
        changes = () if before is None else [*unified_diff(before, lines, n=len(before))][3:]
        print(f"--- {stage}", *(changes or [f" {line}" for line in lines]), sep="\n", end="\n\n")
        before = lines
    return 0


def _add_explain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "explain",
        help="what is rewritten in a model, what is not and why, what it saves",
        description="The model is traced on the inputs; nothing is trained.",
    )
    add = parser.add_argument
    _add_model(parser)
    add("--device", default="cpu", help="to build and trace on; meta takes no memory (cpu)")
    add("--dynamic", action="store_true", help="with symbolic sizes")
    add("--rank", type=_rank, default=DEFAULTS.rank,
        help="a number, a fraction of the selected dimension, or these by names, as JSON: "
        '{"*.mlp.*": 0.125, "*": 0.25} (%(default)s)')  # fmt: skip
    add("--refresh-every", type=int, default=DEFAULTS.refresh_every, metavar="K",
        help="optimizer steps (%(default)s)")  # fmt: skip
    _add_options(parser)
    add("--html", metavar="FILE", help="write a page with tables, bars and graphs")
    add("--plot", metavar="FILE", help="draw memory and FLOPs (needs matplotlib)")
    add("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    with torch.device(args.device):
        model, inputs, guessed = _built(args)
    options = {name: getattr(args, name) for name in ("rank", "refresh_every", *CHOSEN)}
    several, named = _arguments(inputs)
    try:
        report = explain(model, *several, **named, options=options, dynamic=args.dynamic or None)
    except (IndexError, RuntimeError, TypeError) as error:
        if not guessed:
            raise
        raise OptionError(
            f"the model failed on made-up inputs, {type(error).__name__}: {error}. Give --inputs, "
            "such as 4x32:int64:2000."
        ) from error
    report = replace(report, subject=replace(report.subject, model=args.model))
    print(report.to_json() if args.json else report)
    if args.html:
        report.to_html(args.html)
    if args.plot:
        report.plot(args.plot)
    return 0 if any(weight.taken for weight in report.weights) else 1


def _factory(text: str) -> Any:
    """The function that ``MODULE:FUNCTION`` names."""
    name, _, function = text.partition(":")
    try:
        return getattr(importlib.import_module(name), function or "build")
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"--model {text}: {error}. Give MODULE:FUNCTION.") from error


def _input(text: str) -> Tensor:
    """A random tensor: normally distributed, or integers below a limit."""
    shape, _, rest = text.partition(":")
    name, _, below = rest.partition(":")
    try:
        dtype = _dtype(name or "float32")
        size = [int(extent) for extent in shape.split("x")]
        if dtype.is_floating_point:
            return torch.randn(size, dtype=dtype)
        return torch.randint(int(below or 2), size, dtype=dtype)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise OptionError(
            f"--inputs {text}: {error}. Give SHAPE[:DTYPE[:BELOW]], as 8x512 or 2x128:int64:32000."
        ) from None


def _input_for(model: nn.Module) -> Tensor:
    """One sequence of 128 tokens for the first embedding, or 8 rows for the first linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return torch.randint(module.num_embeddings, (1, 128))
        if isinstance(module, nn.Linear):
            return torch.randn(8, module.in_features, dtype=module.weight.dtype)
    raise OptionError("the model has no embedding and no linear layer to guess from: give --inputs")


COMMANDS = (_add_explain, _add_graphs, _add_plan)
"""Each adds a subcommand, and sets ``run`` to the function that returns its exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status, which is 2 after an error."""
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
