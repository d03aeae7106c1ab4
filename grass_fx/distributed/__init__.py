"""Training one model on several processes: compact gradients, and nothing larger, are exchanged.

    data_parallel.py   every process has the whole model, and a part of each batch

How processes agree on a selection: ``optim/agreement.py``.
"""

from grass_fx.distributed.data_parallel import data_parallel, no_sync

__all__ = ["data_parallel", "no_sync"]
