"""What Dynamo left uncompiled and why, and which backends compiled the rest.

Only the text of warnings uses this. If a version of torch does not record it, it is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

_EXPLAINED = "Explanation:"
"""A part of torch's message at every graph break."""
_UNTRACED = "Unsupported function call"
"""Torch's message begins so at a break before a call that Dynamo does not trace. From 2.15 on an
LSTM is one; earlier versions skip the whole frame that calls it."""


@dataclass(frozen=True)
class Uncompiled:
    """A frame for which Dynamo made no graph, or not one alone."""

    frame: str
    """Its function and file, as in "forward (model.py:12)"."""
    reason: str
    """Torch's own message, and its first hint."""
    whole: bool
    """Whether the whole frame, or what it calls at the break, ran as plain Python. Otherwise there
    was a graph break, and the code on both sides of it may be compiled."""
    broken: bool
    """Whether operations before the break have a graph."""


def uncompiled_frames() -> list[Uncompiled]:
    """What Dynamo left uncompiled since its reset, by each frame's latest compilation."""
    return _recorded(_uncompiled, [])


def other_backends(ours: str) -> dict[str, list[str]]:
    """The backends other than ``ours`` that compiled frames: name -> frames outside of torch."""
    return _recorded(lambda: _by_backend(ours), {})


def compilation_is_off() -> bool:
    """Whether ``TORCH_COMPILE_DISABLE`` or a stance keeps ``torch.compile`` from compiling."""

    def is_off() -> bool:
        from torch._dynamo import config, eval_frame

        return bool(config.disable) or eval_frame._stance.stance == "force_eager"

    return _recorded(is_off, False)


def _recorded(read: Callable[[], Value], default: Value) -> Value:
    """What ``read`` finds in torch's records; ``default`` if this torch does not keep them."""
    if "torch._dynamo" not in sys.modules:
        return default  # nothing has been compiled, so there is no need to import Dynamo
    try:
        return read()
    except (ImportError, AttributeError):
        return default


def _uncompiled() -> list[Uncompiled]:
    from torch._dynamo.utils import get_compilation_metrics

    met = {_key(code): code for code in _codes()}
    latest: dict[CodeType, Any] = {}  # a later compilation may succeed where an earlier one failed
    for metrics in get_compilation_metrics():
        key = (metrics.co_name, metrics.co_filename, metrics.co_firstlineno)
        if key in met:  # otherwise it is another kind of record, or from before a reset
            latest[met[key]] = metrics
    found: dict[Uncompiled, None] = {}
    for code, metrics in latest.items():
        if metrics.fail_type is not None and not _entries(code):
            found[Uncompiled(_name(code), _in_short(metrics.fail_reason or ""), True, False)] = None
        elif metrics.fail_type is None:
            broken = bool(metrics.graph_op_count)
            for reason in metrics.restart_reasons or ():
                if not broken or _EXPLAINED in reason:  # else it began again for another cause
                    whole = reason.startswith(_UNTRACED)
                    found[Uncompiled(_name(code), _in_short(reason), whole, broken)] = None
    return list(found)


def _by_backend(ours: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for code in _codes():
        for entry in _entries(code):
            backend: Any = entry.backend
            named = [getattr(backend, key, None) for key in ("compiler_name", "__name__")]
            name = str(next(filter(None, named), type(backend).__name__))
            if name != ours:
                frames = found.setdefault(str(name), [])
                if not _is_torchs(code) and _name(code) not in frames:
                    frames.append(_name(code))
    return found


def _codes() -> Iterator[CodeType]:
    """The code of every frame that Dynamo has met since it was reset."""
    from torch._dynamo.convert_frame import input_codes

    return (code for ref in list(input_codes.seen) if (code := ref()) is not None)


def _entries(code: CodeType) -> list[Any]:
    """Dynamo's cache entries for a frame."""
    return torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_name, code.co_filename, code.co_firstlineno


def _name(code: CodeType) -> str:
    return f"{code.co_name} ({Path(code.co_filename).name}:{code.co_firstlineno})"


def _is_torchs(code: CodeType) -> bool:
    return Path(torch.__file__).parent in Path(code.co_filename).parents


def _in_short(reason: str) -> str:
    """The first line of torch's message, its debug context, and its first hint or explanation."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if not lines:
        return "torch does not say why"
    told = [
        line.removeprefix(word).strip()
        for word in ("Hint:", _EXPLAINED)
        for line in lines
        if line.startswith(word)
    ]
    about = re.search(r"^\s*Developer debug context: (.{1,80})$", reason, re.M)
    if not told and about is None:  # an exception in a backend: its name, then its message
        return " ".join(lines[:2])
    first = lines[0].rstrip(".") + (f": {about[1].strip()}" if about else "")
    return ". ".join([first, *told[:1]]).rstrip(" .")
