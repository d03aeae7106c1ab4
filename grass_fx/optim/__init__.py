"""Optimizers that step in the subspace: ``update.py`` has the mathematics, classes own state."""

from grass_fx.optim.adamw import AdamW

__all__ = ["AdamW"]
