"""What the options of a parameter group may be, and what they mean for one parameter."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import OptionError
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local

REST = "rest_scale"
"""The option by which rows that are not selected move in gradients' signs; None is a default."""

ROUNDING = "stochastic_rounding"
"""The option by which bfloat16 parameters are rounded stochastically; None is True."""


def check_ranges(kind: str, *values: tuple[str, Any, Any]) -> None:
    """Raise OptionError for the first (name, value, whether it is in range) that is not."""
    for name, value, good in values:
        if not good:
            raise OptionError(f"{kind}: {name}={value!r} is out of range.")


def is_least_zero(value: Any) -> bool:
    """Whether the value is a number, possibly in a tensor, that is at least 0."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value >= 0)
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) >= 0


def is_scale(value: Any) -> bool:
    """Whether the value is an α: "auto", or a number above 0."""
    if isinstance(value, str):
        return value == "auto"
    return is_least_zero(value) and 0 < float(value) < math.inf


WITH_SIGNS = 2 / 3
"""The power of m / r that α is where the rows that are not selected move by signs."""


def scale_of(scale: float | str, p: Tensor, selection: Selection, others_move: bool) -> float:
    """α of one weight; "auto" is the number of its rows over that of the selected ones, m / r.

    If the others move as well, by signs, a row need not make up for all of the time in which it is
    not selected: then it is a power of m / r, fitted to runs (docs/quality.md).
    """
    if scale != "auto":
        return float(scale)
    ratio: float = matrix(local(p)).shape[selection.dim] / selection.indices.numel()
    return ratio**WITH_SIGNS if others_move else ratio


def rounds(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether p is rounded stochastically: by default if it is of bfloat16."""
    return group.get(ROUNDING) is not False and p.dtype == torch.bfloat16
