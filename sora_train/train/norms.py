"""Norms of a training run: whether our kernels run them, with modulation and residuals. All ranks alike.

The kernels must give torch's results on every rank, and rank 0 measures both on the run's largest micro-batch. They are
measured alone, since between two matrix products torch.compile has nothing else to fuse them with.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sora_train.data.shards import ShardSet
from sora_train.errors import error_line
from sora_train.kernels.norm_modulate import WIDEST, norm_modulate, torch_norm_modulate
from sora_train.kernels.short_attention import TOLERANCE
from sora_train.kernels.tools import why_no_kernels
from sora_train.log import log
from sora_train.model import ModelConfig, Transformer
from sora_train.schema import bucket_size
from sora_train.train.attention import agree, report_no_kernels
from sora_train.train.balance import tokens_of_rank
from sora_train.train.compile import first_reason
from sora_train.train.config import TrainConfig
from sora_train.train.hardware import gpu_seconds
from sora_train.train.run_dir import RunDir

TORCH, OURS = "torch", "our kernels"
CALLS_S = 60e-6
"""Time of the CPU for the calls of our two operators. It is added to theirs: a step may wait for the CPU."""


def choose_norms(
    model: Transformer, by_bucket: Mapping[str, TrainConfig], shards: ShardSet, run_dir: RunDir, device: torch.device,
    *, compiled: bool, shared: int = 1,
) -> None:  # fmt: skip
    """Has a model's blocks use the kernels if they are right and faster, in bf16 on GPUs. Collective.

    `by_bucket` are the settings of each bucket, of whose clips `shared` ranks have a share each. ZeRO stage 0 is left
    out: it computes under autocast, with tokens in float32.
    """
    config = next(iter(by_bucket.values()))
    if device.type != "cuda" or not config.half or not config.zero_stage or model.config.width > WIDEST:
        return
    if why := first_reason(why_no_norms(device, model.config)):
        report_no_kernels(run_dir, f"{why}. All ranks use torch's norms")
        return
    sizes = list[tuple[int, int]]()
    for name, own in by_bucket.items():
        f, _, h, w = shards.manifest.vae.latent_shape(*bucket_size(name))
        sizes.append((own.micro_batch_size, tokens_of_rank(model.config, f, h, w, shared)))
    b, s = max(sizes, key=lambda size: size[0] * size[1])
    measured = partial(measure, device, model.config, b, s, compiled=compiled)
    if agree("norms", [TORCH, OURS], run_dir, device, measured, "Seconds of one, forward and backward") == OURS:
        fuse_norms(model)


def fuse_norms(model: Transformer) -> None:
    """Has a model's blocks use the kernels where they fit."""
    for block in model.blocks:
        setattr(block, "fused", True)  # noqa: B010


def why_no_norms(device: torch.device, model: ModelConfig, s: int = 300) -> str:
    """Why not to use the kernels, or an empty string: what they lack on a device, or what they do wrong.

    Compares them with torch in float32, on groups of `s` tokens with a modulation of a clip, a group, or a place in it.
    """
    if why := why_no_kernels(device):
        return why
    off = list[Tensor]()
    try:
        for rows in ((1, 1), (3, 1), (1, s)):
            (x, modulation, y), grads = made_up(device, model, (2, 3, s), rows)
            ungated = modulation[..., 1:, :]
            for inputs in ((x, ungated), (x, ungated, y), (x, modulation, y)):
                found = passes(norm_modulate, inputs, grads)
                exact = passes(torch_norm_modulate, [each.float() for each in inputs], [each.float() for each in grads])
                off += [(a - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"norms of width {model.width}: {error_line(error)}"
    most = float(torch.stack(off).max())  # not a number is wrong too
    return "" if most < TOLERANCE else f"norms of width {model.width}: {most:.2g} of the largest value off torch's norm"


def measure(device: torch.device, model: ModelConfig, b: int, s: int, *, compiled: bool) -> dict[str, float]:
    """Seconds of both, forward and backward, for b clips of s tokens; nothing if one fails."""
    times = dict[str, float]()
    try:
        inputs, grads = made_up(device, model, (b, 1, s), (1, 1))
        for name, calculate in ((TORCH, torch_norm_modulate), (OURS, norm_modulate)):
            run = torch.compile(calculate, dynamic=False) if compiled else calculate
            times[name] = gpu_seconds(partial(passes, run, inputs, grads), device) + CALLS_S * (name == OURS)
    except Exception as error:  # torch's are used then
        log.warning(f"norms could not be measured: {error_line(error)}")
        return {}
    return times


def made_up(
    device: torch.device, model: ModelConfig, tokens: tuple[int, int, int], rows: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """x, modulation and y of a block, and gradients of both outputs. Wan's modulation is in float32."""
    draw, d = torch.Generator(device).manual_seed(0), model.width  # not the generator that training uses

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    x, y, *grads = (noise(*tokens, d) for _ in range(4))
    dtype = torch.float32 if model.family == "wan" else torch.bfloat16
    return (x, noise(tokens[0], *rows, 3, d, dtype=dtype), y), grads


def passes(
    calculate: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and gradients of all inputs."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    outputs = calculate(*inputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, grads)]
