"""Gated residual, norm and modulation between two matrix products of a block, in one pass each way, on a GPU.

    x' = x + gate y        h = norm(x') (1 + scale) + shift

The forward pass reads x and y and writes x' and h. The backward pass reads the gradients of both, x' and y, writes the
gradients of x and y, and sums those of the modulation, for which torch.compile reads all of it again. x', y and each
row's mean and deviation are saved. Sums have a fixed order, so a repeated step gives the same bits.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

WIDEST = 4096
"""Width of a row of which nothing is spilled from registers."""
WARPS_AT_ONCE = 2048
"""Warps of the backward kernel, whose programs make sums of their own: about as many as a large GPU runs at once."""
SHORTEST = 8
"""Rows for which a program reads the modulation once."""


def fits_norm_modulate(x: Tensor, modulation: Tensor) -> bool:
    """Whether the kernels take it: on NVIDIA GPUs, in bfloat16. `train/norms.py` checks and measures them."""
    fits = x.shape[3] <= WIDEST and x.stride(3) == 1 and 1 in modulation.shape[1:3]
    return x.is_cuda and x.dtype == torch.bfloat16 and fits


def norm_modulate(
    x: Float[Tensor, "b g s d"],
    modulation: Float[Tensor, "b #g #s k d"],
    y: Float[Tensor, "b g s d"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
    """x' and h. The modulation is shift and scale, or gate, shift and scale. Without y, x' is x."""
    return NormModulate.apply(x, y, modulation, eps)  # pyright: ignore[reportReturnType]


def torch_norm_modulate(
    x: Tensor, modulation: Tensor, y: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `norm_modulate` computes, by torch."""
    *gate, shift, scale = modulation.unbind(3)
    out = x if y is None else (torch.addcmul(x, gate[0], y) if gate else x + y).to(x.dtype)
    return out, torch.addcmul(shift, layer_norm(out.to(shift.dtype), out.shape[3:], eps=eps), 1 + scale).to(x.dtype)


class NormModulate(torch.autograd.Function):
    """Returns x also if it is unchanged: the backward kernel then adds the gradient of the residual stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, h, stats = run_forward(x, y, modulation, eps)
        out, ctx.added, gated = x.view_as(x) if y is None else out, y is not None, modulation.shape[3] == 3
        ctx.save_for_backward(out, y if gated else None, modulation, stats)
        return out, h

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, modulation, stats = ctx.saved_tensors
        grad_x, grad_y, grad_modulation = run_backward(grad_out, grad_h, x, y, modulation, stats)
        return grad_x, (grad_x if y is None else grad_y) if ctx.added else None, grad_modulation, None


@torch.library.custom_op(
    "sora_train::norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor? y, Tensor modulation, float eps) -> (Tensor, Tensor, Tensor)",
)
def run_forward(x: Tensor, y: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from sora_train.kernels.norm_modulate_triton import norm_modulate_forward

    made = allocate_outputs(x, y, modulation, eps)
    x, y = laid_out_as(torch.empty_like(x), x), None if y is None else y.contiguous()
    launch(norm_modulate_forward, (x, y), modulation, made, x, SHORTEST, eps)
    return made


@torch.library.custom_op(
    "sora_train::norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_h, Tensor x, Tensor? y, Tensor modulation, Tensor stats) -> "
    "(Tensor, Tensor, Tensor)",
)
def run_backward(
    grad_out: Tensor, grad_h: Tensor, x: Tensor, y: Tensor | None, modulation: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_train.kernels.norm_modulate_triton import norm_modulate_backward

    grad_x, grad_y, sums = allocate_gradients(grad_out, grad_h, x, y, modulation, stats)
    x, grad_out, y = laid_out_as(grad_x, x), laid_out_as(grad_x, grad_out), None if y is None else y.contiguous()
    length = max(SHORTEST, math.ceil(len(stats) * block_and_warps(x)[1] / WARPS_AT_ONCE))
    groups = modulation.shape[:3].numel()
    parts = stats.new_empty(groups, math.ceil(len(stats) / max(groups, 1) / length), *modulation.shape[3:])
    made = stats, grad_x, grad_y, parts
    launch(norm_modulate_backward, (grad_out, grad_h.contiguous(), x, y), modulation, made, x, length)
    return grad_x, grad_y, sums.copy_(parts.sum(1).view(sums.shape))


@run_forward.register_fake
def allocate_outputs(x: Tensor, y: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((x.shape[:3].numel(), 2), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(0) if y is None else torch.empty_like(x), x.new_empty(x.shape), stats


@run_backward.register_fake
def allocate_gradients(
    grad_out: Tensor, grad_h: Tensor, x: Tensor, y: Tensor | None, modulation: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0 if y is None else x.shape), modulation.new_empty(modulation.shape)


def laid_out_as(model: Tensor, x: Tensor) -> Tensor:
    """x in the layout of another tensor of its shape, copied if it has another."""
    strides = zip(x.shape, x.stride(), model.stride(), strict=True)
    return x if all(a == b for size, a, b in strides if size > 1) else torch.empty_like(model).copy_(x)


def block_and_warps(x: Tensor) -> tuple[int, int]:
    """A row's width as a power of two, and the number of warps: 8 values per thread, so no register spills."""
    block = max(16, 2 ** math.ceil(math.log2(x.shape[3])))
    return block, max(1, block // 256)


def launch(
    kernel: Any, taken: tuple[Tensor | None, ...], modulation: Tensor, made: tuple[Tensor, ...], x: Tensor, length: int,
    *eps: float,
) -> None:  # fmt: skip
    """Runs a kernel on all rows. The order of sums depends on the shapes alone."""
    if not x.numel():
        return
    if modulation.stride(4) != 1:
        modulation = modulation.contiguous()
    b, d, y_strides = x.shape[0], x.shape[3], [x.shape[axis:].numel() for axis in (1, 2, 3)]
    g, s = (2, 1) if modulation.shape[2] > 1 else (1, 2)  # rows that share a modulation are one after the other
    groups = b * modulation.shape[g]
    members = x.shape[:3].numel() // groups
    chunks, (block, warps) = math.ceil(members / length), block_and_warps(x)
    strides = [each[axis] for each in (x.stride(), y_strides) for axis in (0, g, s)]
    strides += [modulation.shape[g], *(modulation.stride(axis) for axis in (0, g, 3))]
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        kernel[(groups * chunks,)](
            *taken, modulation, *made, members, chunks, length, x.shape[g], x.shape[s], *strides, *eps, d, block,
            modulation.shape[3] == 3,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
