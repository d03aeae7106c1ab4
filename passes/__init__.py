"""The graph passes, in the order they run.

On the Dynamo graph, once per compilation:
  1. ``find_linear_weights``: the parameters used as linear weights only, and why others are not.
  2. ``tap_weights``: a tap on each, whose gradient is the compact one.
On the joint graph of AOTAutograd, once per variant (``pipeline``):
  3. ``push_norms``: the scores of a large gradient are taken tile by tile, without it.
  4. ``push_selection``: the selection moves below the matmul that makes the weight gradient.
  5. ``recompute_gathers``: sharded weights are gathered again in the backward, not kept.
  6. ``keep_selected``: of an input of linear weights only the selected columns are kept.
"""
