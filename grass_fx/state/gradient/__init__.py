"""CompactGrad, the gradient of a taken weight, which stores only the selected rows.

compact.py       CompactGrad: its content, and how torch's operations reach the handlers below
copies.py        detach, clone, conversions, pickles; memory that a caller asks for
scaling.py       multiplying by a number or by a mask, clamping
accumulation.py  adding, by autograd and by a training loop
looking.py       queries: norms, sums, extremes, comparisons, histograms
lists.py         operations on lists of gradients, compact and dense mixed
"""

from grass_fx.state.gradient import accumulation, copies, lists, looking, scaling
from grass_fx.state.gradient.compact import CompactGrad, Owner, Used

__all__ = ["CompactGrad", "Owner", "Used", "accumulation", "copies", "lists", "looking", "scaling"]
