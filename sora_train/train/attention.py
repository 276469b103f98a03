"""Attention of a training run: whether every rank uses the kernels for short groups."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.kernels.short_attention import LONGEST, WIDEST, refused, why_no_short_attention
from sora_train.model import ModelConfig
from sora_train.schema import bucket_size
from sora_train.train.compile import first_reason
from sora_train.train.config import TrainConfig
from sora_train.train.run_dir import RunDir


def check_attention(
    config: TrainConfig, model: ModelConfig, shards: ShardSet, run_dir: RunDir, device: torch.device
) -> None:
    """Tries the kernels on all groups of tokens that training has, if it would use them. Collective."""
    if device.type == "cuda" and config.half and model.factorised and model.width // model.heads <= WIDEST:
        try_on_all_ranks(short_groups(model, shards), model, run_dir, device)


def short_groups(model: ModelConfig, shards: ShardSet) -> set[int]:
    """The numbers of tokens of a frame and of a place over time, if short; one token where images skip a block."""
    shapes = [shards.manifest.vae.latent_shape(*bucket_size(name)) for name in shards.rows]
    sizes = {size for f, _, h, w in shapes for size in (f, h * w // model.patch**2)}
    return {size for size in sizes if size <= LONGEST}


def try_on_all_ranks(groups: Iterable[int], model: ModelConfig, run_dir: RunDir, device: torch.device) -> None:
    """Has all ranks use torch's attention, and writes an event, if the kernels are wrong on any. Collective."""
    sizes = model.heads, model.width // model.heads
    reasons = (why_no_short_attention(device, s, *sizes) for s in sorted(groups))
    if why := first_reason(next(filter(None, reasons), "")):
        refused.append(why)
        if dist.get_rank() == 0:
            run_dir.events.write("no_kernels", 0, f"{why}. All ranks use torch's attention, which is slower")
