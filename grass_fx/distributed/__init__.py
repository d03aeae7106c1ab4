"""Training one model on several processes, which exchange only compact gradients.

    data_parallel.py   every process has the whole model, and a part of each batch

torch's own ``fully_shard`` (FSDP2) needs nothing from here: see ``state/fsdp2.py``.
``optim/agreement.py`` makes the processes agree on a selection.
"""

from grass_fx.distributed.data_parallel import data_parallel, no_sync

__all__ = ["data_parallel", "no_sync"]
