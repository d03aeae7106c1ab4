"""Dynamo's graphs, their placeholders, and what it knows about the frame it is compiling."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import fx

from grass_fx._torch_compat.selfcheck import selfcheck
from grass_fx.errors import UnsupportedTorchError

SET_GRAD_ENABLED = getattr(torch._C, "_set_grad_enabled", None)
"""The function a Dynamo graph calls to turn gradients on or off."""


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a Dynamo graph for AOTAutograd, because Dynamo still reads the original.

    AOTAutograd looks for ``_param_name_to_source`` and for every placeholder's
    ``_dynamo_source``. Copying the nodes loses both, so they are set here.
    """
    result = copy.deepcopy(gm)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    originals, copies = (g.graph.find_nodes(op="placeholder") for g in (gm, result))
    for copied, original in zip(copies, originals, strict=True):
        copied._dynamo_source = getattr(original, "_dynamo_source", None)
    return result


def named_backend(name: str) -> Callable[..., Any] | None:
    """The backend of torch.compile with this name, or None."""
    from torch._dynamo.backends.registry import _BACKENDS, _COMPILER_FNS, lookup_backend

    return lookup_backend(name) if name in _BACKENDS or name in _COMPILER_FNS else None


def name_backend(name: str, backend: Callable[..., Any]) -> None:
    """Let torch.compile know a backend by this name."""
    from torch._dynamo.backends.registry import register_backend

    register_backend(backend, name=name)


@contextmanager
def compiled_apart(
    function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Iterator[Callable[..., Any]]:
    """``torch.compile(function)`` without side effects on other compilations.

    Dynamo does not mark sizes as dynamic because of it. At the end the cache of every code object
    that was first compiled here is emptied, also of functions called after a graph break, because
    its entries would count towards the recompilation limit.

    Raises:
        UnsupportedTorchError: this torch lacks a private interface that grass_fx needs.
    """
    selfcheck()
    from torch._dynamo import config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    fresh: dict[CodeType, bool] = {}

    def watching(*args: Any, **kwargs: Any) -> Any:
        code = InstructionTranslator.current_tx().f_code
        fresh.setdefault(code, not torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))
        return backend(*args, **kwargs)

    settings: dict[str, Any] = {"automatic_dynamic_shapes": False}
    settings |= dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1 << 16)
    try:
        with config.patch(settings):
            yield torch.compile(function, backend=watching, dynamic=dynamic)
    finally:
        for code in (code for code, new in fresh.items() if new):
            torch._C._dynamo.eval_frame.reset_code(code)


def mark_added_placeholder(node: fx.Node) -> None:
    """Mark a placeholder that grass_fx added: no source in the user's frame, a fixed address.

    CUDA graphs read an input with a fixed address in place, like a parameter, and do not copy it.
    """
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def parameter_name(node: fx.Node) -> str:
    """The name of a placeholder's parameter, relative to the compiled region.

    Dynamo's source of a parameter reads ``L['self']._modules['layers']...._parameters['weight']``.
    A module with its own ``__getattr__`` appears as ``.__dict__['_modules']['layers']``. For any
    other spelling the result is the placeholder's name.
    """
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    parts = re.findall(r"_(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]", text)
    return ".".join(parts) if parts else re.sub(r"^[lLgG]_", "", node.name).rstrip("_")


def input_source(node: fx.Node) -> str:
    """Where a placeholder's value was in the frame: ``L['self'].layers.0.up.weight``; or ""."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else _plain(source.name)


def module_source(node: fx.Node) -> str:
    """Where the innermost module that a node belongs to was in the frame: ``L['self'].layers.0``.

    A node of a backward belongs to the module of its forward. The result is "" outside of modules.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return _plain([*stack.values()][-1][0]) if stack else ""


def _plain(source: str) -> str:
    """Dynamo's source with names of submodules and parameters as attributes."""
    kinds = r"\.(?:__dict__\[')?_(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]"
    return re.sub(kinds, r".\1", source)


def managed_by_fsdp(node: fx.Node) -> bool:
    """Whether a placeholder's parameter belongs to a module that FSDP gathers and shards by hooks.

    The graph input is an ordinary Parameter. FSDP marks its module, which Dynamo's source names.
    """
    from torch._dynamo import symbolic_convert

    translator = getattr(symbolic_convert.tls, "current_tx", None)
    source = getattr(node, "_dynamo_source", None)
    if translator is None or source is None:
        return False
    frame, owner = translator.output.root_tx, source.name.rpartition("._parameters[")[0]
    try:
        module = eval(owner, {"L": frame.f_locals, "G": frame.f_globals})
    except Exception:  # not a module's parameter, or the source has another spelling
        return False
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of a backend's example inputs."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(values)
    if mode is None:
        raise UnsupportedTorchError("the backend was called without torch.compile's fake inputs.")
    return mode


def current_compilation() -> tuple[int, int] | None:
    """The numbers of the frame and of its compilation that is running; torch writes ``3/0``."""
    from torch._guards import CompileContext

    found: Any = CompileContext.current_compile_id()
    return None if found is None else (found.frame_id, found.frame_compile_id)


def real_value(node: fx.Node) -> Any:
    """The actual input behind a Dynamo graph's placeholder; None if Dynamo no longer knows it."""
    return getattr(node.meta.get("grapharg"), "example", None)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add ``text()`` to torch's structured trace; it is only called if ``TORCH_TRACE`` is set."""
    from torch._logging._internal import trace_structured

    about = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text)
