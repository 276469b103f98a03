"""Self-attention within groups of at most 64 tokens, such as a place's tokens over time, on a GPU.

cuDNN and flash attention compute tiles of 64 x 64 or more scores for each group and head, most of them empty for 16
tokens. Here a tile is as small as the group, so time is bound by memory: the forward pass reads queries, keys and
values once, the backward pass reads these and the output's gradient once. Nothing else is saved for it.

Sums have a fixed order, so a repeated step gives the same bits.
"""

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.kernels.tools import why_no_triton

LONGEST, WIDEST = 64, 128
"""Tokens of a group, and width of a head, of which a tile fits in registers."""


def fits_short_attention(qkv: Tensor, heads: int) -> bool:
    """Whether to use `short_attention`: on NVIDIA GPUs, for bfloat16, short groups and narrow heads.

    In float32 its products would run without tensor cores, and take 10 s to compile.
    """
    s, k = qkv.shape[-2], qkv.shape[-1] // (3 * heads)
    fits = qkv.is_cuda and qkv.dtype == torch.bfloat16 and s <= LONGEST and k <= WIDEST
    return fits and triton_runs(qkv.device.index)


@torch.compiler.assume_constant_result
def triton_runs(device: int) -> bool:
    """Whether Triton's kernels run on this GPU with tensor cores for bfloat16."""
    return triton_builds() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def triton_builds() -> bool:
    """Whether Triton can build kernels for NVIDIA GPUs here."""
    return bool(torch.version.cuda) and not why_no_triton()


def short_attention(qkv: Float[Tensor, "*g s ddd"], heads: int) -> Float[Tensor, "*g s d"]:
    """Multi-head attention within each group. A token has its queries, keys and values one after the other."""
    return run_forward(qkv, heads)


@torch.library.custom_op("sora_train::short_attention", mutates_args=(), schema="(Tensor qkv, int heads) -> Tensor")
def run_forward(qkv: Tensor, heads: int) -> Tensor:
    from sora_train.kernels.short_attention_triton import short_attention_forward

    out = allocate_output(qkv, heads)
    launch(short_attention_forward, (qkv.contiguous(), out), heads)
    return out


@torch.library.custom_op(
    "sora_train::short_attention_backward", mutates_args=(), schema="(Tensor qkv, Tensor grad, int heads) -> Tensor"
)
def run_backward(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    from sora_train.kernels.short_attention_triton import short_attention_backward

    grad_qkv = allocate_gradient(qkv, grad, heads)
    launch(short_attention_backward, (qkv.contiguous(), grad.contiguous(), grad_qkv), heads)
    return grad_qkv


@run_forward.register_fake
def allocate_output(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@run_backward.register_fake
def allocate_gradient(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv)


def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return run_backward(qkv, grad, ctx.heads), None


run_forward.register_autograd(differentiate, setup_context=save_inputs)


def launch(kernel: Any, tensors: tuple[Tensor, ...], heads: int, tile: tuple[int, int] | None = None) -> None:
    """Runs a kernel on all tiles, whose size, and so the order of sums, depends on the shape alone.

    `tile`: its tokens and warps, for benchmarks.
    """
    qkv = tensors[0]
    s, k = qkv.shape[-2], qkv.shape[-1] // (3 * heads)
    block_s, block_k = (max(16, 2 ** math.ceil(math.log2(side))) for side in (s, k))
    block_s, warps = tile or (block_s, block_s // 16)
    tokens = qkv.numel() // qkv.shape[-1]
    if not tokens:
        return
    grid = (-(-tokens // (block_s // s * s)) * heads,)
    scale = math.log2(math.e) / math.sqrt(k)
    options = {"num_warps": warps, "enable_fp_fusion": True}  # Triton 3.9 warns if fusion is not set
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU
        kernel[grid](*tensors, tokens, s, heads, k, scale, block_s, block_k, **options)
