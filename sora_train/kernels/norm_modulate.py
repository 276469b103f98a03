"""Gated residual, layer norm and modulation between two products of a block, in one pass each way, on a GPU.

    x' = x + gate y        h = norm(x') (1 + scale) + shift

The forward pass reads x and y and writes x' and h. The backward pass reads the gradients of both, x' and y, writes the
gradients of x and y, and sums those of shift, scale and gate, for which torch.compile takes passes of their own. It
saves x', y and each row's mean and deviation. A row may have a modulation of its clip, its group, or its place in a
group: `b #g #s d`. Sums have a fixed order, so a repeated step gives the same bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from sora_train.errors import error_line
from sora_train.kernels.short_attention import TOLERANCE
from sora_train.kernels.tools import why_no_kernels

WIDEST = 8192
"""Width of a row that fits in registers."""
WARPS_AT_ONCE = 2048
"""Warps of the backward kernel, each of which makes sums of its own: about as many as a large GPU runs at once."""
SHORTEST = 8
"""Rows for which a program reads the modulation once."""
Calculate = Callable[..., tuple[Tensor, Tensor]]


def fits_norm_modulate(x: Tensor, shift: Tensor) -> bool:
    """Whether the kernels take tokens and a modulation: on NVIDIA GPUs, in bfloat16. `train/norms.py` checks them."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[3] <= WIDEST and 1 in shift.shape[1:3]


def norm_modulate(
    x: Float[Tensor, "b g s d"],
    shift: Float[Tensor, "b #g #s d"],
    scale: Float[Tensor, "b #g #s d"],
    y: Float[Tensor, "b g s d"] | None = None,
    gate: Float[Tensor, "b #g #s d"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
    """x' and h. Without `y`, x' is x; without `gate`, y is added as it is."""
    return NormModulate.apply(x, y, gate, shift, scale, eps)  # pyright: ignore[reportReturnType]


def torch_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None = None, gate: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `norm_modulate` computes, by torch."""
    dtype = x.dtype
    if y is not None:
        x = (x + y if gate is None else torch.addcmul(x, gate, y)).to(dtype)
    return x, torch.addcmul(shift, layer_norm(x.to(shift.dtype), x.shape[-1:], eps=eps), 1 + scale).to(dtype)


def why_no_norm_modulate(device: torch.device, d: int, modulation: torch.dtype, s: int = 300) -> str:
    """Why not to use the kernels for rows of width d, or an empty string: what they lack, or what they do wrong.

    Compares them with torch in float32, on groups of `s` rows.
    """
    if why := why_no_kernels(device):
        return why
    draw, off = torch.Generator().manual_seed(0), list[Tensor]()  # not the generator that training uses

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    x, y, *grads = (noise(2, 3, s, d) for _ in range(4))
    for rows in ((1, 1), (3, 1), (1, s)):
        shift, scale, gate = noise(2, *rows, 3, d, dtype=modulation).unbind(3)
        for inputs in ((x, shift, scale), (x, shift, scale, y), (x, shift, scale, y, gate)):
            try:
                found = passes(norm_modulate, inputs, grads)
                exact = passes(torch_norm_modulate, [each.float() for each in inputs], [each.float() for each in grads])
            except Exception as error:  # whatever Triton, its compiler or the driver raise
                return f"norms of width {d}: {error_line(error)}"
            off += [(a - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    most = float(torch.stack(off).max())
    # not a number is wrong too
    return "" if most < TOLERANCE else f"norms of width {d}: {most:.2g} of the largest value off torch's norm"


def passes(
    calculate: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and gradients of all inputs."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    out, h = calculate(*inputs)
    return [out.detach(), h.detach(), *torch.autograd.grad((out, h), inputs, grads)]


class NormModulate(torch.autograd.Function):
    """Returns x even where it is unchanged, so that the backward kernel adds its other gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, h, stats = run_forward(x, y, gate, shift, scale, eps)
        out = x.view_as(x) if y is None else out
        ctx.save_for_backward(out, *((y, gate) if gate is not None else ()), scale, stats)
        ctx.added, ctx.gated = y is not None, gate is not None
        return out, h

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *gated, scale, stats = ctx.saved_tensors
        y, gate = gated if ctx.gated else (None, None)
        grad_x, grad_y, sums = run_backward(grad_out, grad_h, x, y, gate, scale, stats)
        grads = sums.to(scale.dtype).unbind(-2)
        grad_y = (grad_y if ctx.gated else grad_x) if ctx.added else None
        return grad_x, grad_y, grads[2] if ctx.gated else None, grads[0], grads[1], None


@torch.library.custom_op(
    "sora_train::norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor? y, Tensor? gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
)
def run_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_train.kernels.norm_modulate_triton import norm_modulate_forward

    out, h, stats = allocate_outputs(x, y, gate, shift, scale, eps)
    x, y = laid_out_as(x, torch.empty_like(x)), y if y is None else y.contiguous()
    gate, shift, scale = alike(gate, shift, scale)
    launch(norm_modulate_forward, (x, y, gate, shift, scale, out, h, stats), x, scale, SHORTEST, eps)
    return out, h, stats


@torch.library.custom_op(
    "sora_train::norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_h, Tensor x, Tensor? y, Tensor? gate, Tensor scale, Tensor stats) -> "
    "(Tensor, Tensor, Tensor)",
)
def run_backward(
    grad_out: Tensor, grad_h: Tensor, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from sora_train.kernels.norm_modulate_triton import norm_modulate_backward

    grad_x, grad_y, sums = allocate_gradients(grad_out, grad_h, x, y, gate, scale, stats)
    x, grad_out, grad_h = laid_out_as(x, grad_x), laid_out_as(grad_out, grad_x), grad_h.contiguous()
    gate, scale = alike(gate, scale)
    y = y if y is None else y.contiguous()
    length = max(SHORTEST, math.ceil(len(stats) * warps_of(x) / WARPS_AT_ONCE))
    parts = stats.new_empty(sums.shape[:3].numel(), chunks_of(x, scale, length), *sums.shape[3:])
    tensors = grad_out, grad_h, x, y, gate, scale, stats, grad_x, grad_y, parts
    launch(norm_modulate_backward, tensors, x, scale, length)
    return grad_x, grad_y, parts.sum(1).view(sums.shape)


@run_forward.register_fake
def allocate_outputs(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(0) if y is None else torch.empty_like(x)
    return out, x.new_empty(x.shape), x.new_empty((x.shape[:3].numel(), 2), dtype=wide)


@run_backward.register_fake
def allocate_gradients(
    grad_out: Tensor, grad_h: Tensor, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kinds = 2 if gate is None else 3
    grad_y = x.new_empty(0 if gate is None else x.shape)
    return torch.empty_like(x), grad_y, stats.new_empty((*scale.shape[:3], kinds, x.shape[3]))


def laid_out_as(x: Tensor, model: Tensor) -> Tensor:
    """x in the layout of another tensor of its shape, copied if it has another."""
    strides = zip(x.shape, x.stride(), model.stride(), strict=True)
    return x if all(a == b for size, a, b in strides if size > 1) else torch.empty_like(model).copy_(x)


def alike(*modulation: Tensor | None) -> tuple[Any, ...]:
    """Tensors of one layout, each row of which is contiguous."""
    strides = {each.stride() for each in modulation if each is not None}
    if len(strides) == 1 and strides.pop()[-1] == 1:
        return modulation
    return tuple(each if each is None else each.contiguous() for each in modulation)


def warps_of(x: Tensor) -> int:
    """Warps of a program: a thread has 8 numbers of a row, so that none is spilled from registers."""
    return max(1, block_of(x) // 256)


def block_of(x: Tensor) -> int:
    return max(16, 2 ** math.ceil(math.log2(x.shape[3])))


def chunks_of(x: Tensor, modulation: Tensor, length: int) -> int:
    """Programs for the rows that share a row of modulation."""
    return math.ceil(x.shape[:3].numel() / modulation.shape[:3].numel() / length)


def launch(
    kernel: Any, tensors: tuple[Tensor | None, ...], x: Tensor, modulation: Tensor, length: int, *eps: float
) -> None:
    """Runs a kernel on all rows. The order of sums depends on the shapes alone."""
    if not x.numel():
        return
    b, *sizes, d = x.shape
    axes = (2, 1) if modulation.shape[2] > 1 else (1, 2)  # rows that share a modulation are one after the other
    (g, s), each = (x.shape[axis] for axis in axes), modulation.shape[axes[0]]
    contiguous = (sizes[0] * sizes[1] * d, sizes[1] * d, d)
    strides = [of[axis] for of in (x.stride(), contiguous) for axis in (0, *axes)]
    chunks, members = chunks_of(x, modulation, length), x.shape[:3].numel() // (b * each)
    numbers = (members, chunks, length, g, s, *strides, each, modulation.stride(0), modulation.stride(axes[0]), *eps)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        kernel[(b * each * chunks,)](*tensors, *numbers, d, block_of(x), num_warps=warps_of(x), enable_fp_fusion=True)
