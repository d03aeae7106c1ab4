"""The subspace of each taken weight: which rows it moves now, and when that changes.

A training run changes selections in ``refresh.finish_steps``, which optimizers call after a step.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from grass_fx.config import RULES
from grass_fx.state import rules
from grass_fx.state.gradient import Owner
from grass_fx.state.history import Norms, SelectionHistory
from grass_fx.state.replicas import Replicas
from grass_fx.state.saved import check_fits, check_saved, sound_history
from grass_fx.state.selection import Selection
from grass_fx.state.sharding import Sharding
from grass_fx.state.spec import SubspaceSpec, scale_dtype

log = logging.getLogger(__name__)

Draw = tuple[Tensor, Tensor | None]
"""The units drawn for one matrix, (r / B,), and with replacement ρ per unit."""

_generations = itertools.count()
"""Generation numbers of selections: a process uses each once, and loading restores none."""


def selects_rows(state: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether a saved :meth:`Subspace.state` selects rows; a stack's always does."""
    return weight.dim() == 3 or int(state["subspace_counters"][7]) == 0


@dataclass(frozen=True)
class Upcoming:
    """What a subspace becomes at the end of a step: see :meth:`Subspace.become`."""

    step: int
    retry: bool
    frozen: bool
    selection: Selection | None = None
    """The next selection, on the CPU at first; None if the current one stays."""
    orders: Sequence[Tensor] = ()
    position: int = 0
    drawn: Tensor | None = None
    """Its indices on the CPU, for the history, with the ``norms`` it was drawn by."""
    norms: Norms = ()


class Subspace:
    """A weight's selection and its schedule. One optimizer step uses one selection.

    Attributes:
        selection: the current :class:`~grass_fx.Selection`.
        step, period: the number of optimizer steps, and of draws.
        scoring_due: whether this step's gradients must carry scores.
        delivered: whether a compact gradient has arrived in this step.
        unfinished: how many backwards have brought one in this step.
        backward: the number of the last backward that brought one.
        history: its selections, for reports; it decides nothing.
        compilations: the (frame, number) pairs of its graphs after the first, for a warning.
        replicas: the processes that train the weight together.
        agreed: whether they have compared options.
        sharding: how the weight is sharded.
        owner: a weak reference to this Subspace, which gradients carry.
    """

    def __init__(
        self, spec: SubspaceSpec, key: int, name: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec, self.name, self.owner = spec, name, Owner(self)
        self.rule = RULES[spec.selection]
        self._scale_dtype = scale_dtype(dtype)
        self.compilations: set[tuple[int, int]] = set()
        self.replicas: Replicas | None = None
        self.agreed = False
        self.backward, self.unfinished = -1, 0
        self.sharding: Sharding | None = None
        self._own: tuple[Selection, Selection] | None = None
        self._inputs: list[Tensor] = []
        self._given: Selection | None = None  # the selection in graph inputs
        dim = spec.dim if spec.stack is None else 0
        none = torch.empty(0, device="cpu")
        self.selection = Selection(none, None, dim, -1, name, -1, spec.run)
        self.restart(key, device)

    def restart(self, key: int, device: torch.device) -> None:
        """Reset to the state before the first step, but keep increasing the generation number."""
        self.key, self.step, self.period = key, 0, 0
        self.delivered = self.frozen = self._retry = False
        units = self.spec.units.count
        # One exhausted walk for each matrix: the first draw starts the first permutations.
        self._orders: Sequence[Tensor] = [torch.arange(units, device="cpu")] * self.spec.pieces
        self._position = units
        self._history = SelectionHistory(self.spec.rows)
        self.become(self._next(Upcoming(0, False, False), *self._draw()))
        self.selection_on(device)

    @property
    def scoring_due(self) -> bool:
        """Whether this step is a scoring step: the last one of a period, or a repeated one."""
        if not self.rule.scores or self.frozen:
            return False
        return self._retry or self.at_period_end(self.step)

    @property
    def signs_due(self) -> bool:
        """Whether this step's gradients must have signs, for the rows that are not selected."""
        return self.spec.rest > 0 and self.step % self.spec.rest == 0

    def at_period_end(self, step: int) -> bool:
        if self.spec.refresh_every == math.inf:
            return step == 0
        return step % int(self.spec.refresh_every) == 0

    @property
    def history(self) -> SelectionHistory:
        """The history of its selections, complete up to now."""
        self.settle()
        return self._history

    def settle(self) -> None:
        """Record the last change of the selection in the history."""
        self._history.settle()

    def upcoming(
        self,
        scores: Tensor | None = None,
        norms: Tensor | None = None,
        tops: Sequence[Tensor | None] | None = None,
    ) -> Upcoming:
        """What the end of this step brings, given the scores if there are any; changes nothing.

        ``scores``: s of all rows, (pieces, rows). ``norms``: those of all units, (pieces, units).
        ``tops``: for a weight of one piece, the units of largest norm in ascending order, if they
        are known already.
        """
        step = self.step + 1
        stays = Upcoming(step, self._retry, self.frozen)
        if not self.rule.scores:
            return self._next(stays, *self._draw()) if self.at_period_end(step) else stays
        if not self.scoring_due:
            return stays
        by_scores = None
        if scores is not None and norms is not None:
            by_scores = self._draw_by(scores, norms, tops or [None] * len(norms))
        if by_scores is None:
            log.info("%s: no usable scores, the selection stays for another step", self.name)
            return replace(stays, retry=True)
        drawn, known, frozen = by_scores
        ascending = tops is not None and tops[0] is not None
        stays = Upcoming(step, False, frozen)
        return self._next(stays, drawn, self._orders, self._position, known, ascending)

    def become(self, upcoming: Upcoming) -> None:
        """Become what :meth:`upcoming` returned; this cannot fail."""
        self.delivered, self.unfinished = False, 0
        self.step, self._retry, self.frozen = upcoming.step, upcoming.retry, upcoming.frozen
        if upcoming.selection is None:
            return
        assert upcoming.drawn is not None
        self._history.change(upcoming.drawn, self.step, upcoming.norms)
        self.selection = upcoming.selection
        self._orders, self._position = upcoming.orders, upcoming.position
        self.period += 1

    def convert(self, dtype: torch.dtype) -> bool:
        """Adapt to the weight's new dtype; return True if anything changed."""
        if self._scale_dtype == (exact := scale_dtype(dtype)):
            return False
        self._scale_dtype, self._given = exact, None
        if (scale := self.selection.scale) is not None:
            self.selection = replace(self.selection, scale=scale.to(exact))
        return True

    def rename(self, name: str) -> None:
        """Use another name for the weight in reports from now on."""
        self.name, self.selection = name, replace(self.selection, name=name)

    def selection_on(self, device: torch.device) -> Selection:
        """Return the current selection, moved to the device on which the weight lives now."""
        self.selection = self.selection.to(device)
        return self.selection

    def own(self, selection: Selection) -> Selection:
        """This process's part of a selection; all of it if the weight is not sharded."""
        if self.sharding is None:
            return selection
        if self._own is None or self._own[0] is not selection:
            self._own = selection, self.sharding.own(selection, self.spec.rows)
        return self._own[1]

    def _now(self, selection: Selection) -> list[Tensor]:
        """The tensors that :func:`graph_inputs` must hold for this selection."""
        current = [t for t in (self._within(selection), selection.scale) if t is not None]
        return [t.view(self.spec.indices_shape) for t in current]

    def _within(self, selection: Selection) -> Tensor:
        """σ, counted within each matrix if the weight is a stack."""
        return selection.indices if self.spec.stack is None else selection.indices % self.spec.size

    def _stream(self, piece: int) -> torch.Generator:
        """The random generator for the current draw of one piece."""
        alone = self.spec.pieces == 1 and self.spec.stack is None
        purpose = "grass" if alone else f"grass, matrix {piece}"
        return rules.stream(self.spec.seed, self.key, self.period, purpose)

    @property
    def _count(self) -> int:
        """The number of units that one draw selects."""
        return self.spec.piece_rank // self.spec.block

    def _draw(self) -> tuple[list[Draw], Sequence[Tensor], int]:
        """Draw without scores, by rule 8 or else rule 10; also return the walks after the draw."""
        drawn: list[Draw] = []
        if self.spec.selection == "uniform":
            even = torch.ones(self.spec.units.count, device="cpu")
            for k in range(self.spec.pieces):
                stream = self._stream(k)
                drawn.append(rules.multinomial(even, self._count, self.spec.replacement, stream))
            return drawn, self._orders, self._position
        orders, position = [], self._position
        for k, order in enumerate(self._orders):
            stream = self._stream(k)
            units, order, position = rules.cyclic(order, self._position, self._count, stream)
            orders.append(order)
            drawn.append((units, None))
        return drawn, orders, position

    def _draw_by(
        self, scores: Tensor, norms: Tensor, tops: Sequence[Tensor | None]
    ) -> tuple[list[Draw], Norms, bool] | None:
        """Draw by scores; also return pairs (selected norms, all norms), and whether σ freezes now.

        None if no scores are usable.
        """
        units = self.spec.units
        drawn: list[Draw | None] = []
        known: list[tuple[Tensor, Tensor]] = []
        positive, repeats = self.rule.freezes, self.spec.replacement
        for k, (unit_norms, top) in enumerate(zip(norms, tops, strict=True)):
            new: Draw | None = None if top is None else (top, None)
            if new is None:
                stream = self._stream(k)
                new = rules.select_by_norms(self.rule, unit_norms, self._count, repeats, stream)
            drawn.append(new)
            if new is None:
                positive = False
                continue
            held = unit_norms[new[0].unique() if repeats else new[0]]
            positive = positive and bool((held > 0).all())
            if units.uneven:  # the last unit holds rows of others as well
                unit_norms = scores[k].double().sqrt()
                held = unit_norms[units.rows(new[0].sort().values).unique()]
            known.append((held, unit_norms))
        if not known:
            return None
        if len(known) < len(drawn):  # this copies σ from its device
            drawn = [new or old for new, old in zip(drawn, self._current(), strict=True)]
        return cast("list[Draw]", drawn), known, positive

    def _current(self) -> list[Draw]:
        """The current selection in the form in which it was drawn."""
        pieces, block = self.spec.pieces, self.spec.block
        within = self.selection.indices.cpu() % self.spec.piece_size
        units = self.spec.units.of(within.view(pieces, -1))
        if self.selection.scale is None:
            return [(piece, None) for piece in units]
        scales = self.selection.scale.cpu().view(pieces, -1, block).amax(2)
        return list(zip(units, scales, strict=True))

    def _next(
        self,
        after: Upcoming,
        drawn: Sequence[Draw],
        orders: Sequence[Tensor],
        position: int,
        norms: Norms = (),
        ascending: bool = False,
    ) -> Upcoming:
        """Return ``after`` with the drawn selection, on the CPU.

        ``ascending``: the selection has no ρ, and its units are in order.
        """
        rows, scales = [], []
        for k, (units, scale) in enumerate(drawn):
            if not ascending:
                units, order = units.sort(stable=True)
            within = self.spec.units.rows(units)
            rows.append(within + k * self.spec.piece_size if k else within)
            if self.spec.replacement:
                # The first selection is by rule 10 without ρ, but the graph takes ρ.
                of_units = torch.ones_like(units) if scale is None else scale[order]
                of_rows = of_units.repeat_interleave(self.spec.block)
                scales.append(of_rows * self.spec.units.shares(within))
        indices = torch.cat(rows)
        selection = replace(
            self.selection,
            indices=indices,
            scale=torch.cat(scales).to(self._scale_dtype) if scales else None,
            generation=next(_generations),
            draw=self.selection.draw + 1,
        )
        return replace(
            after,
            selection=selection,
            orders=orders,
            position=position,
            drawn=indices,
            norms=norms,
        )

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as plain tensors (integers in ``counters``)."""
        counters = [
            self.step, self.period, self.selection.draw, self._position, self.key,
            int(self.frozen), int(self._retry), self.spec.dim, self.spec.size, self.spec.parts,
        ]  # fmt: skip
        if self.spec.units.uneven:  # otherwise the order tells B
            counters.append(self.spec.block)
        state = {
            "subspace_counters": torch.tensor(counters, device="cpu"),
            "subspace_order": torch.cat([*self._orders]),
            "subspace_indices": self.selection.indices.clone(),
        }
        if self.selection.scale is not None:
            state["subspace_scale"] = self.selection.scale.clone()
        return {**state, **self.history.state()}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise StateError if a saved :meth:`state` is damaged or does not fit this subspace."""
        check_saved(self.name, state, self.spec.stack)
        check_fits(self.name, state, self.spec)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from copies of :meth:`state`; no tensor of it is kept.

        Raises StateError and changes nothing if it does not fit. A damaged history starts anew.
        """
        self.check(state)
        counters = state["subspace_counters"].tolist()
        past = {name: value for name, value in state.items() if name.startswith("history_")}
        if not sound_history(past, self.spec.rows, counters[0]):
            past = {}
        device, scale = self.selection.indices.device, state.get("subspace_scale")
        indices = state["subspace_indices"].to(device, copy=True)
        if scale is not None:
            scale = scale.to(device, self._scale_dtype, copy=True)
        orders = state["subspace_order"].to("cpu", copy=True).chunk(len(self._orders))
        history = SelectionHistory.resumed(self.spec.rows, indices.cpu(), counters[0], past)
        # From here on nothing can fail.
        self.step, self.period, draw, self._position, self.key = counters[:5]
        self.frozen, self._retry = self.rule.freezes and bool(counters[5]), bool(counters[6])
        self._orders, self._history = list(orders), history
        self.selection = replace(
            self.selection,
            indices=indices,
            scale=scale,
            generation=next(_generations),
            draw=draw,
        )


def graph_inputs(
    subspaces: Sequence[Subspace], devices: Sequence[torch.device]
) -> list[list[Tensor]]:
    """σ and, with replacement, ρ of each subspace for a graph, in tensors with fixed addresses.

    They are overwritten when the selection changes, so CUDA graphs need not copy them. Gradients
    are labelled with the selection itself, which never changes. The version counters stay as they
    are, so that a backward that runs too late raises our error, which names the weight.
    """
    changed: list[tuple[Subspace, Selection]] = []
    held: list[Tensor] = []
    now: list[Tensor] = []
    for subspace, device in zip(subspaces, devices, strict=True):
        selection = subspace.selection_on(device)
        if subspace._given is selection:
            continue
        current = subspace._now(selection)
        if subspace._given is None or subspace._inputs[0].device != device:
            subspace._inputs, subspace._given = [t.clone() for t in current], selection
            continue
        changed.append((subspace, selection))
        held += [t.data for t in subspace._inputs]
        now += current
    if changed:
        torch._foreach_copy_(held, now)
    for subspace, selection in changed:
        subspace._given = selection
    return [subspace._inputs for subspace in subspaces]
