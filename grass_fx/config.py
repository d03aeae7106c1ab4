"""The options of ``torch.compile(model, backend="grass", options={...})`` and all defaults.

Why these defaults: ``docs/method.md``. They stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grass_fx.errors import OptionError

# Defaults of the subspace update, a matter of the optimizer (grass_fx.AdamW).
SCALE = 1.0
WARMUP_STEPS = 20
ON_REFRESH = "carry"

SUBSPACE_DEFAULTS = {"scale": SCALE, "warmup_steps": WARMUP_STEPS, "on_refresh": ON_REFRESH}
"""What optimizers take beside their own arguments."""


@dataclass(frozen=True)
class SelectionRule:
    """What the runtime must know of a selection rule."""

    needs_scores: bool
    """Whether it looks at gradient norms: then the last step of a period is a scoring step."""
    replacement: bool = False
    """Whether it can draw with replacement."""
    power: int = 0
    """The random rules: q_i ∝ ‖g_i‖^power."""
    freezes: bool = False
    """Whether its first full selection is its last."""


RULES = {
    "cyclic": SelectionRule(needs_scores=False),
    "uniform": SelectionRule(needs_scores=False, replacement=True),
    "multinomial_norm": SelectionRule(needs_scores=True, replacement=True, power=1),
    "multinomial_norm_sq": SelectionRule(needs_scores=True, replacement=True, power=2),
    "top": SelectionRule(needs_scores=True),
    "frozen_top": SelectionRule(needs_scores=True, freezes=True),
}

SIDES = ("auto", "out", "in")
SCORINGS = ("auto", "gradient", "tiles")
SCORE_SYNCS = ("norms", "gradient")
COMPILERS = ("inductor", "aot_eager")
MODES = (
    None,
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)


PASSES = ("push_norms", "push_selection", "recompute_gathers", "keep_selected")
"""What ``disable_passes`` may name: the passes on the joint graph, none of which a number needs."""


def nearest(word: object, words: tuple[str, ...] | list[str]) -> str:
    """The end of an error message: the closest valid name if there is one, else all of them."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(map(repr, words))}."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class GrassConfig:
    """Validated options of the "grass" backend.

    Raises :class:`~grass_fx.errors.OptionError` naming the option and the remedy.
    """

    rank: int | float = 0.25
    """Columns (side "out": rows) of each weight that have a gradient, r: a number, or a fraction of
    the selected dimension in (0, 1)."""
    refresh_every: int | float = 100
    """K, in optimizer steps; ``math.inf`` keeps the first selection."""
    selection: str = "cyclic"
    """The selection rule: a key of :data:`RULES`."""
    block: int = 1
    """B: consecutive columns (rows) that are selected together."""
    replacement: bool = False
    """Draw with replacement (random rules only), scaled so that E[PPᵀG] = G (equation 6)."""
    scoring: str = "auto"
    """How a scoring step gets gradient norms: "gradient" forms each layer's full gradient once, for
    its scores and its compact gradient; "tiles" holds only tiles of it and computes the compact
    gradient beside them, at the price of one more compact product; "auto" uses tiles for large
    gradients on a GPU."""
    side: str = "in"
    """"in" selects input features, "out" output features, "auto" the smaller dimension. With "in"
    and a rule without gradient norms the forward keeps only the selected columns of inputs that
    nothing else needs. Of stacks of matrices (experts) the rows of each are selected, whatever it
    says."""
    include: tuple[str, ...] | None = None
    """Patterns (fnmatch) of parameter names to take; None means all. A name is that of
    ``named_parameters()`` where the optimizer was built from those before the first step, and also
    the one relative to what is compiled: a part of the model, with regional compilation or after a
    graph break."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of parameter names to leave dense; stronger than ``include``."""
    seed: int = 0
    """Seed of all draws; independent of torch's global generator."""
    process_group: Any = None
    """The process group that averages compact gradients, inside the backward graph; None: that of
    ``grass_fx.distributed.data_parallel(model)``, which the model needs in any case."""
    score_sync: str = "norms"
    """What several processes score: "norms" adds up the squared norms of each one's gradient, one
    small all-reduce in a period; "gradient" takes them of the averaged gradient, for which scoring
    steps all-reduce full gradients, one layer's at a time."""
    compiler: str = "inductor"
    """"inductor", or "aot_eager": the rewritten graphs run without Inductor."""
    mode: str | None = None
    """As ``torch.compile(mode=...)``, which torch refuses beside ``options``."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's own options, as ``torch.compile(options=...)`` takes them."""
    dump_dir: str | None = None
    """A directory that receives the graphs of every stage as text."""
    disable_passes: tuple[str, ...] = ()
    """Passes to leave out, by their names, to find out which one a difference comes from: any of
    :data:`PASSES`. Gradients stay the same; memory and time do not."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, self._patterns(name))
        object.__setattr__(self, "inductor", self._inductor_options())
        if self.dump_dir is not None:
            if not isinstance(self.dump_dir, (str, os.PathLike)):
                raise OptionError(f"dump_dir={self.dump_dir!r} must be the path of a directory.")
            object.__setattr__(self, "dump_dir", os.fspath(self.dump_dir))
        object.__setattr__(self, "disable_passes", self._passes())
        self._check_rank()
        if self.refresh_every != math.inf and not (
            _is_int(self.refresh_every) and self.refresh_every >= 1
        ):
            raise OptionError(
                f"refresh_every={self.refresh_every!r} must be a number of optimizer steps >= 1, "
                "or math.inf to keep the first selection."
            )
        for name, valid in (
            ("selection", tuple(RULES)),
            ("scoring", SCORINGS),
            ("score_sync", SCORE_SYNCS),
            ("side", SIDES),
            ("compiler", COMPILERS),
        ):
            if getattr(self, name) not in valid:
                value = getattr(self, name)
                raise OptionError(f"{name}={value!r} is not known: {nearest(value, valid)}")
        if self.process_group is not None and not hasattr(self.process_group, "group_name"):
            raise OptionError(
                f"process_group={self.process_group!r} must be a process group of "
                "torch.distributed, or None for that of grass_fx.distributed.data_parallel."
            )
        if not isinstance(self.replacement, bool):
            raise OptionError(f"replacement={self.replacement!r} must be True or False.")
        if self.replacement and not RULES[self.selection].replacement:
            able = [name for name, rule in RULES.items() if rule.replacement]
            raise OptionError(
                f"selection={self.selection!r} cannot draw with replacement: "
                f"use replacement=False, or one of {', '.join(able)}."
            )
        if not _is_int(self.seed) or self.seed < 0:
            raise OptionError(f"seed={self.seed!r} must be an integer >= 0.")
        if self.mode not in MODES:
            modes = [m for m in MODES if m is not None]
            raise OptionError(f"mode={self.mode!r} is not known: {nearest(self.mode, modes)}")

    def _patterns(self, name: str) -> tuple[str, ...] | None:
        value = getattr(self, name)
        if value is None and name == "include":
            return None
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
            raise OptionError(f"{name}={value!r} must be patterns of parameter names.")
        return tuple(patterns)

    def _passes(self) -> tuple[str, ...]:
        given = self.disable_passes
        names = (given,) if isinstance(given, str) else given
        if not isinstance(names, Iterable):
            raise OptionError(f"disable_passes={given!r} must be names of passes.")
        names = tuple(names)
        for name in names:
            if name not in PASSES:
                raise OptionError(
                    f"disable_passes: there is no pass {name!r}: {nearest(name, PASSES)}"
                )
        return names

    def _inductor_options(self) -> dict[str, Any]:
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r} must be a dict of Inductor's options.")
        return dict(self.inductor)  # a later change of the caller's dict changes nothing here

    def _check_rank(self) -> None:
        if not _is_int(self.block) or self.block < 1:
            raise OptionError(f"block={self.block!r} must be a number of rows >= 1.")
        if _is_int(self.rank):
            if self.rank < 1:
                raise OptionError(f"rank={self.rank!r} must be at least 1.")
            if self.rank % self.block:
                raise OptionError(
                    f"block={self.block} does not divide rank={self.rank}: "
                    "make rank a multiple of block."
                )
        elif not (isinstance(self.rank, float) and 0 < self.rank < 1):
            raise OptionError(
                f"rank={self.rank!r} must be a number of rows, or a fraction in (0, 1) "
                "of each weight's selected dimension."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> GrassConfig:
        """The configuration that ``torch.compile(..., options=options)`` asks for."""
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise OptionError(
                    f"grass has no option {name!r}: {nearest(name, names)} Options of Inductor "
                    'go into options={"inductor": {...}}.'
                )
        return cls(**options)

    @property
    def needs_scores(self) -> bool:
        """Whether the rule looks at gradients, so that a scoring variant is compiled."""
        return RULES[self.selection].needs_scores

    @property
    def scoring_period(self) -> int | float:
        """Steps for each scoring step of a long run: a frozen selection scores no more."""
        return math.inf if RULES[self.selection].freezes else self.refresh_every

    def wants(self, *names: str) -> str | None:
        """None if ``include``/``exclude`` let the parameter in, else the reason they do not.

        A pattern may match any of its names: the graph's and its optimizer's.
        """

        def match(pattern: str) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names)

        for pattern in self.exclude:
            if match(pattern):
                return f"excluded by {pattern!r}"
        if self.include is not None and not any(map(match, self.include)):
            return "not in include"
        return None

    def rank_and_block(self, size: int) -> tuple[int, int]:
        """(r, B) for a selected dimension of ``size``; a weight with r > size stays dense.

        A fraction is rounded to the nearest multiple of max(8, B), at least that; if that reaches
        the dimension, r = max(B, floor(fraction * size / B) * B). B = 1 where it does not divide.
        """
        block = self.block if size % self.block == 0 else 1
        if isinstance(self.rank, int):
            return self.rank, block
        unit = max(8, block)
        if unit % block:
            unit = math.lcm(8, block)  # B = 3, 5, 6, 7: r must be a multiple of it
        rank = max(unit, math.floor(self.rank * size / unit + 0.5) * unit)
        if rank >= size:
            rank = max(block, math.floor(self.rank * size / block) * block)
        return rank, block
