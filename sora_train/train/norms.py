"""Norms of a training run: whether our kernels run them, with modulation and residuals. All ranks alike.

The kernels must give torch's results on every rank, and rank 0 measures both on the run's largest micro-batch. They are
measured alone, since between two matrix products torch.compile has nothing else to fuse them with.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from sora_train.data.shards import ShardSet
from sora_train.errors import error_line
from sora_train.kernels.norm_modulate import norm_modulate, passes, torch_norm_modulate, why_no_norm_modulate
from sora_train.log import log
from sora_train.model import ModelConfig, Transformer
from sora_train.schema import bucket_size
from sora_train.train.attention import agree
from sora_train.train.balance import tokens_of_rank
from sora_train.train.compile import first_reason
from sora_train.train.config import TrainConfig
from sora_train.train.hardware import gpu_seconds
from sora_train.train.run_dir import RunDir

TORCH, OURS = "torch", "our kernels"


def choose_norms(
    model: Transformer, by_bucket: Mapping[str, TrainConfig], shards: ShardSet, run_dir: RunDir, device: torch.device,
    *, compiled: bool, shared: int = 1,
) -> None:  # fmt: skip
    """Has a model's blocks use the kernels if they are right and faster, in bf16 on GPUs. Collective.

    `by_bucket` are the settings of each bucket, of whose clips `shared` ranks have a share each. ZeRO stage 0 is left
    out: it computes under autocast, with tokens in float32.
    """
    config = next(iter(by_bucket.values()))
    if device.type != "cuda" or not config.half or not config.zero_stage:
        return
    if why := first_reason(why_no_norm_modulate(device, model.config.width, modulation_dtype(model.config))):
        if dist.get_rank() == 0:
            run_dir.events.write("no_kernels", 0, f"{why}. All ranks use torch's norms")
        return
    sizes = list[tuple[int, int]]()
    for name, own in by_bucket.items():
        f, _, h, w = shards.manifest.vae.latent_shape(*bucket_size(name))
        sizes.append((own.micro_batch_size, tokens_of_rank(model.config, f, h, w, shared)))
    b, s = max(sizes, key=lambda size: size[0] * size[1])
    measured = partial(measure, model.config, b, s, device, compiled=compiled)
    if agree("norms", [TORCH, OURS], run_dir, device, measured, "Seconds of one, forward and backward") == OURS:
        fuse_norms(model)


def fuse_norms(model: Transformer) -> None:
    """Has a model's blocks use the kernels where they fit."""
    for block in model.blocks:
        setattr(block, "fused", True)  # noqa: B010


def measure(model: ModelConfig, b: int, s: int, device: torch.device, *, compiled: bool) -> dict[str, float]:
    """Seconds of both, forward and backward, for b clips of s tokens; nothing if one fails."""
    draw = torch.Generator(device).manual_seed(0)  # not the generator that training uses

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    try:
        x, y, *grads = (noise(b, 1, s, model.width) for _ in range(4))
        shift, scale, gate = noise(b, 1, 1, 3, model.width, dtype=modulation_dtype(model)).unbind(3)
        times = dict[str, float]()
        for name, calculate in ((TORCH, torch_norm_modulate), (OURS, norm_modulate)):
            run = torch.compile(calculate, dynamic=False) if compiled else calculate
            times[name] = gpu_seconds(partial(passes, run, (x, shift, scale, y, gate), grads), device)
    except Exception as error:  # torch's are used then
        log.warning(f"norms could not be measured: {error_line(error)}")
        return {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return times


def modulation_dtype(model: ModelConfig) -> torch.dtype:
    """Of shift, scale and gate of a model in bfloat16."""
    return torch.float32 if model.family == "wan" else torch.bfloat16
