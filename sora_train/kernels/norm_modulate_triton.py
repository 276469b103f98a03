"""The Triton kernels of `norm_modulate.py`.

A program computes up to `length` of the rows that share a modulation, which it reads once. The rows of x, and those of
y and h, are where the strides say.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from typing import no_type_check  # Triton needs the functions as they are, without the checks of the test run

import triton
import triton.language as tl

STAGES = tl.constexpr(3)
"""Rows that a program loads, calculates or stores at the same time."""


@triton.jit
@no_type_check
def program_of(modulation_ptr, members, chunks, length, mg, mb, ms, column):
    """The group of this program's rows, the first and last + 1 of them within it, and where its modulation is."""
    group, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * length
    row_ptr = modulation_ptr + (group // mg).to(tl.int64) * mb + (group % mg).to(tl.int64) * ms + column
    return group, first, tl.minimum(first + length, members), row_ptr


@triton.jit
@no_type_check
def offset_of(row, g, s, stride_b, stride_g, stride_s):
    """Where a row of the axes b, g and s begins."""
    b = (row // (g * s)).to(tl.int64)
    return b * stride_b + (row // s % g).to(tl.int64) * stride_g + (row % s).to(tl.int64) * stride_s


@triton.jit
@no_type_check
def norm_modulate_forward(
    x_ptr, y_ptr, modulation_ptr, out_ptr, h_ptr, stats_ptr,
    members, chunks, length, g, s, xb, xg, xs, hb, hg, hs, mg, mb, ms, mk, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < D
    group, first, end, modulation_ptr = program_of(modulation_ptr, members, chunks, length, mg, mb, ms, column)
    if GATED:
        gate = tl.load(modulation_ptr, inside, 0.0).to(WIDE)
        modulation_ptr += mk
    shift = tl.load(modulation_ptr, inside, 0.0).to(WIDE)
    scale = 1 + tl.load(modulation_ptr + mk, inside, 0.0).to(WIDE)
    for member in tl.range(first, end, num_stages=STAGES):
        row = group * members + member
        at_x = offset_of(row, g, s, xb, xg, xs) + column
        at_h = offset_of(row, g, s, hb, hg, hs) + column
        x = tl.load(x_ptr + at_x, inside, 0.0).to(WIDE)
        if y_ptr is not None:
            y = tl.load(y_ptr + at_h, inside, 0.0).to(WIDE)
            if GATED:
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
    grad_out_ptr, grad_h_ptr, x_ptr, y_ptr, modulation_ptr, stats_ptr, grad_x_ptr, grad_y_ptr, sums_ptr,
    members, chunks, length, g, s, xb, xg, xs, hb, hg, hs, mg, mb, ms, mk,
    D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < D
    group, first, end, modulation_ptr = program_of(modulation_ptr, members, chunks, length, mg, mb, ms, column)
    grad_shift, grad_scale = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    if GATED:
        gate, grad_gate = tl.load(modulation_ptr, inside, 0.0).to(WIDE), tl.zeros([BLOCK], WIDE)
        modulation_ptr += mk
    scale = 1 + tl.load(modulation_ptr + mk, inside, 0.0).to(WIDE)
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
        if GATED:
            y = tl.load(y_ptr + at_h, inside, 0.0).to(WIDE)
            grad_gate += grad * y
            tl.store(grad_y_ptr + at_h, (grad * gate).to(grad_y_ptr.dtype.element_ty), inside)
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 if GATED else 2) * D + column
    if GATED:
        tl.store(sums_ptr, grad_gate, inside)
        sums_ptr += D
    tl.store(sums_ptr, grad_shift, inside)
    tl.store(sums_ptr + D, grad_scale, inside)
