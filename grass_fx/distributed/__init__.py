"""Training one model on several processes: compact gradients, and nothing larger, are exchanged.

    data_parallel.py   every process has the whole model, and a part of each batch
    fully_shard.py     every process has a part of each parameter too

How processes agree on a selection: ``optim/agreement.py``.
"""

from grass_fx.distributed.data_parallel import data_parallel, no_sync
from grass_fx.distributed.fully_shard import fully_shard

__all__ = ["data_parallel", "fully_shard", "no_sync"]
