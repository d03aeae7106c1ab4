"""Finds out how an optimizer class X behaves, by stepping X on weights of one number.

Few classes tell how they decay a weight or what an entry of their state means, and names mislead.
These steps have no side effects: they call no hooks, draw none of the run's random numbers, show no
warnings and compile nothing. They run on the CPU.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.optim.optimizer as torchs
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from grass_fx.config import SUBSPACE_DEFAULTS

T = TypeVar("T")

Make = Callable[..., Optimizer]
"""``make(parameters, **options)`` makes a new X over these, with some options changed."""

STEPS = 8
"""Steps of a probe: enough to see what X does only in every fifth or sixth step."""


Start = Literal["zero", "weight", "average", "own"]


@dataclass(frozen=True)
class Entry:
    """The meaning of an entry of X's state that has the weight's shape."""

    start: Start
    """What the entry starts from: "zero", as moments do; "weight", the weight itself; or "own",
    anything else. "average" is an average of the weight that starts from zero, while X's state does
    not count how far it has come.
    """
    power: int | None
    """The power of the gradient's scale with which the entry scales, or None."""
    moves: bool
    """Whether an entry that holds weights moves with X's steps, as the weight does."""


@dataclass(frozen=True)
class Wrapped:
    """A class X and its constructor's arguments; ``known`` caches what was found out about it."""

    inner: type[Optimizer]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    known: dict[Hashable, Any]

    def make(self, params: Sequence[Tensor], group: Mapping[str, Any], **changed: Any) -> Optimizer:
        """Return an X over these parameters, with a group's options, some of them changed."""
        options = copy.deepcopy(options_of(group))  # X may count steps in them, also in tensors
        options |= {k: v for k, v in changed.items() if options.get(k) is not None}
        return self.inner([{**options, "params": list(params)}], *self.args, **self.kwargs)

    def ask(self, question: Callable[[Make], T], group: Mapping[str, Any]) -> T:
        """Answer one of the questions below; groups of one kind share an answer, asked once."""
        arguments = {"": self.args, " ": tuple(self.kwargs.items())}
        key = question, kind_of({**options_of(group), **arguments})
        if key not in self.known:
            with _unnoticed():
                self.known[key] = question(partial(self.make, group=group))
        return self.known[key]

    def shrink(self, group: Mapping[str, Any]) -> float:
        """1 − lr·λ if X's weight decay is decoupled, else 1: L2 decay is part of the gradient."""
        if not group.get("weight_decay") or group.get("lr") is None:
            return 1.0
        decoupled = group.get("decoupled_weight_decay")
        if decoupled is None:
            decoupled = self.ask(is_decoupled, group)
        return 1 - float(group["lr"]) * group["weight_decay"] if decoupled else 1.0

    def ignores_weights(self, group: Mapping[str, Any]) -> bool:
        """Whether X is known never to look at a weight, except to decay it beside its step.

        Steps can only show that a class looks, not that it never will. So besides them it is asked
        for torch's own classes, in which all steps are alike.
        """
        torchs_own = self.inner.__module__.startswith("torch.optim.")
        return torchs_own and self.ask(moves_alike, group)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return X's own options among a group's."""
    ours = ("params", "param_names", *SUBSPACE_DEFAULTS)
    return {name: value for name, value in group.items() if name not in ours}


def kind_of(options: Mapping[str, Any]) -> Hashable:
    """Return the options that decide how X works: which ones are on, not their values."""
    return tuple(sorted((name, _on(value)) for name, value in options.items()))


def _on(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value != 0
    if isinstance(value, (list, tuple)):
        return tuple(map(_on, value))
    return type(value).__name__


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return X's step without the hooks that torch puts around it."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


@contextmanager
def _unnoticed() -> Iterator[None]:
    # A class that calls its base's step also calls the base's hooks, so all are removed meanwhile.
    hooks: list[dict[int, Any]] = [
        torchs._global_optimizer_pre_hooks,
        torchs._global_optimizer_post_hooks,
    ]
    kept = [dict(table) for table in hooks]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        warnings.simplefilter("ignore")
        for table in hooks:
            table.clear()
        try:
            yield
        finally:
            for table, former in zip(hooks, kept, strict=True):
                table.update(former)


def _weight(value: float) -> Parameter:
    return Parameter(torch.full((1, 1), value, dtype=torch.float32, device="cpu"))


def _step(optimizer: Optimizer, gradients: Sequence[tuple[Parameter, float]]) -> None:
    for w, gradient in gradients:
        w.grad = torch.full_like(w, gradient)
    unhooked(type(optimizer).step)(optimizer)


@dataclass(frozen=True)
class _Seen:
    """The result of some steps of X on a weight of one number."""

    weight: float
    former: float
    """The weight before the last step."""
    values: dict[str, float]
    """The entries of the weight's shape."""
    counts: bool
    """Whether the state also holds numbers, such as a count."""


def _after(make: Make, weight: float, gradient: float) -> _Seen:
    w = _weight(weight)
    optimizer = make([w], lr=0.1, weight_decay=0.0)
    for _ in range(STEPS):
        former = w.item()
        _step(optimizer, [(w, gradient)])
    state = optimizer.state[w]
    values = {
        name: value.item()
        for name, value in state.items()
        if type(value) is Tensor and value.shape == w.shape and value.is_floating_point()
    }
    numbers = [value for value in state.values() if isinstance(value, (int, float, Tensor))]
    counts = any(not isinstance(value, Tensor) or value.dim() == 0 for value in numbers)
    return _Seen(w.item(), former, values, counts)


def entries(make: Make) -> dict[str, Entry]:
    """The entries of the weight's shape, by name; {} if X cannot step a weight of one number."""
    try:
        still, still_other = _after(make, 1.0, 0.0), _after(make, 2.0, 0.0)
        single, other = _after(make, 1.0, 1.0), _after(make, 2.0, 1.0)
        double = _after(make, 1.0, 2.0)
    except Exception:  # X may reject a weight of one number in any way
        return {}
    found = {}
    for name in single.values.keys() & other.values.keys() & double.values.keys():
        at_rest, value = still.values.get(name, 0.0), single.values[name]
        follows = still_other.values.get(name, 0.0) - at_rest
        start: Start = "own"
        if any(math.isclose(by, 1, abs_tol=1e-3) for by in (follows, other.values[name] - value)):
            start = "weight"
        elif at_rest == 0 and max(abs(follows), abs(other.values[name] - value)) < 1e-3:
            start = "zero"
        elif not still.counts and still.weight == 1 and 0 < follows < 1:
            # Only the weight differs, and it has not moved: a moment with L2 decay would move it.
            start = "average" if math.isclose(at_rest, follows, rel_tol=1e-3) else "own"
        power = 1 if start == "weight" else _power(value, double.values[name])
        found[name] = Entry(start, power, moves=value != single.former)
    return found


def group_counts(make: Make) -> tuple[str, ...]:
    """Return the options of X's group in which X counts its steps."""

    def numbers() -> dict[str, int]:
        group = optimizer.param_groups[0]
        return {name: value for name, value in group.items() if type(value) is int}

    w = _weight(1.0)
    try:
        optimizer = make([w], lr=0.1)
        _step(optimizer, [(w, 1.0)])
        before = numbers()
        _step(optimizer, [(w, 1.0)])
    except Exception:
        return ()
    return tuple(name for name, value in numbers().items() if value == before.get(name, value) + 1)


def _power(single: float, double: float) -> int | None:
    """Return p if ``double`` = ``single`` · 2^p, where ``double`` is for doubled gradients."""
    ratio = double / single if single else 0.0
    if not ratio > 0 or math.isinf(ratio):
        return None
    power = math.log2(ratio)
    return round(power) if abs(power - round(power)) < 0.05 else None


def keeps_elsewhere(make: Make) -> str | None:
    """Where X keeps a tensor of a weight's shape besides its state, or None.

    X's attributes, its groups and the parameter's attributes are looked through after a step.
    """
    w = Parameter(torch.ones(3, 5, dtype=torch.float32, device="cpu"))  # a shape of nothing else
    optimizer = make([w])
    w.grad = torch.ones_like(w)
    try:
        unhooked(type(optimizer).step)(optimizer)
    except Exception:  # a class that steps no such weight says so where it is used
        return None
    own = ("state", "param_groups", "defaults")
    attributes = {k: v for k, v in vars(optimizer).items() if k not in own}
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for where, values in (
        ("its attribute", attributes),
        ("its groups' entry", group),
        ("the parameter's attribute", vars(w)),
    ):
        for name, value in values.items():
            if any(t.shape == w.shape and t is not w and t is not w.grad for t in _tensors(value)):
                return f"{where} {name!r}"
    return None


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in a value, and in what it holds."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        held: Iterable[Any] = ()
        if isinstance(value, Mapping):
            held = [*value.values()]
        elif isinstance(value, (list, tuple, set, deque)):  # an iterator would be used up
            held = value
        elif not callable(value):
            held = [*getattr(value, "__dict__", {}).values()]
        for item in held:
            yield from _tensors(item, depth - 1)


def is_decoupled(make: Make) -> bool:
    """Whether X's weight decay acts beside its step, not through the gradient."""

    def stepped(gradient: float, decay: float) -> float:
        """The weight after a step with these and one with zeros, which shows the first's effect."""
        w = _weight(1.0)
        optimizer = make([w], lr=0.1, weight_decay=decay)
        _step(optimizer, [(w, gradient)])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        _step(optimizer, [(w, 0.0)])
        return w.item()

    maximize = make([_weight(1.0)]).param_groups[0].get("maximize")
    decayed, decay = stepped(1.0, 0.5), -0.5 if maximize else 0.5
    beside = math.isclose(decayed, stepped(1.0, 0.0) - 0.1 * 0.5, abs_tol=1e-4)
    within = math.isclose(decayed, stepped(1.0 + decay, 0.0), abs_tol=1e-4)
    return beside and not within


def moves_alike(make: Make) -> bool:
    """Whether X moves a weight by as much wherever it is, apart from decoupled weight decay."""
    make = partial(make, capturable=False)  # which the CPU does not have
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here, at_zero = Parameter(draw(6, 4)), Parameter(torch.zeros(6, 4, dtype=torch.float64))
    try:
        changed = {"weight_decay": 0.0} if is_decoupled(make) else {}
        optimizers = [make([w], **changed) for w in (here, at_zero)]
        for _ in range(STEPS):
            before, gradient = here.detach().clone(), draw(6, 4)
            at_zero.detach().zero_()
            for w, optimizer in zip((here, at_zero), optimizers, strict=True):
                w.grad = gradient.clone()
                unhooked(type(optimizer).step)(optimizer)
            if not torch.allclose(before + at_zero, here, rtol=1e-12, atol=1e-14):
                return False
    except Exception:  # a class that steps no such weight is given the weight itself
        return False
    return True


def keeps_its_size(make: Make) -> bool:
    """Whether X's steps are as large if all gradients are larger, as Adam's are and SGD's are not.

    Asked of a vector of one number: classes for matrices alone, such as Muon, do not step it.
    """
    moved = []
    for gradient in (1.0, 4.0):
        w = Parameter(torch.ones(1, dtype=torch.float32, device="cpu"))
        try:
            optimizer = make([w], lr=1e-2, weight_decay=0.0)
            for _ in range(3 * STEPS):  # RAdam's first steps are SGD's
                former = w.item()
                _step(optimizer, [(w, gradient)])
        except Exception:  # X may reject such a weight in any way
            return False
        moved.append(abs(w.item() - former))
    return moved[0] > 0 and 0.5 < moved[1] / moved[0] < 2


def narrow_entries(make: Make) -> frozenset[str]:
    """The entries that X keeps in bfloat16 for a bfloat16 weight; others it keeps in float32."""
    w = Parameter(torch.ones(3, 5, dtype=torch.bfloat16, device="cpu"))
    try:
        optimizer = make([w])
        w.grad = torch.ones_like(w)
        unhooked(type(optimizer).step)(optimizer)
    except Exception:  # X may reject such a weight in any way
        return frozenset()
    state = optimizer.state[w]
    return frozenset(name for name, value in state.items() if is_narrow(value))


def is_narrow(value: Any) -> bool:
    """Whether an entry of X's state is a plain tensor of bfloat16."""
    return type(value) is Tensor and value.dtype == torch.bfloat16


def steps_together(make: Make) -> bool:
    """Whether X can step parameters with state and parameters without state in one call."""
    old, new = _weight(1.0), _weight(1.0)
    optimizer = make([old, new])
    try:
        _step(optimizer, [(old, 1.0)])
        _step(optimizer, [(old, 1.0), (new, 1.0)])
    except Exception:  # any reason: stepping them separately is always right
        return False
    return True


def steps_parts_alike(make: Make) -> bool:
    """Whether X steps each half of a weight as it steps the whole: then it can step shards.

    As in processes, each half has an optimizer of its own. Gradients are small and large, because
    a class may clip them.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = draw(6, 4)
    weights = [Parameter(part.clone()) for part in (start, *start.chunk(2))]
    optimizers = [make([w], capturable=False) for w in weights]
    try:
        for scale in (1.0, 1e-3, 1e4):
            whole = scale * draw(6, 4)
            for w, grad in zip(weights, (whole, *whole.chunk(2)), strict=True):
                w.grad = grad.clone()
            for optimizer in optimizers:
                unhooked(type(optimizer).step)(optimizer)
    except Exception:  # a class that steps no such weight cannot step shards of one
        return False
    return torch.allclose(weights[0], torch.cat(weights[1:]), rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
