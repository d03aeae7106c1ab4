"""The code of a training step for a GPU, forward and backward, by all of Inductor's passes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import fx, nn
from torch._inductor import config
from torch._inductor.fx_passes import pad_mm
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from grass_fx._torch_compat import AFTER, BEFORE, compile_aot_eager
from grass_fx.compile import lowering
from grass_fx.config import GrassConfig
from grass_fx.passes.pipeline import JOINT, LATE, GrassPasses, prepare
from grass_fx.testing.virtual_gpu import Generated, Module, code_for_gpu, move_to_gpu


def training_code(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    options: Mapping[str, Any] | None = None,
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
    settings = {"compile_threads": 1, "force_disable_caches": True}
    settings |= {"shape_padding": pads, "force_shape_pad": pads}

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        slots: dict[str, Any] = {}
        if options is not None:
            tapped = prepare(gm, given, GrassConfig.from_options(options), scoring)
            gm, given, facts = tapped.graph, tapped.inputs, tapped.facts
            lowering.register()
            slots[BEFORE] = GrassPasses(facts, passes=JOINT)
            slots[AFTER] = GrassPasses(facts, passes=LATE)

        def optimize(graph: fx.Graph) -> None:
            always: dict[str, Any] = {"check_device": lambda a, b: True, "has_triton": lambda: True}
            with config.patch({**settings, **slots}), mock.patch.multiple(pad_mm, **always):
                joint_graph_passes(cast(fx.GraphModule, graph.owning_module), torch.device("cpu"))
            move_to_gpu(graph)

        def generate(forward: fx.GraphModule, backward: fx.GraphModule) -> None:
            with config.patch(settings):
                modules.append(code_for_gpu(forward))
                modules.append(code_for_gpu(backward, is_backward=True))
            raise Generated

        return compile_aot_eager(gm, given, optimize, on_partition=generate)

    torch._dynamo.reset()
    with contextlib.suppress(Generated):
        torch.compile(model, backend=backend, dynamic=False)(*inputs)
    return modules
