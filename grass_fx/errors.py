"""What a user can get wrong, one class each. A message says what, where, and what to do."""

from __future__ import annotations

import sys
import warnings


class GrassError(Exception):
    """Base of every error that grass_fx raises on purpose."""


class OptionError(GrassError, ValueError):
    """An option is unknown, has an impossible value, or contradicts another one."""


class CompactGradError(GrassError, RuntimeError):  # python hides a TypeError of an operator
    """An operation that a compact gradient cannot answer without becoming dense."""


class SelectionChangedError(GrassError, RuntimeError):
    """Compact gradients of two different selections met."""


class StateError(GrassError, ValueError):
    """A saved optimizer or subspace state does not fit the weight it is loaded into."""


class UnsupportedTorchError(GrassError, RuntimeError):
    """This version of torch lacks something that grass_fx needs."""


class GrassWarning(UserWarning):
    """Something works, but probably not as the user meant it."""


class UnsupportedGradError(GrassError, RuntimeError):
    """A gradient of a kind that the optimizer cannot step with."""


class MissingPackageError(GrassError, ImportError):
    """An optional package that something needs is not installed."""


class DistributedError(GrassError, RuntimeError):
    """Processes that train one model together disagree, or can no longer reach each other."""


def warn(message: str) -> None:
    """Give a GrassWarning at the line that led here: the nearest one outside of torch and grass_fx.

    Python shows a warning once for each such line.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GrassWarning, stacklevel=level)


_INSIDE = ("torch", "grass_fx", "contextlib", "functools")
