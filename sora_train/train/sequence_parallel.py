"""Groups of consecutive ranks that share each clip (`model/sequence.py`). Applied to a model from outside.

ZeRO, EMA, checkpoints and the guard work on all ranks and do not depend on groups.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sora_train.model import ModelConfig, Transformer
from sora_train.model.layers import Attention
from sora_train.model.sequence import ALONE, SequenceGroup
from sora_train.model.wan import WanAttention

TIMEOUT = timedelta(minutes=30)
"""Of an exchange; that of Ray Train's own group. For groups that are made later, NCCL's default is shorter."""


def share_clips(model: Transformer, ranks: SequenceGroup) -> None:
    """Has these ranks share the tokens of each clip that the model gets."""
    model.ranks = ranks
    for module in model.modules():
        if isinstance(module, Attention | WanAttention) and not model.config.factorised:
            module.ranks = ranks


def make_sequence_group(model: ModelConfig, size: int) -> SequenceGroup:
    """This rank's group of `size` consecutive ranks. Collective.

    Raises ValueError, as recipes are checked before, if the ranks or the heads of attention over clips do not divide.
    """
    world = dist.get_world_size()
    if world % size or not model.shares_clips_by(size):
        raise ValueError(f"groups of {size} ranks can't share clips: there are {world} ranks, and {model.heads} heads")
    if size == 1:
        return ALONE
    group: Any = dist.new_subgroups(size, timeout=TIMEOUT)[0]
    return SequenceGroup(dist.get_rank() % size, size, group.group_name)
