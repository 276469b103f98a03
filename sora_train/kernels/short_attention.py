"""Self-attention within groups of at most 64 tokens, such as a place's tokens over time, on a GPU.

cuDNN and flash attention compute tiles of 64 x 64 or more scores for each group and head, most of them empty for 16
tokens. Here a tile is as small as the group, so time is bound by memory: the forward pass reads queries, keys and
values once, the backward pass reads these and the output's gradient once. Nothing else is saved for it.

Sums have a fixed order, so a repeated step gives the same bits.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sora_train.errors import error_line
from sora_train.kernels.tools import why_no_kernels
from sora_train.log import log

LONGEST, WIDEST = 64, 128
"""Tokens of a group, and width of a head, of which a tile fits in registers."""
TOLERANCE = 2e-2
"""Largest difference from float32, over the largest value, that bfloat16 explains."""


refused: list[str] = []
"""Why this process computes with torch's attention instead; empty as long as the kernels are right."""


def fits_short_attention(qkv: Tensor, heads: int) -> bool:
    """Whether to use `short_attention`: on NVIDIA GPUs, for bfloat16, short groups and narrow heads.

    In float32 its products would run without tensor cores, and take 10 s to compile.
    """
    s, k = qkv.shape[-2], qkv.shape[-1] // (3 * heads)
    fits = qkv.is_cuda and qkv.dtype == torch.bfloat16 and s <= LONGEST and k <= WIDEST
    return fits and is_right(qkv.device, s, heads, k)


def is_right(device: torch.device, s: int, heads: int, k: int) -> bool:
    """Whether the kernels are right for groups of `s` tokens. Once they are not, none is used any more."""
    if not refused and (why := why_no_short_attention(device, s, heads, k)):
        refused.append(why)
        log.warning(f"attention within short groups runs without sora_train's kernels: {why}")
    return not refused


# What `torch.compiler.assume_constant_result` sets. It imports the compiler, which would take every command 2 s.
is_right._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def why_no_short_attention(device: torch.device, s: int, heads: int, k: int) -> str:
    """Why not to use the kernels on a device, or an empty string: what they lack there, or what they do wrong."""
    if why := why_no_kernels(device):
        return why
    # A thread of its own has no autocast, no dispatch mode (as in checkpointing) and no graph that is being traced.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(try_kernels, device, s, heads, k).result()


def try_kernels(device: torch.device, s: int, heads: int, k: int) -> str:
    """Compares both kernels with torch's attention in float32, on several tiles of which the last is not full."""
    draw, groups = torch.Generator().manual_seed(0), 2 * (LONGEST // s) + 1  # not the generator that training uses
    qkv, grad = (torch.randn(groups, s, n * heads * k, generator=draw).to(device, torch.bfloat16) for n in (3, 1))

    def results(attend: Callable[[Tensor, int], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        y = attend(x, heads)
        return [y.detach().float(), torch.autograd.grad(y, x, grad.to(dtype))[0].float()]

    try:
        found = results(short_attention, torch.bfloat16)
        expected = results(torch_attention, torch.float32)
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
        off = float(torch.stack(errors).max())
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        return f"groups of {s} tokens: {error_line(error)}"
    wrong = f"groups of {s} tokens, {heads} heads of {k}: {off:.2g} of the largest value off torch's attention"
    return "" if off < TOLERANCE else wrong  # not a number is wrong too


def torch_attention(qkv: Tensor, heads: int) -> Tensor:
    """What `short_attention` computes, by torch."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in qkv.chunk(3, -1))
    return scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


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
