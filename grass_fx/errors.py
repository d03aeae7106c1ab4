"""One error class for each mistake a user can make. A message says what, where, and what to do."""

from __future__ import annotations

import sys
import warnings


class GrassError(Exception):
    """Base of every error that grass_fx raises on purpose."""


class OptionError(GrassError, ValueError):
    """An option is unknown, has an impossible value, or contradicts another one."""


class CompactGradError(GrassError, RuntimeError):  # Python hides a TypeError from an operator
    """A compact gradient does not support an operation, because it would have to become dense."""


class SelectionChangedError(GrassError, RuntimeError):
    """Compact gradients of two different selections were combined."""


class StateError(GrassError, ValueError):
    """A saved optimizer or subspace state does not fit the weight into which it is loaded."""


class UnsupportedTorchError(GrassError, RuntimeError):
    """This version of torch lacks an interface that grass_fx needs."""


class GrassWarning(UserWarning):
    """Something works, but probably not as the user intended."""


class UnsupportedGradError(GrassError, RuntimeError):
    """The optimizer cannot step with a gradient of this kind."""


class MissingPackageError(GrassError, ImportError):
    """A function needs an optional package that is not installed."""


class DistributedError(GrassError, RuntimeError):
    """Processes that train one model together disagree, or can no longer reach each other."""


def warn(message: str) -> None:
    """Issue a GrassWarning for the nearest calling line outside of torch and grass_fx.

    Python shows a warning once for each such line.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GrassWarning, stacklevel=level)


_INSIDE = ("torch", "grass_fx", "contextlib", "functools")
