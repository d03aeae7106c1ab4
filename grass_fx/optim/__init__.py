"""Optimizers that step in the subspace.

update.py       the mathematics, free functions in the notation of docs/method.md
rounding.py     stochastic rounding to bfloat16
checkpoint.py   state dicts, pickles and copies, with the weights' subspaces
base.py         what all of them share: gradients, refreshes, errors
adamw.py        grass_fx.AdamW
wrap.py         grass_fx.subspace(X): any torch optimizer class X
wrappable.py    which classes X can be
probe.py        what X is like, found out by its steps on tiny weights
stand_in.py     the compact parameters that X steps, and what follows for weights
rowwise.py      the state of an arbitrary optimizer, seen as rows
in_backward.py  stepping as gradients arrive, where memory is scarcest
telemetry.py    what stats() tells of taken weights
"""

from grass_fx.optim.adamw import AdamW
from grass_fx.optim.in_backward import step_in_backward
from grass_fx.optim.wrap import subspace

__all__ = ["AdamW", "step_in_backward", "subspace"]
