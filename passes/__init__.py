"""The graph passes, in the order they run.

On the Dynamo graph, the first once per compilation, the second once per variant:
  1. ``find_linear_weights``: find parameters used only as linear weights, and why others are not.
  2. ``tap_weights``: give each of them a tap, through which its compact gradient leaves.
If that does not tell of a weight, its joint graph is asked:
  3. ``ask_joint_graph``: find out whether products make its gradient.
On the joint graph of AOTAutograd, once per variant (``pipeline``):
  4. ``push_norms``: compute the scores of a large gradient tile by tile, without forming it.
  5. ``push_signs``: compute the signs of a gradient without forming it.
  6. ``push_selection``: move the selection below the matmul that makes the weight gradient.
  7. ``accumulate_lookups``: add the rows of a lookup into the product of the tied head.
On the same graph, after Inductor's own passes:
  8. ``keep_selected``: save only the selected columns of a layer's input for the backward.
  9. ``read_padded``: read the padded copies that Inductor made for other products.
"""
