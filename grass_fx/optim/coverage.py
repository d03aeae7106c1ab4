"""Warns if little of a model trains in subspaces, and names the largest weights that train dense.

One graph sees only its own weights, and a model may consist of several graphs. So the warnings
judge an optimizer's parameters at a step, by what the graphs have told the registry until then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grass_fx.config import check_matched, matches
from grass_fx.errors import warn
from grass_fx.state.registry import Left, registry

MOST = 5
"""The largest number of weights that a warning names; weights of equal layers count as one."""

UNSEEN = "in no training graph that grass compiled"


@dataclass(frozen=True)
class _Dense:
    """A weight that trains dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    reason: str
    unwanted: bool
    """Whether ``include`` or ``exclude`` leaves it dense."""


def warn_if_none_is_taken(optimizer: torch.optim.Optimizer) -> None:
    """Warn at a step to which no compact gradient came; call this once per optimizer."""
    _, dense = _weights(optimizer)
    seen = [weight for weight in dense if weight.reason != UNSEEN]
    words = f"What the compiled graphs leave: {_largest(seen)}. " if seen else ""
    if len(seen) < len(dense) or not dense:
        words += _why_unseen() or (
            'Call the compiled model (torch.compile(model, backend="grass")) in the training step, '
            'and see TORCH_LOGS="+grass_fx" for the weights that were not taken. module.compile() '
            "compiles nothing if the module's class is torch's own, such as nn.Sequential. "
        )
    warn(f"no compact gradient has arrived: every parameter trains dense. {words.rstrip()}")


def check_patterns(optimizer: torch.optim.Optimizer) -> None:
    """Raise OptionError if a pattern of the options has matched no parameter; call this before the
    optimizer's first step with compact gradients.

    A matrix that no graph has met yet may still be met, so its name counts as well.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    matched = registry.matched(params)
    if not matched:
        return
    later = [p for p in params if p.dim() > 1 and not (registry.get(p) or registry.left(p))]
    names = [registry.name_of(p, "") for p in later]
    found = {each: seen or matches(each[1], names) for each, seen in matched.items()}
    check_matched(found, (registry.name_of(p) for p in params if p.dim() > 1))


def warn_if_little_is_taken(optimizer: torch.optim.Optimizer) -> None:
    """Warn if less than half of the matrix elements that train belong to taken weights.

    Otherwise warn if torch has run a whole frame uncompiled and some weights are in no graph. The
    optimizer's parameters of two or more dimensions count if they have a gradient or have stepped.
    Weights that ``include`` or ``exclude`` leaves dense do not count, since that is intended. Call
    this once per optimizer, at the end of its first step with compact gradients.
    """
    taken, left = _weights(optimizer)
    dense = [weight for weight in left if not weight.unwanted]
    total = taken + sum(weight.size for weight in dense)
    if 2 * taken < total:
        unseen = any(weight.reason == UNSEEN for weight in dense)
        why = f" {_why_unseen()}".rstrip() if unseen else ""
        warn(
            f"grass has taken {taken / total:.1%} of the matrix elements that this optimizer "
            f"trains, {taken:,} of {total:,}. The largest weights that train dense: "
            f"{_largest(dense)}.{why} If one is meant to train dense, name it in the option "
            "exclude, and it counts no more."
        )
        return
    unseen_ones = [weight for weight in dense if weight.reason == UNSEEN]
    skipped = _skipped(whole=True) if unseen_ones else ""
    if skipped:
        warn(f"{_largest(unseen_ones)}: these weights train dense. {skipped}")


def _weights(optimizer: torch.optim.Optimizer) -> tuple[int, list[_Dense]]:
    """Return the number of elements in taken weights, and the weights that train dense."""
    taken, dense = 0, []
    for p in _training(optimizer):
        if registry.get(p) is not None:
            taken += p.numel()
            continue
        left = registry.left(p)
        if left is None:
            subclass = is_traceable_wrapper_subclass(p) and not isinstance(p, DTensor)
            reason = f"a tensor subclass, {type(p).__name__}" if subclass else UNSEEN
            left = Left("a parameter", reason, False)
        name = registry.name_of(p, left.name)
        dense.append(_Dense(name, tuple(p.shape), p.numel(), left.reason, left.unwanted))
    return taken, dense


def _training(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of two or more dimensions that a step moves."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dim() > 1 and p.requires_grad and (p.grad is not None or optimizer.state.get(p)):
                yield p


def _largest(dense: Sequence[_Dense]) -> str:
    """List the largest weights with their reasons; weights of equal layers are listed once."""
    groups: dict[tuple[str, tuple[int, ...], str], list[_Dense]] = {}
    for weight in dense:
        key = re.sub(r"\b\d+\b", "*", weight.name), weight.shape, weight.reason
        groups.setdefault(key, []).append(weight)
    ordered = sorted(groups.items(), key=lambda item: -sum(weight.size for weight in item[1]))
    texts = []
    for (pattern, shape, reason), group in ordered[:MOST]:
        name = group[0].name if len(group) == 1 else f"{len(group)} x {pattern}"
        texts.append(f"{name} {shape}: {reason}")
    more = sum(len(group) for _, group in ordered[MOST:])
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _why_unseen() -> str:
    """Say why grass has seen no graph of a weight, as far as torch records it; else empty."""
    from grass_fx import _torch_compat as compat

    if compat.compilation_is_off():
        return (
            "torch.compile compiles nothing: TORCH_COMPILE_DISABLE, torch._dynamo.config.disable "
            "or torch.compiler.set_stance says so. "
        )
    words, others = _skipped(whole=False), compat.other_backends("grass")
    if others and all(record.broken for record in compat.uncompiled_frames()):
        named = [
            f'torch.compile(backend="{backend}") has compiled {_few(frames)}'
            for backend, frames in others.items()
        ]
        words = (
            f"{'; '.join(named)}. What it calls is compiled by that backend alone, also a model "
            'that was compiled with grass. Call torch.compile once, with backend="grass". '
        )
    return words


def _few(frames: Sequence[str], most: int = 3) -> str:
    """List the first few frames; torch's own functions have no names here."""
    more = ", ..." if len(frames) > most else ""
    return ", ".join(frames[:most]) + more if frames else "a module of a class of torch's own"


def _skipped(whole: bool) -> str:
    """Describe what torch ran uncompiled, with its reasons; empty if there is nothing.

    ``whole`` leaves out graph breaks that lie between operations which are compiled.
    """
    from grass_fx import _torch_compat as compat

    frames: dict[str, list[str]] = {}
    broken: dict[str, bool] = {}
    found = compat.uncompiled_frames()
    for record in sorted(found, key=lambda record: (not record.whole, record.broken)):
        if record.whole or not (whole or record.reason in frames):
            frames.setdefault(record.reason, []).append(record.frame)
            broken.setdefault(record.reason, record.broken)
    words = ""
    for kind, what in ((False, "made no graph of"), (True, "broke the graph of")):
        some = [f"{_few(names)}: {why}" for why, names in frames.items() if broken[why] is kind]
        if some:
            words += f"torch.compile {what} {'; '.join(some[:3])}. "
    return words and (
        f"{words}Change what the reason names, or compile the parts around it by calls of "
        "torch.compile of their own. "
    )
