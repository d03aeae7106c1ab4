"""Each taken weight's subspace: which rows it moves now, and when that changes.

Selections change in one place, :func:`finish_steps`, which grass_fx optimizers call after their
step (docs/method.md, "Steps, periods, refreshes").
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from grass_fx import selection as rules
from grass_fx.config import RULES, GrassConfig
from grass_fx.errors import StateError
from grass_fx.history import Norms, SelectionHistory
from grass_fx.replicas import Replicas
from grass_fx.selected import Selection
from grass_fx.sharding import Sharding, Shards
from grass_fx.transfers import to_device

log = logging.getLogger(__name__)

Draw = tuple[Tensor, Tensor | None]
"""Units of one matrix, (r / B,), and ρ per unit with replacement."""


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """ρ is as exact as the weight, but never less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class SubspaceSpec:
    """What a compiled graph demands of a weight's subspace: shapes, rule and schedule."""

    size: int
    """The size of the selected dimension, m (side "out") or n (side "in")."""
    dim: int
    """The tensor dimension that is selected."""
    side: str = field(compare=False)
    """"out" or "in", for reports: of a matrix used both ways, graphs may see different sides."""
    rank: int
    """r."""
    block: int
    """B, 1 where the configured one does not divide ``size``."""
    selection: str
    replacement: bool
    refresh_every: int | float
    seed: int
    group: str | None = field(default=None, compare=False)
    """The process group by which the graph averages C, by name; graphs may know it or not."""
    shards: Shards | None = field(default=None, compare=False)
    """How the graph averages C if dimension 0 of the weight is sharded over processes."""
    parts: int = 1
    """A selection of rows that are sharded has as many in each of so many equal parts."""
    stack: int | None = None
    """How many matrices a stacked weight holds, each with r rows of its own; None: it is one."""

    @classmethod
    def of(
        cls, config: GrassConfig, size: int, dim: int, side: str, stack: int | None = None
    ) -> SubspaceSpec:
        """The subspace that ``config`` wants along a dimension of ``size``."""
        rank, block = config.rank_and_block(size)
        schedule = (config.selection, config.replacement, config.refresh_every, config.seed)
        return cls(size, dim, side, rank, block, *schedule, stack=stack)

    @property
    def indices_shape(self) -> tuple[int, ...]:
        """The shape of σ, and of ρ, in graphs."""
        return (self.rank,) if self.stack is None else (self.stack, self.rank)

    @property
    def pieces(self) -> int:
        """How many draws make a selection: one for each matrix of a stack, or each part."""
        return self.stack or self.parts

    @property
    def piece_size(self) -> int:
        """The rows that one draw selects from."""
        return self.size // self.parts

    @property
    def piece_rank(self) -> int:
        """The rows that one draw selects."""
        return self.rank // self.parts

    @property
    def rows(self) -> int:
        """How many rows have a score: those of all matrices of a stack."""
        return self.size * (self.stack or 1)

    def compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of C for a weight of ``shape``."""
        compact = list(shape)
        compact[self.dim] = self.rank
        return tuple(compact)

    def own_compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of this process's part of it."""
        first, *rest = self.compact_shape(shape)
        return (first // (self.shards.ranks if self.shards else 1), *rest)


def selects_rows(state: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether a saved :meth:`Subspace.state` is of rows; of a stack it always is."""
    return weight.dim() == 3 or int(state["subspace_counters"][7]) == 0


class Subspace:
    """A weight's selection and its schedule. One optimizer step uses one selection.

    ``selection`` is the current :class:`~grass_fx.gradient.Selection`; ``step`` counts optimizer
    steps taken with it, ``period`` the draws made; ``scoring_due`` tells whether this step's
    gradients must carry scores; ``delivered``, whether a compact gradient has arrived in it;
    ``history`` records selections for reports, and decides nothing; ``compilations`` are those
    that the weight has met since (frame, number), for a warning. ``replicas``: with which other
    processes it is trained, ``agreed``: whether they have compared options, ``sharding``: how it is
    spread over them.
    """

    def __init__(
        self, spec: SubspaceSpec, key: int, name: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec, self.name = spec, name
        self.rule = RULES[spec.selection]
        self._scale_dtype = scale_dtype(dtype)
        self.compilations: set[tuple[int, int]] = set()
        self.replicas: Replicas | None = None
        self.agreed = False
        self.sharding: Sharding | None = None
        self._own: tuple[Selection, Selection] | None = None
        self._inputs: list[Tensor] = []
        self._given: Selection | None = None  # what the inputs of graphs hold
        dim = spec.dim if spec.stack is None else 0
        self.selection = Selection(torch.empty(0, device="cpu"), None, dim, -1, name)
        self.restart(key, device)

    def restart(self, key: int, device: torch.device) -> None:
        """Be as before the first step; selections go on being counted."""
        self.key, self.step, self.period = key, 0, 0
        self.delivered = self.frozen = self._retry = False
        units = self.spec.piece_size // self.spec.block
        # Exhausted walks, one of each matrix: the first draw starts the first permutations.
        self._orders, self._position = [torch.arange(units, device="cpu")] * self.spec.pieces, units
        self._history = SelectionHistory(self.spec.rows)
        self._set(self._draw(), ())
        self.selection_on(device)

    @property
    def scoring_due(self) -> bool:
        """Whether this step is a scoring step: the last one of a period, or a repeated one."""
        if not self.rule.needs_scores or self.frozen:
            return False
        return self._retry or self._at_period_end(self.step)

    def _at_period_end(self, step: int) -> bool:
        if self.spec.refresh_every == math.inf:
            return step == 0
        return step % int(self.spec.refresh_every) == 0

    @property
    def history(self) -> SelectionHistory:
        """Its selections, complete."""
        self.settle()
        return self._history

    def settle(self) -> None:
        """Record the last change of the selection in the history."""
        self._history.settle()

    def finish_step(self, scores: Tensor | None) -> None:
        """:func:`finish_steps` of this subspace alone."""
        finish_steps([(self, scores)])

    def finish(self, norms: Tensor | None, tops: Sequence[Tensor | None] | None = None) -> None:
        """As :func:`finish_steps` says, by the norms of all units of each piece, (pieces, units).

        ``tops``: the units of largest norm of the one piece, ascending, if they are known already.
        """
        was_due, self.delivered = self.scoring_due, False
        self.step += 1
        if not self.rule.needs_scores:
            if self._at_period_end(self.step):
                self._set(self._draw(), ())
        elif was_due:
            drawn = None if norms is None else self._draw_by(norms, tops or [None] * len(norms))
            self._retry = drawn is None
            if drawn is None:
                log.info("%s: no usable scores, the selection stays for another step", self.name)
            else:
                self._set(*drawn, ascending=tops is not None and tops[0] is not None)

    def convert(self, dtype: torch.dtype) -> bool:
        """The weight is of this dtype now. Whether that changes anything."""
        if self._scale_dtype == (exact := scale_dtype(dtype)):
            return False
        self._scale_dtype, self._given = exact, None
        if (scale := self.selection.scale) is not None:
            self.selection = replace(self.selection, scale=scale.to(exact))
        return True

    def rename(self, name: str) -> None:
        """Report the weight under another name from now on."""
        self.name, self.selection = name, replace(self.selection, name=name)

    def selection_on(self, device: torch.device) -> Selection:
        """The current selection, on the device the weight lives on now."""
        self.selection = self.selection.to(device)
        return self.selection

    def own(self, selection: Selection) -> Selection:
        """What of a selection lies in this process's part of the weight; all of it if unsharded."""
        if self.sharding is None:
            return selection
        if self._own is None or self._own[0] is not selection:
            self._own = selection, self.sharding.own(selection, self.spec.rows)
        return self._own[1]

    def _now(self, selection: Selection) -> list[Tensor]:
        """What :func:`graph_inputs` of it are to hold."""
        current = [t for t in (self._within(selection), selection.scale) if t is not None]
        return [t.view(self.spec.indices_shape) for t in current]

    def _within(self, selection: Selection) -> Tensor:
        """σ, counted within each matrix of a stack."""
        return selection.indices if self.spec.stack is None else selection.indices % self.spec.size

    def _stream(self, piece: int) -> torch.Generator:
        """The generator of this draw of one piece."""
        alone = self.spec.pieces == 1 and self.spec.stack is None
        purpose = "grass" if alone else f"grass, matrix {piece}"
        return rules.stream(self.spec.seed, self.key, self.period, purpose)

    @property
    def _count(self) -> int:
        return self.spec.piece_rank // self.spec.block

    def _draw(self) -> list[Draw]:
        """Without scores: rule 8, or rule 10 (also every rule's first)."""
        drawn: list[Draw] = []
        if self.spec.selection == "uniform":
            even = torch.ones(self.spec.piece_size // self.spec.block, device="cpu")
            for k in range(self.spec.pieces):
                stream = self._stream(k)
                drawn.append(rules.multinomial(even, self._count, self.spec.replacement, stream))
            return drawn
        before, start = self._orders, self._position
        self._orders = []
        for k, order in enumerate(before):
            stream = self._stream(k)
            units, order, self._position = rules.cyclic(order, start, self._count, stream)
            self._orders.append(order)
            drawn.append((units, None))
        return drawn

    def _draw_by(
        self, norms: Tensor, tops: Sequence[Tensor | None]
    ) -> tuple[list[Draw], Norms] | None:
        """By scores, with the norms that are held and all of them; None if none are usable."""
        drawn: list[Draw | None] = []
        known: list[tuple[Tensor, Tensor]] = []
        positive, repeats = self.rule.freezes, self.spec.replacement
        for k, (each, top) in enumerate(zip(norms, tops, strict=True)):
            new: Draw | None = None if top is None else (top, None)
            if new is None:
                stream = self._stream(k)
                new = rules.select_by_norms(self.rule, each, self._count, repeats, stream)
            drawn.append(new)
            if new is None:
                positive = False
                continue
            held = each[new[0].unique() if repeats else new[0]]
            known.append((held, each))
            positive = positive and bool((held > 0).all())
        if not known:
            return None
        self.frozen = positive
        if len(known) < len(drawn):  # reads σ back from its device
            drawn = [new or old for new, old in zip(drawn, self._current(), strict=True)]
        return cast("list[Draw]", drawn), known

    def _current(self) -> list[Draw]:
        """The current selection as it was drawn."""
        block, shape = self.spec.block, (self.spec.pieces, -1)
        within = self.selection.indices.cpu() % self.spec.piece_size
        units = within.view(shape)[:, ::block] // block
        if self.selection.scale is None:
            return [(each, None) for each in units]
        scales = self.selection.scale.cpu().view(shape)[:, ::block]
        return list(zip(units, scales, strict=True))

    def _set(self, drawn: Sequence[Draw], norms: Norms, ascending: bool = False) -> None:
        """The next selection, on the CPU; ``ascending``: it has no ρ, and its units are so."""
        rows, scales = [], []
        for k, (units, scale) in enumerate(drawn):
            if not ascending:
                units, order = units.sort(stable=True)
            within = rules.rows_of(units, self.spec.block)
            rows.append(within + k * self.spec.piece_size if k else within)
            if scale is not None:
                scales.append(scale[order].repeat_interleave(self.spec.block))
            elif self.spec.replacement:
                # Rule 10's first selection, in a graph that takes ρ.
                scales.append(torch.ones(self.spec.piece_rank, device="cpu"))
        indices = torch.cat(rows)
        self._history.change(indices, self.step, norms)
        self.selection = replace(
            self.selection,
            indices=indices,
            scale=torch.cat(scales).to(self._scale_dtype) if scales else None,
            generation=self.selection.generation + 1,
        )
        self.period += 1

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as plain tensors (integers in ``counters``)."""
        counters = (
            self.step, self.period, self.selection.generation, self._position, self.key,
            int(self.frozen), int(self._retry), self.spec.dim, self.spec.size, self.spec.parts,
        )  # fmt: skip
        state = {
            "subspace_counters": torch.tensor(counters, device="cpu"),
            "subspace_order": torch.cat(self._orders),
            "subspace_indices": self.selection.indices,
        }
        if self.selection.scale is not None:
            state["subspace_scale"] = self.selection.scale
        return {**state, **self.history.state()}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise StateError if :meth:`state` of another run does not fit this subspace."""
        counters = state["subspace_counters"].tolist()
        indices, order = state["subspace_indices"], state["subspace_order"]
        scale = state.get("subspace_scale")
        rows, units = math.prod(self.spec.indices_shape), sum(o.numel() for o in self._orders)
        fits = (
            indices.numel() == rows
            and order.numel() == units
            and counters[7:9] == [self.spec.dim, self.spec.size]
            and (counters[9:] or [1]) == [self.spec.parts]  # without, in checkpoints of before
            and (scale is not None) == self.spec.replacement
        )
        if not fits:
            raise StateError(
                f"{self.name}: the saved selection has {indices.numel()} rows of {counters[8]} in "
                f"{order.numel()} units along dimension {counters[7]}"
                f"{' with scales' if scale is not None else ''}, but the options ask for "
                f"{rows} rows of {self.spec.size} in {units} units along "
                f"dimension {self.spec.dim}{' with scales' if self.spec.replacement else ''}. "
                "Compile with the rank, block, side and replacement of the saved run."
            )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state`. If it does not fit: StateError, and nothing changed."""
        self.check(state)
        counters = state["subspace_counters"].tolist()
        indices, scale = state["subspace_indices"], state.get("subspace_scale")
        self.step, self.period, generation, self._position, self.key = counters[:5]
        self.frozen, self._retry = self.rule.freezes and bool(counters[5]), bool(counters[6])
        orders = state["subspace_order"].cpu().chunk(len(self._orders))
        self._orders = [each.clone() for each in orders]
        self._history = SelectionHistory.resumed(self.spec.rows, indices.cpu(), self.step, state)
        device = self.selection.indices.device
        self.selection = replace(
            self.selection,
            indices=indices.to(device),
            scale=None if scale is None else scale.to(device, self._scale_dtype),
            generation=generation,
        )


def graph_inputs(
    subspaces: Sequence[Subspace], devices: Sequence[torch.device]
) -> list[list[Tensor]]:
    """σ and, with replacement, ρ of each for a graph: the selection in tensors of one address.

    They change in place with the selection, so that CUDA graphs need not copy them. A gradient is
    labelled with the selection itself, which never changes. The version counters stay: a backward
    that comes too late is to meet our error, which names the weight.
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


def finish_steps(finished: Iterable[tuple[Subspace, Tensor | None]]) -> None:
    """Tell subspaces that an optimizer step used their selections; refresh those that are due.

    With the scores s of each, (size,) float32 as its gradient brought them, or None. Scores that
    are missing, not finite or all zero keep the selection and make the next step a scoring step. Of
    a stack, (e·size,), only the matrices of which this is so keep theirs, unless it is so of all.
    """
    finished = list(finished)
    devices = [subspace.selection.indices.device for subspace, _ in finished]
    alike: dict[tuple[int, int, int], list[tuple[Subspace, Tensor]]] = {}
    for subspace, scores in finished:
        rule, spec = subspace.rule, subspace.spec
        if scores is None or not subspace.scoring_due:
            subspace.finish(None)
        elif rule.power or spec.replacement or spec.pieces > 1:
            pieces = scores.cpu().view(spec.pieces, -1)
            subspace.finish(rules.unit_norms(pieces, spec.block))
        else:
            alike.setdefault((spec.size, spec.rank, spec.block), []).append((subspace, scores))
    for (_, rank, block), entries in alike.items():
        # The largest of all of them at once: one by one is what a refresh would take longest for.
        norms = rules.unit_norms(torch.stack([scores.cpu() for _, scores in entries]), block)
        tops = rules.tops(norms, rank // block)
        for (subspace, _), each, top in zip(entries, norms, tops, strict=True):
            subspace.finish(each.unsqueeze(0), [top])
    changed: dict[torch.device, list[Subspace]] = {}
    for (subspace, _), device in zip(finished, devices, strict=True):
        if subspace.selection.indices.device != device:
            changed.setdefault(device, []).append(subspace)
    for device, subspaces in changed.items():
        moved = to_device([each.selection.indices for each in subspaces], device)
        for subspace, indices in zip(subspaces, moved, strict=True):
            subspace.selection = subspace.selection.moved(indices)
