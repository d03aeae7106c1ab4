"""Generates, compiles and checks Inductor's code for a GPU on a machine without one.

Inductor generates its module from fake CUDA tensors and a device interface that answers like an
H100. Triton compiles each kernel for sm_80 and sm_90, since only a launch needs a driver. Triton's
interpreter runs kernels on the CPU (except in bfloat16, which triton 3.7.1 computes wrongly there).

This is for tests and needs ``triton``. It patches torch during a ``with`` block; nothing else in
this project may do that.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._triton import has_triton

from grass_fx._torch_compat import (
    compile_aot_eager,
    fake_mode_of,
    trace_static,
)
from grass_fx.compile import lowering
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.passes.observers import PushReport
from grass_fx.passes.pipeline import GrassPasses, prepare
from grass_fx.passes.signature import REGULAR
from grass_fx.testing.kernels import Kernel, kernel_of

H100 = types.SimpleNamespace(
    name="virtual H100", gcnArchName="", major=9, minor=0, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    warp_size=32, total_memory=80 << 30, shared_memory_per_block_optin=232448, clock_rate=1980000,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
)  # fmt: skip


def _named_target() -> Any:
    """A Triton driver that knows its target but cannot launch kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class NamedTarget(DriverBase):
        def __init__(self) -> None:
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> Any:
            raise RuntimeError("a virtual GPU measures nothing")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

    return NamedTarget()


@dataclass(frozen=True)
class Measured:
    """A choice that autotuning compares."""

    name: str
    made: Mapping[int, tuple[int, ...]]
    """Position -> shape of each input that a function makes; Inductor fills the other inputs."""


@contextlib.contextmanager
def virtual_gpu(props: Any = H100) -> Iterator[list[Measured]]:
    """Make torch believe that there is one CUDA device, on which the first choice is the fastest.

    Yields the list that receives all choices that autotuning compares.
    """
    import triton

    cuda, worker = device_interface.CudaInterface, device_interface.CudaInterface.Worker

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    def in_order(
        cls: Any, /, choices: Any, input_nodes: Any, layout: Any, input_gen_fns: Any, **options: Any
    ) -> dict[Any, float]:
        makers = (input_gen_fns or {}).items()
        with V.fake_mode:
            shapes = {k: tuple(make(input_nodes[k]).shape) for k, make in makers}
        measured.extend(Measured(choice.name, shapes) for choice in choices)
        return {choice: 1.0 + k for k, choice in enumerate(choices)}

    measured: list[Measured] = []

    patches = [
        (torch.cuda, "is_available", always(True)), (torch.cuda, "device_count", always(1)),
        (torch.cuda, "current_device", always(0)), (torch.cuda, "_lazy_init", always(None)),
        (torch.cuda, "get_device_properties", always(props)),
        (torch.cuda, "get_device_capability", always((props.major, props.minor))),
        (torch.cuda, "get_device_name", always(props.name)),
        (torch.cuda, "is_bf16_supported", always(True)), (torch.cuda, "synchronize", always(None)),
        (torch.cuda, "device", nothing), (torch.cuda, "_DeviceGuard", nothing),
        (torch.version, "cuda", "12.8"), (fake_tensor, "init_gpu_context", always(None)),
        (worker, "get_device_properties", staticmethod(always(props))),
        (cuda, "get_device_properties", staticmethod(always(props))),
        (cuda, "current_device", staticmethod(always(0))),
        (cuda, "is_available", staticmethod(always(True))),
        (cuda, "get_compute_capability", staticmethod(always(10 * props.major + props.minor))),
        (cuda, "device", nothing), (cuda, "synchronize", staticmethod(always(None))),
        (AlgorithmSelectorCache, "benchmark_in_current_process", classmethod(in_order)),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        raw_stream = mock.patch.object(
            torch._C, "_cuda_getCurrentRawStream", always(0), create=True
        )
        stack.enter_context(raw_stream)
        triton.runtime.driver.set_active(_named_target())
        has_triton.cache_clear()  # the cached answer may be from before, without a GPU
        stack.callback(has_triton.cache_clear)
        yield measured


@dataclass(frozen=True)
class Module:
    """What Inductor generated for one graph."""

    code: str
    measured: Sequence[Measured] = ()
    """The choices that autotuning compared."""

    @property
    def kernels(self) -> list[Kernel]:
        """The Triton kernels, in the order of the code."""
        found = re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", self.code, re.S)
        return [kernel_of(name, body) for name, body in found]

    @property
    def buffers(self) -> list[tuple[str, ...]]:
        """Shapes of everything the module allocates; sizes are text, since some are symbols."""
        shapes = re.findall(r"empty_strided(?:_cuda)?\(\((.*?)\), \(", self.code)
        return [tuple(d.strip() for d in shape.split(",") if d.strip()) for shape in shapes]

    @property
    def extern_calls(self) -> list[str]:
        """Calls of library kernels, such as ``mm``."""
        return re.findall(r"^\s+extern_kernels\.(\w+)\(", self.code, re.M)


Like = torch.Tensor | torch.SymInt | tuple[Sequence[int | str], torch.dtype]
"""An input: a tensor, a symbolic number of a traced graph, or (shape, dtype), where a string in
the shape is a symbolic size."""


def fake_inputs(
    likes: Sequence[Like], hint: int = 8192
) -> tuple[FakeTensorMode, list[torch.Tensor | torch.SymInt]]:
    """Make fake CUDA tensors, and leave symbolic numbers as they are."""
    mode = detect_fake_mode(likes)  # symbols are valid only in the ShapeEnv they come from
    env = ShapeEnv() if mode is None or mode.shape_env is None else mode.shape_env
    fake = FakeTensorMode(shape_env=env)
    symbols: dict[str, Any] = {}

    def size(each: int | str) -> Any:
        if isinstance(each, int):
            return each
        if each not in symbols:
            from torch._dynamo.source import ConstantSource

            symbol = env.create_symbol(
                hint, ConstantSource(each), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            symbols[each] = env.create_symintnode(symbol, hint=hint)
        return symbols[each]

    inputs: list[torch.Tensor | torch.SymInt] = []
    with fake:
        for like in likes:
            if isinstance(like, torch.SymInt):
                inputs.append(like)
                continue
            if isinstance(like, torch.Tensor):
                strides = like.stride()
                tensor = torch.empty_strided(like.shape, strides, device="cuda", dtype=like.dtype)
            else:
                tensor = torch.empty([size(d) for d in like[0]], device="cuda", dtype=like[1])
            inputs.append(tensor)
    return fake, inputs


def generate(
    function: Callable[..., Any],
    likes: Sequence[Like],
    max_autotune: bool = False,
    hint: int = 8192,
) -> Module:
    """Let Inductor generate a module for ``function`` of CUDA tensors."""
    patches = {
        "max_autotune": max_autotune,
        "compile_threads": 1,
        "benchmark_epilogue_fusion": False,
        # Code for a virtual GPU must not be found in a cache later.
        "force_disable_caches": True,
        "autotune_local_cache": False,
    }
    with virtual_gpu() as measured:
        lowering.register()
        fake, inputs = fake_inputs(likes, hint)
        with fake:
            if isinstance(function, fx.GraphModule):
                function = fx.Interpreter(function).run
            gm = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        graph = GraphLowering(gm, example_inputs=inputs, shape_env=fake.shape_env)
        debug = V.set_debug_handler(DebugContext())
        with V.set_fake_mode(fake), config.patch(patches), V.set_graph_handler(graph), debug:
            graph.run(*inputs)
            code: Any = graph.codegen()[0]
    return Module(getattr(code, "value", code), measured)


class Generated(BaseException):
    """Ends a compilation whose code is there, because nothing here can load it."""


def move_to_gpu(graph: fx.Graph) -> None:
    """Let the fake tensors of a CPU's graph be those of a GPU."""

    def moved(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        shape, strides = value.shape, value.stride()
        with value.fake_mode:
            return torch.empty_strided(shape, strides, dtype=value.dtype, device="cuda")

    with virtual_gpu():
        for node in graph.nodes:
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta.get("val"))
            node.meta.pop("tensor_meta", None)
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("cuda", 0))


def code_for_gpu(gm: fx.GraphModule, **kwargs: Any) -> Module:
    """What Inductor generates for a CPU's graph on a GPU; ``kwargs`` are those of its compiler."""
    from torch._inductor.compile_fx import compile_fx_inner

    codes: list[str] = []

    def keep(code: Any) -> None:
        codes.append(code)
        raise Generated

    move_to_gpu(gm.graph)
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    no_state = mock.patch.multiple(
        torch.cuda, get_rng_state=lambda: torch.zeros(1), set_rng_state=lambda state: None
    )
    kept = mock.patch.object(GraphLowering, "save_output_code", keep)
    fake = V.set_fake_mode(fake_mode_of(inputs))
    with contextlib.suppress(Generated), virtual_gpu(), no_state, kept, fake:
        compile_fx_inner(gm, inputs, **kwargs)
    return Module(codes[0])


RETURN_INPUTS = """

def call(args):
    inputs = list(args)
    runner.call(args)
    return inputs
"""


def generate_in_place(
    function: Callable[..., None], layouts: Sequence[Any], patches: Mapping[str, Any]
) -> Module:
    """Like :func:`generate`, but for a function that changes its inputs; ``call`` returns them all.

    All of ``compile_fx`` runs. Until mutations are functional it compiles for a CPU, because torch
    without CUDA cannot copy into a fake CUDA tensor; after that it compiles for a GPU. ``layouts``
    gives (shape, strides, dtype, device) for each input; the device is ignored.
    """
    from torch._inductor.compile_fx import compile_fx

    modules: list[Module] = []

    def inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        modules.append(code_for_gpu(gm, **kwargs))
        raise Generated

    lowering.register()
    here = [(shape, strides, dtype, torch.device("cpu")) for shape, strides, dtype, _ in layouts]
    gm, fakes = trace_static(function, here)
    patches = {**patches, "compile_threads": 1, "force_disable_caches": True}
    with torch.no_grad(), contextlib.suppress(Generated):
        compile_fx(gm, fakes, inner_compile=inner_compile, config_patches=patches)
    return Module(modules[0].code + RETURN_INPUTS)


@dataclass
class Backward:
    """The backward graph of a tapped model on a CPU, with its inputs and outputs of one call."""

    graph: fx.GraphModule
    inputs: list[Any]
    outputs: list[torch.Tensor]
    weights: list[tuple[int, ...]]
    """Shapes of the taken weights."""

    @property
    def likes(self) -> list[Like]:
        """The inputs with which the graph was traced, including symbolic sizes."""
        return [node.meta["val"] for node in self.graph.graph.find_nodes(op="placeholder")]


def tapped_backward(
    model: torch.nn.Module, x: torch.Tensor, dynamic: bool = False, **options: Any
) -> Backward:
    """Compile ``model`` for training as the backend does, for the CPU, and run its backward.

    ``dynamic`` makes every size of ``x`` symbolic that the model does not fix. For a rule that
    needs scores the result is the backward of a scoring step.
    """
    graph_config = GrassConfig.from_options(options)
    seen = Backward(fx.GraphModule({}, fx.Graph()), [], [], [])

    def on_backward(graph: fx.GraphModule) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            seen.graph, seen.inputs = graph, copies
            outputs = graph(*args)
            seen.outputs = [o for o in outputs if o is not None]
            return outputs

        return run

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tapped = prepare(gm, inputs, graph_config, scoring=True)
        seen.weights = [tuple(inputs[w.position].shape) for w in tapped.found.taken]
        passes = GrassPasses(tapped.facts)
        compiled = compile_aot_eager(tapped.graph, tapped.inputs, passes, on_backward)
        graphs = {REGULAR: compiled, tapped.variant: compiled}
        return GrassCallable(tapped.signature, graphs, tapped.found, PushReport())

    out = torch.compile(model, backend=backend, dynamic=dynamic)(x)
    out.square().sum().backward()  # a loss whose gradients differ in every element
    return seen
