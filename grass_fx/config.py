"""The options of ``torch.compile(model, backend="grass", options={...})`` and all defaults.

``docs/method.md`` gives the reasons for the defaults, which are defined only here.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grass_fx.errors import OptionError

# Defaults of the subspace update, which belongs to the optimizer (grass_fx.AdamW).
SCALE: float | str = "auto"
WARMUP_STEPS = 20
ON_REFRESH = "carry"

REST_SCALE = 0.5
"""With ``rest="sign"``: the rate of what is not selected, as a part of the learning rate."""

SUBSPACE_DEFAULTS = {
    "scale": SCALE,
    "warmup_steps": WARMUP_STEPS,
    "on_refresh": ON_REFRESH,
    "rest_scale": None,
}
"""The arguments that optimizers take in addition to their own."""


@dataclass(frozen=True)
class SelectionRule:
    """The properties of a selection rule that the runtime needs."""

    scores: str = ""
    """What it uses norms of, "gradient" or "input". The last step of each period then scores."""
    replacement: bool = False
    """Whether it can draw with replacement."""
    power: int = 0
    """For random rules: q_i ∝ norm_i^power."""
    freezes: bool = False
    """Whether it keeps its first full selection forever."""


RULES = {
    "cyclic": SelectionRule(),
    "uniform": SelectionRule(replacement=True),
    "multinomial_norm": SelectionRule("gradient", replacement=True, power=1),
    "multinomial_norm_sq": SelectionRule("gradient", replacement=True, power=2),
    "top": SelectionRule("gradient"),
    "frozen_top": SelectionRule("gradient", freezes=True),
    "input_norm": SelectionRule("input", replacement=True, power=1),
}

RESTS = ("none", "sign")
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

BY_NAME = ("rank", "refresh_every", "selection", "block", "side")
"""The options that may also be given by names of weights, as ``{pattern: value}``."""

PASSES = (
    "push_norms", "push_signs", "push_selection", "accumulate_lookups", "keep_selected",
    "read_padded",
)  # fmt: skip
"""The passes that ``disable_passes`` may name: those on the joint graph. No gradient depends on
them."""


def nearest(word: object, words: tuple[str, ...] | list[str]) -> str:
    """The end of an error message: the closest valid name, or all of them if none is close."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(map(repr, words))}."


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern matches any of these names."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check_matched(matched: Mapping[tuple[str, str], bool], names: Iterable[str]) -> None:
    """Raise OptionError if a pattern of :meth:`GrassConfig.matched` matches no parameter, with the
    nearest of these names."""
    for (option, pattern), found in matched.items():
        if not found:
            near = difflib.get_close_matches(pattern, [*names], n=1, cutoff=0.0)
            remedy = f"; the nearest is {near[0]!r}" if near else ""
            raise OptionError(f"{option}: {pattern!r} matches no parameter{remedy}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class GrassConfig:
    """Validated options of the "grass" backend.

    An impossible option raises :class:`~grass_fx.errors.OptionError`, which names the option and
    the remedy. The options of :data:`BY_NAME` may be ``{pattern: value}``: :meth:`of` then has
    those of one weight.
    """

    rank: int | float = 0.25
    """How many columns (with side "out": rows) of each weight get a gradient: r. Give a number, or
    a fraction in (0, 1) of the selected dimension. Or give one for each kind of weight, as
    {pattern: value} with patterns of names like those of ``include``: the first one that matches
    counts, and a weight that none matches has the default. A pattern that matches no parameter is
    an error at the first step. ``refresh_every``, ``selection``, ``block`` and ``side`` can be
    given like this, too."""
    refresh_every: int | float = 100
    """K, the number of optimizer steps between two selections. ``math.inf`` keeps the first
    selection."""
    selection: str = "cyclic"
    """The rule that selects the columns (rows): a key of :data:`RULES`."""
    block: int = 1
    """B, the number of consecutive columns (rows) that are selected together. If it does not divide
    the selected dimension, the last block is shorter (docs/method.md, "Blocks")."""
    replacement: bool = False
    """Draw with replacement, and scale the selected columns (rows) so that E[PPᵀG] = G
    (equation 6). Only random rules can do this."""
    scoring: str = "auto"
    """How a scoring step computes gradient norms. "gradient" forms each layer's full gradient once,
    and takes its scores and its compact gradient from it. "tiles" holds only tiles of the full
    gradient, and computes the compact gradient separately, which costs one more compact product.
    "auto" means "tiles" for large gradients on a GPU, and "gradient" otherwise."""
    side: str = "in"
    """Which features are selected: "in" for input features (columns), "out" for output features
    (rows), "auto" for the smaller dimension. With "in" and a rule that does not use gradient norms,
    only the selected columns of a layer's input are saved for backward if nothing else needs that
    input. In a stack of matrices (experts), rows of each matrix are selected, regardless of this
    option."""
    lookups: bool = False
    """Also take weights that rows are looked up in: embeddings, tied to a head or not. Their width
    is selected, so that a row that occurs moves in r of its columns. With ``side`` "out", which
    would select among the rows, they stay dense."""
    rest: str = "none"
    """What becomes of the columns (rows) that are not selected. "none": they stand still. "sign":
    they move against the signs of their gradients, which leave the backward as one bit for each
    element; the optimizer's ``rest_scale`` says how far. It costs the FLOPs of full rank's weight
    gradient, and full rank's activations, but no full gradient in memory (if that is a plain
    product: not of a stack, or of a weight that is used twice). Not under ``fully_shard``."""
    rest_every: int = 1
    """With ``rest="sign"``: such columns (rows) move in every so many steps, and only these cost
    more."""
    include: tuple[str, ...] | None = None
    """Patterns (fnmatch) of the parameter names to take; None takes all. Patterns are matched
    against the name in the compiled region, which is a part of the model after a graph break or
    with regional compilation. They are also matched against the name in ``named_parameters()``, if
    the optimizer was built from those before the first step."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of the parameter names to leave dense. It takes precedence over
    ``include``."""
    seed: int = 0
    """The seed of all random draws. They do not use torch's global generator."""
    process_group: Any = None
    """The process group that averages compact gradients inside the backward graph. None uses the
    group of ``grass_fx.distributed.data_parallel(model)``. That call is needed in either case.
    Under torch's ``fully_shard`` leave this None."""
    score_sync: str = "norms"
    """How several processes compute scores. With "norms" each process takes the squared norms of
    its own gradient, and a small all-reduce in each period adds them up. With "gradient" scores are
    the norms of the averaged gradient; for this, scoring steps all-reduce full gradients, one layer
    at a time."""
    compiler: str = "inductor"
    """"inductor" compiles the rewritten graphs with Inductor. "aot_eager" runs them without it."""
    mode: str | None = None
    """The mode of ``torch.compile(mode=...)``. Give it here, because torch does not accept ``mode``
    and ``options`` together."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's own options, as in ``torch.compile(options=...)``."""
    dump_dir: str | None = None
    """A directory to which the graphs of every stage are written as text."""
    disable_passes: tuple[str, ...] = ()
    """Names of passes to leave out, to find the pass that causes a difference: any of
    "push_norms", "push_signs", "push_selection", "accumulate_lookups", "keep_selected" and
    "read_padded". Gradients stay the same; memory and time change."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, self._patterns(name))
        object.__setattr__(self, "inductor", self._inductor_options())
        if self.dump_dir is not None:
            if not isinstance(self.dump_dir, (str, os.PathLike)):
                raise OptionError(f"dump_dir={self.dump_dir!r} must be the path of a directory.")
            object.__setattr__(self, "dump_dir", os.fspath(self.dump_dir))
        object.__setattr__(self, "disable_passes", self._passes())
        if self.given_by_name:
            self._check_mapped()
            return
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
            ("rest", RESTS),
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
        for name in ("replacement", "lookups"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.replacement and not RULES[self.selection].replacement:
            able = [name for name, rule in RULES.items() if rule.replacement]
            raise OptionError(
                f"selection={self.selection!r} cannot draw with replacement: "
                f"use replacement=False, or one of {', '.join(able)}."
            )
        if not _is_int(self.rest_every) or self.rest_every < 1:
            raise OptionError(f"rest_every={self.rest_every!r} must be a number of steps >= 1.")
        if not _is_int(self.seed) or self.seed < 0:
            raise OptionError(f"seed={self.seed!r} must be an integer >= 0.")
        if self.mode not in MODES:
            modes = [m for m in MODES if m is not None]
            raise OptionError(f"mode={self.mode!r} is not known: {nearest(self.mode, modes)}")

    @property
    def given_by_name(self) -> list[str]:
        """The options that are given by names."""
        return [name for name in BY_NAME if isinstance(getattr(self, name), Mapping)]

    def _check_mapped(self) -> None:
        """Check each value by itself; :meth:`of` checks those that meet at one weight."""
        first = {}
        for name in self.given_by_name:
            values = dict(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or not all(isinstance(pattern, str) for pattern in values):
                raise OptionError(
                    f"{name}={values!r} must have patterns of parameter names, such as "
                    f'{{"*.mlp.*": ..., "*": ...}}.'
                )
            first[name] = next(iter(values.values()))
        if len(first.keys() & {"rank", "block"}) == 2:  # which of these meet is not known yet
            first["rank"], first["block"] = type(self).rank, 1
        for name in first:
            for pattern, value in getattr(self, name).items():
                if isinstance(value, Mapping):
                    raise OptionError(f"{name}: {value!r} must not be by names again.")
                try:
                    dataclasses.replace(self, **{**first, name: value})
                except OptionError as error:
                    if f"{name}={value!r}" not in str(error):
                        raise  # about another option
                    raise OptionError(f"{name} of the pattern {pattern!r}: {error}") from None

    def of(self, *names: str) -> GrassConfig:
        """The options of the weight with these names, in its graph and in its optimizer.

        Raises:
            OptionError: what patterns give this weight does not fit together.
        """
        if not self.given_by_name:
            return self
        chosen = {}
        for option in self.given_by_name:
            default = getattr(type(self), option)
            values = getattr(self, option).items()
            chosen[option] = next((v for k, v in values if matches(k, names)), default)
        try:
            return dataclasses.replace(self, **chosen)
        except OptionError as error:
            raise OptionError(f"{names[0]}: {error}") from None

    def matched(self, names: Iterable[str]) -> dict[tuple[str, str], bool]:
        """Return (option, pattern) -> whether it matches any of these names, for all patterns."""
        known = [*names]
        return {
            (option, pattern): matches(pattern, known)
            for option in self.given_by_name
            for pattern in getattr(self, option)
        }

    def _patterns(self, name: str) -> tuple[str, ...] | None:
        value = getattr(self, name)
        if value is None and name == "include":
            return None
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
            raise OptionError(f"{name}={value!r} must be patterns of parameter names.")
        return tuple(patterns)

    def _passes(self) -> tuple[str, ...]:
        value = self.disable_passes
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, Iterable):
            raise OptionError(f"disable_passes={value!r} must be names of passes.")
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
        return dict(self.inductor)  # a copy, which later changes of the caller's dict do not reach

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
        """The configuration for ``torch.compile(..., options=options)``."""
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
    def scores(self) -> set[str]:
        """What rules use norms of, so that a scoring variant is compiled."""
        rules: Any = self.selection
        rules = rules.values() if isinstance(rules, Mapping) else (rules,)
        return {RULES[rule].scores for rule in rules} - {""}

    @property
    def signs_every(self) -> int:
        """In every so many steps gradients need signs; 0: never."""
        return self.rest_every if self.rest == "sign" else 0

    def wants(self, *names: str) -> str | None:
        """None if ``include`` and ``exclude`` admit the parameter, else the reason why not.

        A pattern may match any of the parameter's names: in the graph, or in its optimizer.
        """

        for pattern in self.exclude:
            if matches(pattern, names):
                return f"excluded by {pattern!r}"
        if self.include is not None and not any(matches(p, names) for p in self.include):
            return "not in include"
        return None

    def rank_of(self, size: int) -> int:
        """r for a selected dimension of ``size``; a weight with r > size stays dense.

        A fraction is rounded to the nearest multiple of max(8, B), and to at least max(8, B). If
        that reaches the dimension, r = max(B, floor(fraction * size / B) * B).
        """
        block = self.block
        if isinstance(self.rank, int):
            return self.rank
        unit = max(8, block)
        if unit % block:
            unit = math.lcm(8, block)  # B = 3, 5, 6, 7: r must be a multiple of it
        rank = max(unit, math.floor(self.rank * size / unit + 0.5) * unit)
        if rank >= size:
            rank = max(block, math.floor(self.rank * size / block) * block)
        return rank
