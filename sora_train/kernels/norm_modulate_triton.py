"""The Triton kernels of `norm_modulate.py`. Only modules named `*_triton.py` import Triton.

A program computes up to `length` of the rows that share a row of modulation, which it reads once. Rows may be strided:
those of the residual stream (x) lie as the caller has them, those of products (y, h) in the order of their axes.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from typing import no_type_check  # Triton needs the functions as they are, without the checks of the test run

import triton
import triton.language as tl

STAGES = tl.constexpr(3)
"""Rows that a program loads, calculates or stores at the same time."""


@triton.jit
@no_type_check
def rows_of(members, chunks, length):
    """The group of this program's rows, and the first and last + 1 of them within the group."""
    group, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * length
    return group, first, tl.minimum(first + length, members)


@triton.jit
@no_type_check
def offset_of(row, g, s, stride_b, stride_g, stride_s):
    """Where a row begins in a tensor of these strides, its axes b, g and s."""
    b = (row // (g * s)).to(tl.int64)
    return b * stride_b + (row // s % g).to(tl.int64) * stride_g + (row % s).to(tl.int64) * stride_s


@triton.jit
@no_type_check
def norm_modulate_forward(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, out_ptr, h_ptr, stats_ptr,
    members, chunks, length, g, s, xb, xg, xs, hb, hg, hs, mg, mb, ms, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    group, first, end = rows_of(members, chunks, length)
    column = tl.arange(0, BLOCK)
    inside = column < D
    modulation = (group // mg).to(tl.int64) * mb + (group % mg).to(tl.int64) * ms + column
    shift = tl.load(shift_ptr + modulation, inside, 0.0).to(WIDE)
    scale = 1 + tl.load(scale_ptr + modulation, inside, 0.0).to(WIDE)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + modulation, inside, 0.0).to(WIDE)
    for member in tl.range(first, end, num_stages=STAGES):
        row = group * members + member
        at_x = offset_of(row, g, s, xb, xg, xs) + column
        at_h = offset_of(row, g, s, hb, hg, hs) + column
        x = tl.load(x_ptr + at_x, inside, 0.0).to(WIDE)
        if y_ptr is not None:
            y = tl.load(y_ptr + at_h, inside, 0.0).to(WIDE)
            if gate_ptr is not None:
                y *= gate
            out = (x + y).to(x_ptr.dtype.element_ty)
            tl.store(out_ptr + at_x, out, inside)
            x = out.to(WIDE)  # the backward pass has it so
        mean = tl.sum(x, 0) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        tl.store(h_ptr + at_h, (centred * rstd * scale + shift).to(h_ptr.dtype.element_ty), inside)
        tl.store(stats_ptr + 2 * row, mean)
        tl.store(stats_ptr + 2 * row + 1, rstd)


@triton.jit
@no_type_check
def norm_modulate_backward(
    grad_out_ptr, grad_h_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, stats_ptr, grad_x_ptr, grad_y_ptr, sums_ptr,
    members, chunks, length, g, s, xb, xg, xs, hb, hg, hs, mg, mb, ms,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    group, first, end = rows_of(members, chunks, length)
    column = tl.arange(0, BLOCK)
    inside = column < D
    modulation = (group // mg).to(tl.int64) * mb + (group % mg).to(tl.int64) * ms + column
    scale = 1 + tl.load(scale_ptr + modulation, inside, 0.0).to(WIDE)
    grad_shift, grad_scale = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + modulation, inside, 0.0).to(WIDE)
        grad_gate = tl.zeros([BLOCK], WIDE)
    for member in tl.range(first, end, num_stages=STAGES):
        row = group * members + member
        at_x = offset_of(row, g, s, xb, xg, xs) + column
        at_h = offset_of(row, g, s, hb, hg, hs) + column
        grad_h = tl.load(grad_h_ptr + at_h, inside, 0.0).to(WIDE)
        x = tl.load(x_ptr + at_x, inside, 0.0).to(WIDE)
        grad = tl.load(grad_out_ptr + at_x, inside, 0.0).to(WIDE)
        mean, rstd = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        grad_shift += grad_h
        grad_scale += grad_h * normed
        grad_h *= scale
        along, across = tl.sum(grad_h * normed, 0) / D, tl.sum(grad_h, 0) / D
        grad += (grad_h - across - normed * along) * rstd
        tl.store(grad_x_ptr + at_x, grad.to(grad_x_ptr.dtype.element_ty), inside)
        if gate_ptr is not None:
            y = tl.load(y_ptr + at_h, inside, 0.0).to(WIDE)
            grad_gate += grad * y
            tl.store(grad_y_ptr + at_h, (grad * gate).to(grad_y_ptr.dtype.element_ty), inside)
    kinds = 3 if gate_ptr is not None else 2
    at_sums = sums_ptr + tl.program_id(0).to(tl.int64) * kinds * D + column
    tl.store(at_sums, grad_shift, inside)
    tl.store(at_sums + D, grad_scale, inside)
    if gate_ptr is not None:
        tl.store(at_sums + 2 * D, grad_gate, inside)
