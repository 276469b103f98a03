"""Groups of consecutive ranks that share each clip (`model/sequence.py`). Applied to a model from outside.

ZeRO, EMA, checkpoints and the guard see all ranks and know nothing of groups.
"""

from typing import Any

import torch.distributed as dist

from sora_train.errors import UserError
from sora_train.model import ModelConfig, Transformer
from sora_train.model.layers import Attention
from sora_train.model.sequence import SequenceGroup
from sora_train.model.wan import WanAttention


def share_clips(model: Transformer, size: int) -> None:
    """Has each `size` consecutive ranks share the tokens of their clips. Collective.

    Raises UserError if the ranks, or the heads of an attention over whole clips, do not divide.
    """
    if size == 1:
        return
    check_sequence_parallel(model.config, size, dist.get_world_size())
    own: Any = dist.new_subgroups(size)[0]
    model.ranks = SequenceGroup(dist.get_rank() % size, size, own.group_name)
    for module in model.modules():
        if isinstance(module, Attention | WanAttention) and not model.config.factorised:
            module.ranks = model.ranks


def check_sequence_parallel(model: ModelConfig, size: int, world: int) -> None:
    """Raises UserError unless groups of `size` ranks can share the clips of a model of this shape."""
    if world % size:
        raise UserError(
            f"cluster.sequence_parallel is {size}, which does not divide {world} workers. Change one of them",
            code="sequence_parallel",
        )
    if not model.factorised and model.heads % size:
        raise UserError(
            f"cluster.sequence_parallel is {size}, and model.heads {model.heads} do not divide by it: each rank of a "
            "group computes the attention of as many heads. Use a divisor of the heads",
            code="sequence_parallel",
        )
