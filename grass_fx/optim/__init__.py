"""Optimizers that step in the subspace.

update.py       the mathematics as free functions, in the notation of docs/method.md
carry.py        what a weight's state keeps when its selection changes
decay.py        weight decay of rows that are not selected, once a period
rounding.py     stochastic rounding to bfloat16
compiled.py     the AdamW update as code that Inductor generates
dense.py        torch's AdamW step for dense parameters, rounded stochastically in bfloat16
stepping.py     a step as a list of operations that can be resumed after an exception
checkpoint.py   state dicts, pickles and copies, including the weights' subspaces
loading.py      checks and conversions of a saved state
layout.py       the lay-out of the state as a checkpoint has it, before the model has run
entries.py      which state entries an optimizer keeps, and whether a saved state has them
options.py      what the options of a parameter group may be
base.py         what all of these optimizers share: gradients, refreshes, errors
agreement.py    keeping processes that train one model on one selection
adamw.py        grass_fx.AdamW
wrap.py         grass_fx.subspace(X) for any torch optimizer class X
wrappable.py    which classes X can be wrapped
probe.py        finding out how X behaves, by steps on tiny weights
stand_in.py     the compact parameters that X steps, and the resulting changes of weights
twin.py         X at work on these parameters
rows.py         reading and writing selected rows by the fastest kernel
rowwise.py      the state of an arbitrary optimizer, seen as rows
in_backward.py  stepping as gradients arrive, which saves the most memory
telemetry.py    the numbers that stats() reports for taken weights
coverage.py     warnings about weights that train dense
"""

from grass_fx.optim.adamw import AdamW
from grass_fx.optim.in_backward import step_in_backward
from grass_fx.optim.layout import lay_out_from
from grass_fx.optim.wrap import subspace

__all__ = ["AdamW", "lay_out_from", "step_in_backward", "subspace"]
