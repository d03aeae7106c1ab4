"""What each kernel of a generated module reads and writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from grass_fx.testing.virtual_gpu import Module


@dataclass(frozen=True)
class Memory:
    """A tensor that a module allocates, or gets."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Launch:
    """One call of a kernel. A tensor is read or written as a whole, or gathered by an index."""

    name: str
    reads: list[Memory] = field(default_factory=list)
    gathers: list[Memory] = field(default_factory=list)
    writes: list[Memory] = field(default_factory=list)


RENAMED = re.compile(r"(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*# (?:reuse|alias)")
ALLOCATED = re.compile(r"(\w+) = empty_strided_cuda\(\((.*?)\), \(.*?\), (torch\.\w+)\)")
GIVEN = re.compile(r"(\w+) = rand_strided\(\((.*?)\), \(.*?\), device=.*?, dtype=(torch\.\w+)\)")
RETURNED = re.compile(r"assert_size_stride\((\w+), \((.*?)\), ")
"""What an operator of a library has allocated; its dtype is what the next kernel takes it for."""

TYPES = {
    "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*i1": torch.bool,
    "*fp64": torch.float64, "*i32": torch.int32, "*i64": torch.int64,
}  # fmt: skip


def launches(module: Module) -> list[Launch]:
    """All launches of a module with constant sizes, in their order."""
    memory = {each[0]: _memory(*each) for each in GIVEN.findall(module.code)}
    found = []
    for line in module.code.splitlines():
        if allocated := ALLOCATED.search(line):
            memory[allocated[1]] = _memory(*allocated.groups())
        elif (returned := RETURNED.search(line)) and returned[1] not in memory:
            memory[returned[1]] = _memory(returned[1], returned[2], "torch.bfloat16")
        elif (renamed := RENAMED.search(line)) and renamed[2] in memory:
            memory[renamed[1]] = memory[renamed[2]]
        elif call := re.match(r"\s+(triton_\w+)\.run\((.*), stream=", line):
            found.append(_triton(module, call[1], call[2].split(", "), memory))
        elif call := re.match(r"\s+(?:\w+ = )?(extern_kernels\.\w+)\((.*)\)", line):
            inputs, _, out = call[2].partition("out=")
            launch = Launch(call[1], [*_named(inputs, memory)], [], [*_named(out, memory)])
            found.append(launch)
    return found


def outputs(module: Module) -> list[Memory]:
    """What a module allocates and returns: its results, and what the backward needs."""
    memory = {each[0]: _memory(*each) for each in ALLOCATED.findall(module.code)}
    for name, shape in RETURNED.findall(module.code):
        memory.setdefault(name, _memory(name, shape, "torch.bfloat16"))
    given = {name for name, *_ in GIVEN.findall(module.code)}
    (returned,) = re.findall(r"^        return \((.*)\)$", module.code, re.M)
    for new, old in RENAMED.findall(module.code):
        memory.setdefault(new, memory.get(old, Memory(old, (), torch.bfloat16)))
    names = dict.fromkeys(re.findall(r"\b[a-z]\w+", returned))
    return [memory[name] for name in names if name in memory and name not in given]


def _memory(name: str, shape: str, dtype: str) -> Memory:
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    return Memory(name, sizes, getattr(torch, dtype.removeprefix("torch.")))


def _named(text: str, memory: dict[str, Memory]) -> Iterator[Memory]:
    return (memory[word] for word in re.findall(r"\w+", text) if word in memory)


def _triton(module: Module, name: str, arguments: list[str], memory: dict[str, Memory]) -> Launch:
    (kernel,) = (kernel for kernel in module.kernels if kernel.name == name)
    source, launch = kernel.source, Launch(name)
    for (pointer, kind), argument in zip(kernel.signature.items(), arguments, strict=False):
        if argument not in memory:
            continue
        dtype = TYPES.get(kind, memory[argument].dtype)
        memory[argument] = replace(memory[argument], dtype=dtype)
        loads = re.findall(rf"tl\.load\({pointer} \+ \((.*?)\), ", source)
        loads += re.findall(rf"tl\.load\({pointer} \+ \(?(\w+)\)?", source)
        if any("tmp" in index for index in loads):
            launch.gathers.append(memory[argument])
        elif loads:
            launch.reads.append(memory[argument])
        if f"tl.store({pointer} " in source:
            launch.writes.append(memory[argument])
    return launch
