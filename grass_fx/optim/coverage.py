"""Warnings about how much of a model trains in subspaces, with the largest weights that do not.

One graph sees its own weights only, and a model may be several graphs. So an optimizer's parameters
are judged at a step, by what the graphs have told the registry until then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grass_fx.errors import warn
from grass_fx.state.registry import Left, registry

MOST = 5
"""Weights that a warning names; those of layers that are alike count as one."""

UNSEEN = "in no training graph that grass compiled"


@dataclass(frozen=True)
class _Dense:
    """A weight that trains dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    reason: str
    unwanted: bool
    """Whether it is ``include`` or ``exclude`` that leaves it."""


def warn_if_none_is_taken(optimizer: torch.optim.Optimizer) -> None:
    """The warning of a step to which no compact gradient came; call it once per optimizer."""
    _, dense = _weights(optimizer)
    told = [each for each in dense if each.reason != UNSEEN]
    words = f"What the compiled graphs leave: {_largest(told)}. " if told else ""
    if len(told) < len(dense) or not dense:
        words += _why_unseen() or (
            'Call the compiled model (torch.compile(model, backend="grass")) in the training step, '
            'and see TORCH_LOGS="+grass_fx" for the weights that were not taken. module.compile() '
            "compiles nothing if the module's class is torch's own, such as nn.Sequential. "
        )
    warn(f"no compact gradient has arrived: every parameter trains dense. {words.rstrip()}")


def warn_if_little_is_taken(optimizer: torch.optim.Optimizer) -> None:
    """A warning if less than half of the matrix elements that train are those of taken weights.

    And one if torch has run a whole frame uncompiled, and weights are in no graph. Counted are the
    optimizer's parameters of two dimensions or more that have a gradient or have stepped; what
    ``include`` or ``exclude`` leave is meant to train dense, and does not count. Call it once per
    optimizer, at the end of its first step with compact gradients.
    """
    taken, left = _weights(optimizer)
    dense = [each for each in left if not each.unwanted]
    total = taken + sum(each.size for each in dense)
    if 2 * taken < total:
        unseen = any(each.reason == UNSEEN for each in dense)
        why = f" {_why_unseen()}".rstrip() if unseen else ""
        warn(
            f"grass has taken {taken / total:.1%} of the matrix elements that this optimizer "
            f"trains, {taken:,} of {total:,}. The largest weights that train dense: "
            f"{_largest(dense)}.{why} If one is meant to train dense, name it in the option "
            "exclude, and it counts no more."
        )
        return
    unseen_ones = [each for each in dense if each.reason == UNSEEN]
    skipped = _skipped(whole=True) if unseen_ones else ""
    if skipped:
        warn(f"{_largest(unseen_ones)}: these weights train dense. {skipped}")


def _weights(optimizer: torch.optim.Optimizer) -> tuple[int, list[_Dense]]:
    """How many elements the taken weights have, and the weights that train dense."""
    taken, dense = 0, []
    for p in _training(optimizer):
        if registry.get(p) is not None:
            taken += p.numel()
            continue
        left = registry.left(p)
        if left is None:
            subclass = is_traceable_wrapper_subclass(p)
            reason = f"a tensor subclass, {type(p).__name__}" if subclass else UNSEEN
            left = Left("a parameter", reason, False)
        name = registry.name_of(p, left.name)
        dense.append(_Dense(name, tuple(p.shape), p.numel(), left.reason, left.unwanted))
    return taken, dense


def _training(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The matrices, and what has more dimensions, that a step moves."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dim() > 1 and p.requires_grad and (p.grad is not None or optimizer.state.get(p)):
                yield p


def _largest(dense: Sequence[_Dense]) -> str:
    """The largest of them with their reasons; weights of layers that are alike are named once."""
    groups: dict[tuple[str, tuple[int, ...], str], list[_Dense]] = {}
    for each in dense:
        key = re.sub(r"\b\d+\b", "*", each.name), each.shape, each.reason
        groups.setdefault(key, []).append(each)
    ordered = sorted(groups.items(), key=lambda item: -sum(each.size for each in item[1]))
    texts = []
    for (pattern, shape, reason), group in ordered[:MOST]:
        name = group[0].name if len(group) == 1 else f"{len(group)} x {pattern}"
        texts.append(f"{name} {shape}: {reason}")
    more = sum(len(group) for _, group in ordered[MOST:])
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _why_unseen() -> str:
    """Why grass has met no graph of a weight, as far as torch's records tell; empty if not."""
    from grass_fx import _torch_compat as compat

    if compat.compilation_is_off():
        return (
            "torch.compile compiles nothing: TORCH_COMPILE_DISABLE, torch._dynamo.config.disable "
            "or torch.compiler.set_stance says so. "
        )
    words, others = _skipped(whole=False), compat.other_backends("grass")
    if not words and others:
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
    """The first few frames; of torch's own functions there are no names."""
    more = ", ..." if len(frames) > most else ""
    return ", ".join(frames[:most]) + more if frames else "a module of a class of torch's own"


def _skipped(whole: bool) -> str:
    """The frames that torch ran uncompiled, with its reasons; empty if there are none."""
    from grass_fx import _torch_compat as compat

    frames: dict[str, list[str]] = {}
    found = compat.uncompiled_frames()
    for each in sorted(found, key=lambda each: not each.whole):
        if each.whole or not (whole or each.reason in frames):
            frames.setdefault(each.reason, []).append(each.frame)
    if not frames:
        return ""
    some = [f"{_few(names)}: {reason}" for reason, names in [*frames.items()][:3]]
    rnn = any("allow_rnn" in reason for reason in frames)
    return (
        f"torch.compile made no graph of {'; '.join(some)}. Change what the reason names, or "
        "compile the parts around it by calls of torch.compile of their own. "
        + ("The weights of an RNN itself train dense in any case. " if rnn else "")
    )
