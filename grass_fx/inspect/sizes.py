"""Sizes of traced tensors as numbers, or as expressions where they are symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch


def size_expression(size: Any) -> Any:
    """A size as an int or, if it is symbolic, a sympy expression in plain symbols of its names."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    plain = {each: sympy.Symbol(each.name) for each in expression.free_symbols}
    return int(expression) if expression.is_Integer else expression.subs(plain)


def sizes_of_symbols(inputs: Sequence[Any]) -> dict[str, int | None]:
    """The symbols among the inputs of a Dynamo graph, and what they were in the example."""
    symbols = [each.node for each in inputs if isinstance(each, torch.SymInt)]
    return {node.expr.name: node.hint for node in symbols if node.expr.is_Symbol}
