"""What patterns match: options that are given by names of weights, as ``{pattern: value}``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from grass_fx.config import GrassConfig
from grass_fx.errors import OptionError
from grass_fx.state.records import Record, record_of


class ByName:
    """The options of a graph, and what their patterns match among the ``names`` in it."""

    def __init__(self, config: GrassConfig | None = None, names: Iterable[str] = ()) -> None:
        self._config = config or GrassConfig()
        self._matched = self._config.matched(names)
        self.taken: list[Sequence[str]] = []
        """The names of each taken weight: in the graph, and in its optimizer if it was known."""

    def check(self, weights: Sequence[Tensor]) -> None:
        """Raise OptionError if patterns give a weight of this call other options than the graph's.

        Dynamo may use a graph for the weights of many layers, whose names only optimizers know.
        """
        if not self._matched:
            return
        for weight, names in zip(weights, self.taken, strict=True):
            record = record_of(weight)
            if record.name is None or record.name in names:
                continue
            own, compiled = (self._config.of(names[0], name) for name in (record.name, names[-1]))
            if own != compiled:
                raise OptionError(
                    f"{record.name}: torch.compile uses the graph of {names[-1]} for it, and "
                    "patterns give the two other options. Compile the whole model as one, or give "
                    "each layer options without patterns."
                )

    def note(self, weight: Tensor) -> None:
        """Note in the weight's record what patterns match, by its name in the optimizer, too."""
        record: Record = record_of(weight)
        own = {} if record.name is None else self._config.matched([record.name])
        record.matched = {
            each: found or own.get(each, False) for each, found in self._matched.items()
        }
