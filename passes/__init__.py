"""The graph passes, in the order they run.

On the Dynamo graph, the first once per compilation, the second once per variant:
  1. ``find_linear_weights``: find parameters used only as linear weights, and why others are not.
  2. ``tap_weights``: give each of them a tap, through which its compact gradient leaves.
On the joint graph of AOTAutograd, once per variant (``pipeline``):
  3. ``push_norms``: compute the scores of a large gradient tile by tile, without forming it.
  4. ``push_selection``: move the selection below the matmul that makes the weight gradient.
  5. ``keep_selected``: save only the selected columns of a layer's input for the backward.
"""
