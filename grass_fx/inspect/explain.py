"""``grass_fx.explain`` reports what the backend "grass" does to a model, without training it."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from grass_fx.config import GrassConfig, check_matched
from grass_fx.errors import OptionError
from grass_fx.inspect.cost import MOMENTS, LinearCost
from grass_fx.inspect.findings import Cost, GraphNode, Saved, Subject, Weight
from grass_fx.inspect.kept import module_names
from grass_fx.inspect.paper import without_data
from grass_fx.inspect.report import Report
from grass_fx.inspect.text import readable

if TYPE_CHECKING:
    from grass_fx.inspect.tracing import TracedGraph, TracedWeight
    from grass_fx.passes.signature import LinearWeight

__all__ = ["Cost", "GraphNode", "Report", "Weight", "explain"]


def explain(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Trace ``model(*args, **kwargs)`` as the backend "grass" would, and report what changes.

    Graphs are traced, differentiated and rewritten, but no code is generated for them. This takes
    seconds even where Inductor takes minutes. The model's forward runs once, without gradients, on
    the given inputs. On the meta device it is traced as on a CPU, and allocates nothing. Weights,
    gradients, buffers, random generators and selections stay as they are.

    Amounts "before" are those of the same graphs at full rank. FLOPs and traffic count only matrix
    products with weights (docs/method.md, "What follows from the equations"). Optimizer state is
    that of AdamW. The all-reduce is a ring over the initialised process group, or over two
    processes if there is none.

    Args:
        model: a module, compiled or not, in the mode (train, autocast) in which it will train.
        options: the backend's options, as for ``torch.compile``.
        dynamic: as for ``torch.compile``; with symbolic sizes, amounts are sympy expressions.

    Raises:
        OptionError: an option is impossible, gradients are disabled, or the model is sharded.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"explain: {type(model).__name__} is no torch.nn.Module.")
    if not torch.is_grad_enabled():
        raise OptionError("explain: gradients are disabled here, and nothing would be rewritten.")
    model = getattr(model, "_orig_mod", model)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise OptionError(
            "explain: the model's parameters are sharded. Call explain before fully_shard: the "
            "same weights are rewritten, and amounts are those of all processes together."
        )
    config = GrassConfig.from_options(options)
    named = [*model.named_parameters()]
    matrices = [name for name, p in named if p.dim() > 1]
    check_matched(config.matched(name for name, _ in named), matrices)
    subject = _subject(model, _tensors((args, kwargs)))
    from grass_fx._torch_compat import compiled_apart

    with contextlib.ExitStack() as stack:
        if any(p.is_meta for p in model.parameters()):
            model, args, kwargs = stack.enter_context(without_data(model, args, kwargs))
        watcher = _Watcher(model, config, _tensors((args, kwargs)))
        stack.enter_context(_left_as_it_is(model))
        compiled = stack.enter_context(compiled_apart(_call, watcher, dynamic))
        compiled(model, args, kwargs)
        return watcher.report(model, subject, dict(options or {}))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _subject(model: nn.Module, inputs: Sequence[Tensor]) -> Subject:
    return Subject(
        type(model).__name__,
        tuple(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs),
        ", ".join(dict.fromkeys(str(p.device) for p in model.parameters())) or "cpu",
        datetime.date.today().isoformat(),
        {"grass-fx": version("grass-fx"), "torch": torch.__version__},
    )


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


@contextlib.contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Undo a forward's changes to buffers and random generators."""
    from grass_fx._torch_compat import is_fake

    registered = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not (b.is_meta or is_fake(b))]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices} or {"cuda"}
    indices = [device.index or 0 for device in devices]
    try:
        with torch.random.fork_rng(devices=indices, device_type=min(kinds)):
            yield
    finally:
        for module, names in registered:
            module._buffers.clear()
            module._buffers.update(names)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # others may overlap themselves: expanded
                    buffer.copy_(before)


@dataclass
class _Found:
    """What all graphs together do with a parameter."""

    traced: list[TracedWeight] = field(default_factory=list)

    @property
    def taken(self) -> LinearWeight | None:
        """The first graph's description of it as a taken weight; None if no graph takes it."""
        return next((t.taken for t in self.traced if t.taken is not None), None)

    @property
    def reason(self) -> str:
        """Why it is not pushed, from every graph that does not push it."""
        if not self.traced:
            return "in no compiled training graph"
        return "; ".join(dict.fromkeys(t.reason for t in self.traced if t.reason))


class _Watcher:
    """A Dynamo backend that analyses graphs instead of compiling them."""

    def __init__(self, model: nn.Module, config: GrassConfig, given: Sequence[Any]) -> None:
        self.config = config
        self.found = {p: _Found() for p in model.parameters()}
        self.names: dict[Tensor, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(p, []).append(name)
        self.symbols: dict[str, int | None] = {}
        self.graphs: set[int] = set()
        self.kept: list[dict[str | None, Any]] = [{}, {}]  # bytes by module, before and after
        self.makers: dict[StorageWeakRef, str | None] = {}  # storages of graphs' outputs -> modules
        owned = {_storage(t) for t in (*model.parameters(), *model.buffers(), *given)}
        self.seen = [owned, set(owned)]  # storages that no longer count as kept, before and after

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from grass_fx._torch_compat import module_source
        from grass_fx.inspect.tracing import trace

        graph = trace(gm, inputs, self.config)
        if graph is not None:
            self._tell_apart(graph)

        def run(*args: Any) -> Any:
            name_of = self._note(graph, args) if graph is not None else None
            with torch.no_grad():
                outputs = gm(*args)
            for out, maker in zip(outputs, makers, strict=True):
                if isinstance(out, Tensor):
                    self.makers[_storage(out)] = name_of(maker) if name_of else None
            return [
                out.detach().requires_grad_() if needs and not out.requires_grad else out
                for out, needs in zip(outputs, needed, strict=True)
            ]

        results = cast("Sequence[Any]", gm.graph.output_node().args[0])
        needed = [
            getattr(getattr(node, "meta", {}).get("example_value"), "requires_grad", False)
            for node in results
        ]
        makers = [module_source(node) if isinstance(node, fx.Node) else "" for node in results]
        return run

    def _tell_apart(self, graph: TracedGraph) -> None:
        """Rename symbols that mean other sizes in this graph than in the graphs before it.

        A graph names symbols after its own arguments, so two graphs can use one name for two sizes.
        """
        new = {}
        for name, value in graph.symbols.items():
            free = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(1)))
            new[name] = next(other for other in free if self.symbols.get(other, value) == value)
            self.symbols[new[name]] = value
        graph.rename({name: other for name, other in new.items() if name != other})

    def _note(self, graph: TracedGraph, args: Sequence[Any]) -> Callable[[str], str | None]:
        """Add one call of a graph to the findings; many layers may call the same graph.

        It returns the function from places in the graph's frame to names of modules.
        """
        self.graphs.add(id(graph))
        name_of = module_names(
            {source: self.names.get(args[place], []) for place, source in graph.sources.items()}
        )
        for place, traced in graph.weights.items():
            if args[place] in self.found:
                self.found[args[place]].traced.append(traced)
        for k, kept in enumerate((graph.before, graph.after)):
            amounts = [(name_of(source), size) for source, size in kept.made_by.items()]
            for value in (args[place] for place in kept.inputs if place < len(args)):
                if isinstance(value, Tensor) and (at := _storage(value)) not in self.seen[k]:
                    self.seen[k].add(at)
                    amounts.append((self.makers.get(at), value.untyped_storage().nbytes()))
            for name, size in amounts:
                self.kept[k][name] = self.kept[k].get(name, 0) + size
        return name_of

    def report(self, model: nn.Module, subject: Subject, options: Mapping[str, Any]) -> Report:
        """The report on everything that was found."""
        weights, transient, scores = [], [0], 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            found = self.found[parameter]
            weights.append(_weight(name, parameter, found))
            if found.taken is not None and found.taken.spec.scores:
                transient += [traced.scoring_step for traced in found.traced]
                scores += 4 * found.taken.spec.rows
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        order = [name for name, _ in model.named_modules(remove_duplicate=False)]
        before, after = self.kept
        saved = [
            Saved(name, before.get(name, 0), after.get(name, 0))
            for name in dict.fromkeys([*order, *before, *after])
            if name in before or name in after
        ]
        saved.sort(key=lambda row: row.module is None)
        return Report(
            subject, tuple(weights), held, (sum(before.values()), sum(after.values())),
            tuple(saved), max(transient) + scores, len(self.graphs), dict(options), self.symbols,
        )  # fmt: skip


def _storage(tensor: Tensor) -> StorageWeakRef:
    """A key for the tensor's memory, which no other memory has as long as the key exists."""
    return StorageWeakRef(tensor.untyped_storage())


def _weight(name: str, parameter: Tensor, found: _Found) -> Weight:
    """A parameter's costs: its products in the graphs, its gradient, state and all-reduce."""
    count, itemsize, ranks = parameter.numel(), parameter.itemsize, _ranks()
    full = LinearCost(m=count, n=1, r=1, itemsize=itemsize, moments=MOMENTS["adamw"], ranks=ranks)
    before = after = Cost(
        gradient=full.full_gradient_bytes,
        state=full.full_state_bytes,
        all_reduce=int(full.full_all_reduce_bytes),
    )
    for traced in found.traced:
        before, after = before + traced.before, after + traced.after
    weight = Weight(
        name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), "dense",
        found.reason, before=before, after=after,
    )  # fmt: skip
    lookups = [traced.lookup for traced in found.traced]
    spec = lookups[0] if lookups and all(lookups) else None
    if found.taken is not None:
        spec = found.taken.spec
    if spec is None:
        return weight
    stack = spec.stack or 1
    compact = replace(
        full, m=count // (stack * spec.size), n=spec.size, r=spec.rank, matrices=stack,
        replacement=spec.replacement, signs_every=spec.rest,
    )  # fmt: skip
    if found.taken is None:
        sizes = before.gradient + before.state, compact.gradient_bytes + compact.state_bytes
        saving = " -> ".join(readable(size, "bytes") for size in sizes)
        return replace(weight, reason=f"{weight.reason}, gradient and state {saving}")
    taken = next(traced for traced in found.traced if traced.taken is not None)
    return replace(
        weight,
        status="taken" if found.reason else "pushed",
        side=spec.side,
        rank=spec.rank,
        selects="rows" if spec.dim == (spec.stack is not None) else "columns",
        kernel=taken.kernel,
        pictures=taken.pictures,
        after=replace(
            after,
            gradient=compact.gradient_bytes + compact.sign_bytes,
            state=compact.state_bytes,
            all_reduce=int(compact.all_reduce_bytes + compact.votes_bytes),
        ),
    )


def _ranks() -> int:
    """The processes in an all-reduce: the size of the initialised process group, or 2."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 2
