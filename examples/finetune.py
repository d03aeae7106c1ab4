"""Continue a trained model on other text: all weights that are not frozen, without adapters.

    python examples/finetune.py                                # pretrains first: a few minutes
    python examples/pretrain.py --save runs/tiny.pt            # or do that once, and then ...
    python examples/finetune.py --weights runs/tiny.pt --data my/notes --save runs/notes.pt
    python examples/finetune.py --weights runs/tiny.pt --freeze 'embed*' --include '*.mlp.*'
    python examples/finetune.py --smoke                        # only to see that it runs

A parameter is one of three: frozen (--freeze), taken by grass with a compact gradient (--include),
or, whatever is left, trained dense. The old text is the source of Python's library, the new text
the prose of Python's language reference, unless --old-data and --data say otherwise.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

import grass_fx
from data import Corpus, held_out_loss, language_reference, load
from llama import build
from pretrain import (
    Parts,
    Settings,
    add_arguments,
    bytes_held,
    megabytes,
    save,
    set_up,
    settings_from,
    train,
)

INCLUDE = ("layers.*.attention.*", "layers.*.mlp.*")
FREEZE = ("embed*", "layers.0.*")
# Swept, from the weights of the default pretraining.
DEFAULTS = Settings(steps=300, lr=4e-3, linear_lr=5e-4)
SMOKE = {"size": "tiny", "compiler": "aot_eager"}  # the smaller size has no layer but the first


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def continued(
    settings: Settings, weights: dict[str, Tensor], include: Sequence[str], frozen: Sequence[str]
) -> Parts:
    """The model with these weights, compiled, and an optimizer of what is not frozen."""
    model = build(settings.size)
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*include, *frozen):
        if not any(matches(name, [pattern]) for name in names):
            raise SystemExit(f"no parameter matches {pattern!r} among {', '.join(names)}")
    model.load_state_dict(weights)
    model.to(settings.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not matches(name, frozen))
    return set_up(settings, model, include=list(include), exclude=[])


def pretrained(settings: Settings, corpus: Corpus, steps: int) -> dict[str, Tensor]:
    """Weights to start from where none are given: those of pretrain.py with its own defaults."""
    same = ("size", "batch", "seq", "compiler", "device", "seed")
    settings = Settings(steps=steps, **{name: getattr(settings, name) for name in same})
    print(f"No --weights are given: {steps} steps of pretraining on the old text come first.")
    parts = set_up(settings)
    train(settings, corpus, parts=parts)
    return parts[0].state_dict()


def losses(model: nn.Module, texts: dict[str, Corpus], settings: Settings) -> dict[str, float]:
    window = {"batch": settings.batch, "seq": settings.seq, "device": settings.device}
    return {name: held_out_loss(model, text.held_out, **window) for name, text in texts.items()}


def counts(model: nn.Module) -> dict[str, int]:
    """How many numbers train in which way, by the gradients that the last step left."""
    numbers = {"taken": 0, "dense": 0, "frozen": 0}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            way = "frozen"
        else:
            way = "taken" if isinstance(parameter.grad, grass_fx.CompactGrad) else "dense"
        numbers[way] += parameter.numel()
    return numbers


def bytes_of_full_adamw(model: nn.Module) -> int:
    """A gradient, two moments and a counter of steps for every parameter that is not frozen."""
    return sum(3 * p.nbytes + 4 for p in model.parameters() if p.requires_grad)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, skip=("data", "tokenizer", "vocab", "include_head"), defaults=DEFAULTS)
    pt, jsonl = {"type": Path, "metavar": "FILE.pt"}, {"type": Path, "metavar": "FILE.jsonl"}
    parser.add_argument("--weights", **pt, help="what pretrain.py --save wrote, of the same --size")
    parser.add_argument("--pretrain-steps", type=int, default=Settings.steps, help="without it")
    parser.add_argument("--data", help="new text: a file, or a folder of files")
    parser.add_argument("--old-data", help="what the weights were trained on: as --data")
    parser.add_argument("--include", nargs="*", default=INCLUDE, help="names that grass takes")
    parser.add_argument("--freeze", nargs="*", default=FREEZE, help="names that do not train")
    parser.add_argument("--log", **jsonl, help="write every record here")
    parser.add_argument("--save", **pt, help="keep the trained weights")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    settings = settings_from(args, data="")
    if args.smoke:
        settings = replace(settings, **SMOKE)
    new = load(args.data) if args.data else language_reference()
    texts = {"new": new, "old": load(args.old_data)}

    if args.weights:
        weights = torch.load(args.weights, map_location="cpu")["model"]
    else:
        steps = settings.steps if args.smoke else args.pretrain_steps
        weights = pretrained(settings, texts["old"], steps)
    parts = model, _, optimizer = continued(settings, weights, args.include, args.freeze)
    before = losses(model, texts, settings)
    print(f"{settings.steps} steps on {len(new.train):,} bytes of new text")
    train(settings, new, args.log, parts)
    after = losses(model, texts, settings)

    print("\nheld-out nats/byte    before    after")
    for name in texts:
        print(f"{name + ' text':<18} {before[name]:>9.3f} {after[name]:>8.3f}")
    numbers = ", ".join(f"{number:,} {way}" for way, number in counts(model).items())
    held = bytes_held(list(model.parameters()), optimizer)
    ours, full = held["gradients"] + held["state"], bytes_of_full_adamw(model)
    print(f"parameters         {numbers}")
    print(f"gradients, state   {megabytes(ours)}, {ours / full:.0%} of the {megabytes(full)}")
    print("                   of full AdamW on what is not frozen")
    if args.save:
        save(model, args.save)


if __name__ == "__main__":
    main()
