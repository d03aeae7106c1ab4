"""Finds the largest rank that fits into a given memory. See docs/memory-planning.md."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grass_fx.config import GrassConfig, check_matched, nearest
from grass_fx.errors import OptionError
from grass_fx.inspect.activations import Activations, of_decoder, traced
from grass_fx.inspect.candidates import Candidate, Shapes, candidates, frozen_by
from grass_fx.inspect.cost import MOMENTS
from grass_fx.inspect.parts import Setting, measure, with_activations
from grass_fx.inspect.shapes import decoder
from grass_fx.inspect.speed import ERRORS, Speed, predicted
from grass_fx.inspect.text import readable


@dataclass(frozen=True)
class Plan:
    """A rank, and the memory that training with it takes. ``print`` shows a table."""

    memory: int
    """The available bytes."""
    rank: int | float | Mapping[str, int | float]
    """For ``options={"rank": ...}``: a fraction of each weight's selected dimension, or r, or these
    by patterns of names."""
    rows: int
    """r of the weights with the largest selected dimension, ``size``; if they differ, the largest.
    """
    size: int
    """The largest selected dimension."""
    parts: dict[str, int]
    """Name of a part -> its bytes; with several GPUs on each of them."""
    full_parts: dict[str, int]
    """The same at full rank, without the scoring step."""
    taken: dict[str, int]
    """Name -> r, for every weight that is assumed to be taken."""
    flops: dict[str, float] | None
    """FLOPs of the taken weights' products in one step, at "full rank" and in the "subspace"."""
    notes: tuple[str, ...]
    searched: bool = True
    """Whether the rank was found, not given."""
    gpus: int = 1
    speed: Speed | None = None
    """The predicted speed on a card that was named."""

    @property
    def full_total(self) -> int:
        """The sum of all parts at full rank, in bytes."""
        return sum(self.full_parts.values())

    @property
    def full_rank_fits(self) -> bool:
        """Whether full rank fits into ``memory``, and no rank is needed."""
        return self.full_total <= self.memory

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether ``total`` is at most ``memory``; only a rank given to ``plan`` can exceed it."""
        return self.total <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        found = {name: getattr(self, name) for name in ("total", "full_total", "full_rank_fits")}
        return {**asdict(self), **found, "fits": self.fits}

    def __str__(self) -> str:
        full_fits = self.searched and self.full_rank_fits
        parts = self.full_parts if full_fits else self.parts
        where = f"{self.rows} of {self.size}"
        rank = f"{self.rank:.6g} ({where})" if isinstance(self.rank, float) else where
        if isinstance(self.rank, Mapping):
            rank = f"by names, {min(self.taken.values())} to {max(self.taken.values())}"
        rows = [*parts.items(), ("sum", sum(parts.values())), ("memory", self.memory)]
        if not full_fits:
            rows.append(("at full rank", self.full_total))
        width = max(len(name) for name, _ in rows)
        lines = [f"rank {rank}, {len(self.taken)} weights in the subspace", ""]
        if full_fits:
            sizes = f"{self.full_total / 1e9:.3f} GB of {self.memory / 1e9:.3f} GB"
            lines = [f"full rank fits: {sizes}. Memory needs no smaller rank.", ""]
        if self.gpus > 1:
            lines[-1:] = [f"on each of {self.gpus} GPUs, sharded by FSDP2", ""]
        lines.append(f"{'':{width}}  {'GB':>9}  {'GiB':>9}")
        lines += [f"{name:{width}}  {v / 1e9:9.3f}  {v / 2**30:9.3f}" for name, v in rows]
        if self.flops and not full_fits:
            full, compact = self.flops["full rank"], self.flops["subspace"]
            lines += ["", f"FLOPs of their products per step: {compact:.3e} instead of {full:.3e}"]
        if self.speed:
            lines += ["", self.speed.line(self.full_rank_fits, full_fits)]
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def parse_memory(memory: int | str) -> int:
    """The number of bytes in 24 * 2**30, "40GB" (decimal), "24GiB" (binary), "1.5TB".

    Raises:
        OptionError: ``memory`` is no such amount.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 0:
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", str(memory), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise OptionError(
            f"memory={memory!r} is no amount of memory: give bytes as an int, or a string such as "
            '"40GB" (decimal) or "24GiB" (binary).'
        )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def activation_bytes(model: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """Bytes that autograd saves for the backward of one eager forward, without parameters.

    It runs ``model(*inputs, **kwargs)`` on the model's device. On the meta device that allocates
    nothing.
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs, **kwargs)
    return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in owned)


def _fractions(size: int, block: int) -> list[float]:
    """The fractions of ``size`` to try: multiples of lcm(8, block) rows, less for small sizes."""
    unit = math.lcm(8, block)
    if unit >= size:
        unit = block if block < size else 1
    return [rows / size for rows in range(unit, size, unit)] or [0.5]


def _activations(
    model: Any, given: Any, inputs: Any, checkpointing: bool, options: Mapping[str, Any]
) -> tuple[Callable[[GrassConfig | None], dict[str, int]], list[str]]:
    """The parts that activations are, by options (None: at full rank), and what to say of them."""
    if inputs is not None:
        if given is not None or not isinstance(model, nn.Module):
            raise OptionError("inputs: give them with a module, and without activations.")
        named = inputs if isinstance(inputs, Mapping) else {}
        args = () if named else tuple(inputs)
        try:
            full, compact = traced(model, args, named, options)
            note = "activations are counted by explain, at its default rank"
        except Exception as error:
            full = compact = activation_bytes(model, *args, **named)
            note = "activations are those of an eager forward, a compiled one keeps fewer"
            note += f"; the model was not traced: {type(error).__name__}"
        return lambda config: {"activations": full if config is None else compact}, [note]
    if isinstance(given, Activations):
        again = ", each layer checkpointed" if checkpointing else ""
        return lambda config: given.parts(config, checkpointing), [given.how + again]
    if given is not None:
        size = parse_memory(given)
        return lambda config: {"activations": size}, []
    return lambda config: {}, [
        "activations are not counted: give tokens of a model with a name, activations, or inputs"
    ]


def plan(
    model: nn.Module | str | Shapes | Iterable[Sequence[int]],
    memory: int | str,
    *,
    rank: int | float | Mapping[str, int | float] | None = None,
    tokens: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
    activations: int | str | Activations | None = None,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    in_backward: bool = False,
    gpus: int = 1,
    card: str | None = None,
    frozen: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Find the largest rank with which training fits into ``memory``, and what uses that memory.

    The rank is a fraction of the largest selected dimension, and stands for a multiple of 8 rows
    of it (of one row if that dimension is 8 or less). For other dimensions the fraction is rounded
    as in training (docs/method.md, "rank").

    Which weights are taken is an estimate, made without tracing the model. It takes the matrices
    and stacks of matrices that ``include`` and ``exclude`` admit, except those of embeddings (also
    tied to a head; with the option ``lookups`` they count), convolutions and recurrent layers. Name
    a matrix that the model only adds, such as position embeddings, in ``exclude``.

    Args:
        model: a module on any device; on the meta device it needs no memory. Or shapes, as
            {name: (m, n)} or a sequence of (m, n), or a name in ``inspect.shapes.NAMES``.
        memory: bytes, or a string such as "40GB" (decimal) or "24GiB" (binary).
        rank: plan with this rank instead of the largest; values as for the backend's ``rank``,
            {pattern: value} among them.
        tokens: of one forward, for FLOPs, speed, and the activations of a model that is known by
            name: (sequences, tokens of each), or the tokens of one sequence.
        dtype: the dtype of the parameters. None keeps their own; for shapes it is bfloat16.
        optimizer: "adamw", "momentum" or "sgd", with 2, 1 or 0 moments.
        activations: bytes of activations, in the forms that ``memory`` takes, or counted ones
            (``inspect.activations``).
        inputs: the model's inputs, instead of ``activations``: a sequence, or a dict of keyword
            arguments. What the graphs save is counted as by :func:`grass_fx.explain`; if the model
            cannot be traced, it is what an eager forward saves.
        checkpointing: each layer is checkpointed. Not with ``inputs``, where the model decides.
        in_backward: plan for ``grass_fx.step_in_backward`` with layers that are compiled one by
            one. Then gradients exist for one layer at a time, where a layer is all parameters whose
            names agree up to the first number. In one graph of the whole model all exist together.
        gpus: processes of FSDP2, each with a GPU. They share weights, gradients and state; each has
            the activations of its own tokens, two gathered layers, and a layer's gradients.
        card: predict tokens/s of a regular step on this card, by ``inspect.speed``. That needs
            tokens and counted activations, one GPU, and bfloat16.
        frozen: patterns of the names of parameters that do not train, beside those of a module that
            need no gradient. Activations are counted as if they trained.
        options: the backend's options, without ``rank``.

    Raises:
        OptionError: nothing fits, no weight can be taken, or an argument is impossible.
    """
    available, options = parse_memory(memory), dict(options or {})
    if "rank" in options:
        raise OptionError("options: give rank as an argument of plan, or leave it to be found.")
    if optimizer not in MOMENTS:
        raise OptionError(f"optimizer={optimizer!r} is not known: {nearest(optimizer, [*MOMENTS])}")
    if not isinstance(gpus, int) or gpus < 1:
        raise OptionError(f"gpus={gpus!r} must be a number of processes, 1 or more.")
    config, moments = GrassConfig.from_options(options), MOMENTS[optimizer]
    setting = Setting(in_backward, gpus)
    notes = ["which weights are taken is an estimate, made without tracing the model"]
    buffers = sum(b.nbytes for b in model.buffers()) if isinstance(model, nn.Module) else 0
    parameters = frozen_by(frozen, candidates(model, config, dtype))
    batch = (1, tokens) if isinstance(tokens, int) else tokens
    tokens = None if batch is None else math.prod(batch)
    if isinstance(model, str) and tokens and activations is None and inputs is None:
        activations = of_decoder(decoder(model), tokens, (dtype or torch.bfloat16).itemsize)
    if checkpointing and not isinstance(activations, Activations):
        raise OptionError(
            "checkpointing: it counts only for a model that is known by name, with tokens, or for "
            "--hf. With inputs the model's own checkpointing counts."
        )
    saved_at, note = _activations(model, activations, inputs, checkpointing, options)
    notes += note
    names = [p.name for p in parameters]
    asked: Any = config.rank if rank is None else rank
    matrices = [p.name for p in parameters if len(p.shape) > 1]
    check_matched(replace(config, rank=asked).matched(names), matrices)
    sizes = [p.cost(config, 0).selected for p in parameters if p.candidate]
    if not sizes:
        raise OptionError("there is no linear weight to take: look at include and exclude.")

    def total_of(
        ranked: GrassConfig, parameters: list[Candidate], full: bool = False
    ) -> dict[str, int]:
        parts, _ = measure(parameters, ranked, moments, setting)
        if full:  # without scoring steps
            parts.pop("scoring step", None)
        parts |= {"buffers": buffers} if buffers else {}
        return with_activations(parts, saved_at(None if full else ranked))

    def parts_at(rank: Any) -> dict[str, int]:
        return total_of(replace(config, rank=rank), parameters)

    dense = [replace(p, candidate=False) for p in parameters]
    full = {name: n for name, n in total_of(config, dense, full=True).items() if n}
    searched = rank is None
    if rank is None:
        blocks = [config.of(p.name).block for p in parameters if p.candidate]
        fractions = _fractions(max(sizes), max(blocks))
        count = bisect.bisect_right(fractions, available, key=lambda f: sum(parts_at(f).values()))
        if count == 0 and sum(full.values()) > available:
            raise OptionError(
                f"memory={memory!r} is too little: the smallest rank, {fractions[0]:.6g}, needs "
                f"{sum(parts_at(fractions[0]).values()) / 1e9:.3f} GB. Use a smaller dtype, "
                "gradient checkpointing, fewer tokens, or layers compiled one by one with "
                "grass_fx.step_in_backward."
            )
        rank = fractions[max(count - 1, 0)]
    given: Any = rank
    config = replace(config, rank=given)
    _, taken = measure(parameters, config, moments, setting)
    if not taken:
        raise OptionError(f"rank={rank} exceeds the selected dimension of every weight.")
    flops = None
    if tokens is not None:
        multiplied = {p.name for p in parameters if p.multiplied}
        costs = [replace(cost, b=tokens) for name, cost in taken.items() if name in multiplied]
        flops = {
            "full rank": float(sum(cost.full_step_flops for cost in costs)),
            "subspace": float(sum(cost.step_flops for cost in costs)),
        }
        if any(cost.matrices > 1 for cost in costs):
            notes.append("each matrix of a stack is counted with all tokens, as if it met them all")
    if not config.lookups and not (searched and sum(full.values()) <= available):
        plain, compact = (
            sum(size for name, size in parts.items() if name != "optimizer step")
            for parts in (
                total_of(each, candidates(model, each, dtype))
                for each in (config, replace(config, lookups=True))
            )
        )
        if (saved := plain - compact) > 0:
            less = readable(saved, "bytes")
            notes.append(f"embeddings train dense; lookups=True takes them, {less} less")
    if gpus > 1:
        notes.append(
            f"weights, gradients and state are divided by {gpus}; activations are those of each GPU"
        )
    if in_backward:
        notes.append("gradients: as if layers were compiled one by one")
    if "gradient" in config.scores and config.scoring == "auto":
        notes.append('scoring="auto" is counted as "gradient"; on a GPU large gradients use tiles')
    speed = None
    if card is not None:
        whole = [(p, p.cost(config, moments)) for p in dense]
        ranked = [(p, taken.get(p.name, cost)) for p, cost in whole]
        weights = {"full rank": whole, "subspace": ranked}
        told = predicted(card, batch, weights, activations, checkpointing, gpus)
        if isinstance(told, Speed):
            speed = told
            notes.append(f"tokens/s are those of a regular step; {ERRORS}")
        else:
            notes.append(f"tokens/s are not predicted: {told}")
    largest = max(taken.values(), key=lambda cost: (cost.selected, cost.r))
    ranks = {name: cost.r for name, cost in taken.items()}
    return Plan(
        available, rank, largest.r, largest.selected, parts_at(rank), full, ranks, flops, (*notes,),
        searched, gpus, speed,
    )  # fmt: skip
