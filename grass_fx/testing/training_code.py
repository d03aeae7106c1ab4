"""The code of a training step for a GPU, forward and backward, by all of Inductor's passes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import fx, nn
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_passes import pad_mm
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor

from grass_fx._torch_compat import AFTER, BEFORE, compile_aot_eager
from grass_fx.compile import lowering
from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.pipeline import JOINT, LATE, GrassPasses, find, tapped
from grass_fx.passes.signature import Signature, Variant
from grass_fx.testing.virtual_gpu import Module, virtual_gpu


class _Generated(BaseException):
    """Ends a compilation whose code is there, because nothing here can load it."""


def training_code(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    options: Mapping[str, Any] | None = None,
    patches: Mapping[str, Any] | None = None,
    pads: bool = False,
    scoring: bool = False,
) -> list[Module]:
    """What Inductor generates for the forward and the backward of ``model(*inputs)`` on a GPU.

    ``model`` and ``inputs`` are on a CPU, or in a ``FakeTensorMode``. ``options`` are those of the
    backend "grass"; None: the code of Inductor alone. ``pads``: whether Inductor pads products
    whose sizes are no multiples of 16 bytes; on a GPU it decides by measuring each. ``scoring``:
    the variant with scores. The joint graph is one of a CPU until Inductor's passes on it have run,
    since torch without CUDA cannot slice fake CUDA tensors.
    """
    modules: list[Module] = []
    settings = {**(patches or {}), "compile_threads": 1, "force_disable_caches": True}
    settings |= {"shape_padding": pads, "force_shape_pad": pads}

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        slots: dict[str, Any] = {}
        if options is not None:
            gm, given, slots = _tapped(gm, given, options, scoring)

        def optimize(graph: fx.Graph) -> None:
            always: dict[str, Any] = {"check_device": lambda a, b: True, "has_triton": lambda: True}
            with config.patch({**settings, **slots}), mock.patch.multiple(pad_mm, **always):
                joint_graph_passes(cast(fx.GraphModule, graph.owning_module), torch.device("cpu"))
            _move_to_gpu(graph)

        def generate(forward: fx.GraphModule, backward: fx.GraphModule) -> None:
            modules.extend(_code(part, settings, part is backward) for part in (forward, backward))
            raise _Generated

        return compile_aot_eager(gm, given, optimize, on_partition=generate)

    torch._dynamo.reset()
    with contextlib.suppress(_Generated):
        torch.compile(model, backend=backend, dynamic=False)(*inputs)
    return modules


def _tapped(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], scoring: bool
) -> tuple[fx.GraphModule, Sequence[Any], dict[str, Any]]:
    """The tapped graph, its inputs, and Inductor's options for our passes, as the backend does."""
    of = GrassConfig.from_options(options)
    signature = Signature(find(gm, DynamoFacts(of, inputs)).taken, len(inputs))
    graph, extended = tapped(gm, TapFacts(of, inputs, signature, Variant(scoring)))
    facts = JointFacts.of(of, signature)
    lowering.register()
    slots = {BEFORE: GrassPasses(facts, passes=JOINT), AFTER: GrassPasses(facts, passes=LATE)}
    return graph, extended, slots


def _move_to_gpu(graph: fx.Graph) -> None:
    def moved(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )

    with virtual_gpu():
        for node in graph.nodes:
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta.get("val"))
            node.meta.pop("tensor_meta", None)
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("cuda", 0))


def _code(gm: fx.GraphModule, patches: dict[str, Any], backward: bool) -> Module:
    codes: list[str] = []

    def keep(code: Any) -> None:
        codes.append(code)
        raise _Generated

    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    fake_mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    state: dict[str, Any] = {
        "get_rng_state": lambda: torch.zeros(1),
        "set_rng_state": lambda state: None,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(_Generated))
        stack.enter_context(virtual_gpu())
        stack.enter_context(mock.patch.multiple(torch.cuda, **state))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", keep))
        stack.enter_context(V.set_fake_mode(fake_mode))
        stack.enter_context(config.patch(patches))
        compile_fx_inner(gm, inputs, is_backward=backward)
    return Module(codes[0])
