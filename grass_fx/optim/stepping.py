"""Splits an optimizer step into operations, so that it can continue after an exception."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from grass_fx.errors import warn
from grass_fx.state.gradient import CompactGrad, Used
from grass_fx.state.registry import registry


class Operation(NamedTuple):
    """A part of a step: if it fails, it has changed nothing.

    So it must allocate all the memory it needs before it changes a weight or its state. ``ends``:
    the parameters whose step is complete with this operation.
    """

    run: Callable[[], None]
    ends: tuple[Tensor, ...] = ()


class Step:
    """A prepared step: :meth:`apply` moves the parameters, :meth:`commit` ends the step.

    If either fails, calling both again continues where it stopped, as long as :meth:`goes_on`.
    """

    def __init__(
        self, operations: Iterable[Operation], end: Callable[[], None], used: Used
    ) -> None:
        self._left = deque(operations)
        self._end, self._used = end, used
        self._moved: list[Tensor] = []
        self._gradients: list[object] = []  # of _moved, at an interruption
        self._begun = False

    def apply(self) -> None:
        """Move the parameters."""
        try:
            while self._left:
                self._left[0].run()
                self._begun = True
                for p in self._left.popleft().ends:
                    if isinstance(p.grad, CompactGrad):
                        p.grad.mark_used(self._used)
                    self._moved.append(p)
        except BaseException as error:
            self._gradients = [_gradient_of(p) for p in self._moved]
            if self._begun:
                self._tell(error)
            raise

    def commit(self) -> None:
        """End the step: subspaces count it, and change their selections where that is due."""
        try:
            self._end()
        except BaseException:
            self._gradients = [_gradient_of(p) for p in self._moved]
            raise

    def goes_on(self) -> bool:
        """Whether this interrupted step can be finished: its gradients are still there."""
        if not self._begun:
            return False
        if [_gradient_of(p) for p in self._moved] == self._gradients:
            return True
        warn(
            f"the step before was interrupted when {self._names()} had moved, and was not finished "
            "before the next backward: the other parameters are one step behind."
        )
        return False

    def _names(self) -> str:
        names = [registry.name_of(p) for p in self._moved]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more if names else "no parameter"

    def _tell(self, error: BaseException) -> None:
        left = sum(len(operation.ends) for operation in self._left)
        warn(
            f"optimizer.step() was interrupted ({type(error).__name__}): {self._names()} moved, "
            f"{left} parameters have not. Calling step() again, before the next backward, goes on "
            "from there: no parameter moves twice. Moments of a dense one may, if torch's own "
            "kernel had begun with it."
        )


def _gradient_of(p: Tensor) -> object:
    """Return a value that changes if p no longer has the gradient it was stepped with."""
    grad = p.grad
    if isinstance(grad, CompactGrad):
        return grad.used
    if grad is None or grad.is_inference():  # inference tensors have no version
        return id(grad)
    return id(grad), grad._version  # no data_ptr: sparse gradients have none
