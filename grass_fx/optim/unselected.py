"""What optimizers do with the rows that a selection leaves out: decay, and steps by signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from grass_fx.config import REST_SCALE
from grass_fx.optim.checkpoint import CheckpointedOptimizer
from grass_fx.optim.decay import PENDING, is_due, nothing, passes, pending
from grass_fx.optim.layout import Plan
from grass_fx.optim.options import REST
from grass_fx.optim.rest import rest_passes
from grass_fx.optim.rounding import rounding_seed
from grass_fx.optim.stepping import Operation
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.refresh import may_refresh
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local


class UnselectedRows(CheckpointedOptimizer):
    """The part of an optimizer in the subspace that is about all other rows."""

    def _left_selection(
        self, p: Tensor, new: Selection, group: Mapping[str, Any]
    ) -> Selection | None:
        """Return the selection that p's state leaves for ``new``, or None if it is the same.

        Pending weight decay is applied, if a selection changes at another time than a period's end.
        """
        state = self.state[p]
        draw = int(state["generation"])
        old = Selection(state["indices"], state.get("scale"), new.dim, -1, new.name, draw)
        if old.draw == new.draw and old.same_rows(new):
            return None
        if (left := pending(state)) != 1:
            for run in self._decay_passes(p, old, group, left):
                run()
        return old

    def _decay_factor(self, group: Mapping[str, Any]) -> float:
        """1 − lr · λ, by which decoupled weight decay multiplies a weight in one step."""
        raise NotImplementedError

    def _rest_scale(self, group: Mapping[str, Any]) -> float:
        """What lr is multiplied by for these rows if the group does not say.

        Raises:
            OptionError: the optimizer's lr tells nothing about it.
        """
        return REST_SCALE

    def _of_the_rest(self, plan: Plan) -> Iterator[Operation]:
        """Yield operations on the rows that are not selected.

        They move if their gradients have signs, and decay in the same pass. Otherwise pending decay
        is applied where it will be due after the step.
        """
        for group, entries in zip(self.param_groups, plan, strict=True):
            taken = [(p, grad) for p, grad in entries if grad is not None]
            factor = self._decay_factor(group) if taken else 1.0
            for p, grad in taken:
                left = pending(self.state[p]) * factor
                if grad.votes is not None and (rate := self._rest_rate(group)) != 0:
                    yield from map(Operation, self._rest_passes(p, grad, group, rate, left))
                    continue
                subspace = grad.owner or registry.get(p)
                ends = subspace is not None and may_refresh(subspace)
                if is_due(left, ends):
                    for run in self._decay_passes(p, grad.selection, group, left):
                        yield Operation(run)

    def _others_move(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether rows of p that are not selected move by signs, in some steps at least."""
        subspace = registry.get(p)
        return subspace is not None and subspace.spec.rest > 0 and group[REST] != 0

    def _rest_rate(self, group: Mapping[str, Any]) -> float:
        scale = group[REST]
        scale = self._rest_scale(group) if scale is None else float(scale)
        return (-1 if group.get("maximize") else 1) * scale * float(group["lr"])

    def _rest_passes(
        self, p: Tensor, grad: CompactGrad, group: Mapping[str, Any], rate: float, left: float
    ) -> Iterator[Callable[[], Any]]:
        """Move the rows that are not selected, times what is ``left``; then nothing is pending."""
        w, seed = matrix(local(p)), self._seed(p, group, "rest")
        yield from rest_passes(w, grad, rate, left, seed, group.get("compile", False))
        yield lambda: self.state[p].update({PENDING: nothing()})

    def _decay_passes(
        self, p: Tensor, selection: Selection, group: Mapping[str, Any], left: float
    ) -> Iterator[Callable[[], Any]]:
        """Multiply the rows that are not selected by what is ``left``; then nothing is pending."""
        w, seed = matrix(local(p)), self._seed(p, group, "decay")
        of = w, selection.dim, selection.indices, left, seed, group.get("compile", False)
        yield from passes(*of)
        yield lambda: self.state[p].update({PENDING: nothing()})

    def _seed(self, p: Tensor, group: Mapping[str, Any], purpose: str = "rounding") -> Tensor:
        """The seed of the noise with which a taken weight is rounded in this step."""
        subspace = registry.get(p)
        step = 0 if subspace is None else subspace.step
        return rounding_seed(group.get("seed", 0), registry.key_of(p), step, purpose)
