"""Sizes of traced tensors as numbers, or as sympy expressions if they are symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch


def size_expression(size: Any) -> Any:
    """A size as an int or, if it is symbolic, a sympy expression in plain symbols."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    plain = {symbol: sympy.Symbol(symbol.name) for symbol in expression.free_symbols}
    return int(expression) if expression.is_Integer else expression.subs(plain)


def sizes_of_symbols(inputs: Sequence[Any]) -> dict[str, int | None]:
    """The symbols among the inputs of a Dynamo graph, and their values in the example inputs."""
    symbols = [value.node for value in inputs if isinstance(value, torch.SymInt)]
    return {node.expr.name: node.hint for node in symbols if node.expr.is_Symbol}
