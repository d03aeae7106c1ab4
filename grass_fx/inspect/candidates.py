"""The parameters of a model, or of shapes, that ``grass_fx.plan`` assumes to be taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from grass_fx.config import GrassConfig, check_matched, matches
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.shapes import named_shapes
from grass_fx.state.spec import SubspaceSpec

Shapes = Mapping[str, Sequence[int]]


# Torch modules that use their matrices in other ways than in a plain matrix product or a lookup.
_DENSE_MODULES = (
    nn.EmbeddingBag,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Candidate:
    """A parameter, and whether grass is assumed to take it."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trains: bool
    candidate: bool
    multiplied: bool = True
    """Whether it is used in products: an embedding that is no head is only looked up in."""

    def cost(self, config: GrassConfig, moments: int) -> LinearCost:
        """The parameter's cost at full rank, r = m; a vector counts as a matrix with one row."""
        *stack, rows, columns = (1, 1, *self.shape) if len(self.shape) < 2 else self.shape
        if not self.candidate:  # options by names need not fit it
            return LinearCost(
                rows, columns, columns, 0, itemsize=self.itemsize, moments=moments,
                matrices=math.prod(stack),
            )  # fmt: skip
        config = config.of(self.name)
        side = self.side_by(config)
        spec = SubspaceSpec.of(config, rows if side == "out" else columns, side == "in", side)
        scoring = None
        if spec.scores == "gradient":
            scoring = "tiles" if config.scoring == "tiles" else "gradient"
        return LinearCost(
            rows, columns, spec.size, 0, spec.scoring_period,
            self.itemsize, side, scoring, config.replacement, moments, matrices=math.prod(stack),
            signs_every=config.signs_every,
        )  # fmt: skip

    def side_by(self, config: GrassConfig) -> str:
        """The side that is selected by these options, which are the parameter's own."""
        *_, rows, columns = (1, 1, *self.shape)
        if self.stacked:  # a stack always selects rows
            return "out"
        if config.side == "auto":
            return "out" if rows <= columns else "in"
        return config.side

    def looked_up_in(self, config: GrassConfig) -> Candidate:
        """As an embedding: only ``lookups`` takes it, and not if rows would be selected."""
        takes = self.candidate and config.lookups and self.side_by(config.of(self.name)) == "in"
        return replace(self, candidate=takes)

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices."""
        return len(self.shape) == 3


def of_model(model: nn.Module, config: GrassConfig, dtype: torch.dtype | None) -> list[Candidate]:
    """All parameters, each once. A weight that is shared with an embedding is a candidate with the
    option ``lookups`` alone."""
    used_otherwise, looked_up, others = set[int](), set[int](), set[int]()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            kind = others
            if isinstance(module, nn.Embedding):
                plain = module.max_norm is None and not module.sparse
                kind = looked_up if plain else used_otherwise
            elif isinstance(module, _DENSE_MODULES):
                kind = used_otherwise
            kind.add(id(p))
    found = []
    for name, p in model.named_parameters():
        itemsize = dtype.itemsize if dtype and p.is_floating_point() else p.itemsize
        fit = p.dim() in (2, 3) and p.is_floating_point() and p.requires_grad
        candidate = fit and id(p) not in used_otherwise and config.wants(name) is None
        each = Candidate(
            name, tuple(p.shape), itemsize, p.requires_grad, candidate, id(p) in others
        )
        found.append(each.looked_up_in(config) if id(p) in looked_up else each)
    return found


def of_shapes(
    shapes: str | Shapes | Iterable[Sequence[int]], config: GrassConfig, dtype: torch.dtype | None
) -> list[Candidate]:
    """Parameters of these shapes; a name in ``inspect.shapes.NAMES`` has those of that model."""
    looked_up, tied = set[str](), False
    if isinstance(shapes, str):
        shapes, embedding = named_shapes(shapes)
        head = {"head.weight", "lm_head.weight"} & shapes.keys()
        looked_up, tied = {embedding}, not head
    elif not isinstance(shapes, Mapping):
        shapes = {str(k): shape for k, shape in enumerate(shapes)}
    itemsize = (dtype or torch.bfloat16).itemsize
    found = []
    for name, shape in shapes.items():
        fit = len(shape) in (2, 3) and config.wants(name) is None
        multiplied = tied or name not in looked_up
        each = Candidate(name, (*shape,), itemsize, True, fit, multiplied)
        if name in looked_up:
            each = each.looked_up_in(config)
        found.append(each)
    return found


def candidates(
    model: nn.Module | str | Shapes | Iterable[Sequence[int]],
    config: GrassConfig,
    dtype: torch.dtype | None,
) -> list[Candidate]:
    """The parameters of a module, of shapes, or of a model that is known by its name."""
    if isinstance(model, nn.Module):
        return of_model(model, config, dtype)
    return of_shapes(model, config, dtype)


def frozen_by(patterns: Sequence[str], parameters: Sequence[Candidate]) -> list[Candidate]:
    """The same parameters, of which those that a pattern matches do not train.

    Raises:
        OptionError: a pattern matches no parameter.
    """
    names = [p.name for p in parameters]
    check_matched({("frozen", each): matches(each, names) for each in patterns}, names)
    return [
        replace(p, trains=False, candidate=False)
        if any(matches(each, [p.name]) for each in patterns)
        else p
        for p in parameters
    ]
