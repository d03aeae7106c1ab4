"""Training one model on several processes, which exchange only compact gradients.

    data_parallel.py   every process has the whole model, and a part of each batch
    fully_shard.py     every process has only a part of each parameter, too

``optim/agreement.py`` makes the processes agree on a selection.
"""

from grass_fx.distributed.data_parallel import data_parallel, no_sync
from grass_fx.distributed.fully_shard import fully_shard

__all__ = ["data_parallel", "fully_shard", "no_sync"]
