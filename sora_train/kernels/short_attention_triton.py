"""The Triton kernels of `short_attention.py`. The only module that imports Triton.

A program computes one head of a tile of BLOCK_S tokens: BLOCK_S // S whole groups. All scores of a tile are in
registers, so the backward pass recomputes the softmax from queries and keys, and needs neither atomics nor other tiles.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from typing import no_type_check  # Triton needs the functions as they are, without the checks of the test run

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels, on a CPU. Its products take no bfloat16."""


@triton.jit
@no_type_check
def tile_of(tokens, S: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tokens and columns of this program's tile, which of them exist, and which pairs of tokens share a group.

    Heads are the fastest axis of the grid: a token's heads are neighbours in memory and are read at the same time.
    Rows after the tile's last group are zero. They form a group of their own, so no softmax has an empty row.
    """
    head, tile = tl.program_id(0) % M, tl.program_id(0) // M
    row, column = tl.arange(0, BLOCK_S), head * K + tl.arange(0, BLOCK_K)
    token = tile.to(tl.int64) * (BLOCK_S // S * S) + row
    exists = (row < BLOCK_S // S * S) & (token < tokens)
    exists = exists[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :]
    group = row // S
    return token[:, None], column[None, :], exists, group[:, None] == group[None, :]


@triton.jit
@no_type_check
def dot(a, b):
    """The product of two tiles, without TF32, in the accumulator's dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
@no_type_check
def softmax_of(q, k, together, SCALE: tl.constexpr):
    """The attention weights of a tile. SCALE includes log2(e), since exp2 is the instruction that GPUs have."""
    scores = dot(q, tl.trans(k)) * SCALE
    scores = tl.where(together, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
@no_type_check
def short_attention_forward(
    qkv_ptr, out_ptr, tokens,
    S: tl.constexpr, M: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, column, exists, together = tile_of(tokens, S, M, K, BLOCK_S, BLOCK_K)
    q_ptr = qkv_ptr + token * (3 * M * K) + column
    q = tl.load(q_ptr, exists, 0.0)
    k = tl.load(q_ptr + M * K, exists, 0.0)
    v = tl.load(q_ptr + 2 * M * K, exists, 0.0)
    weights = softmax_of(q, k, together, SCALE)
    out = dot(weights.to(v.dtype), v)
    tl.store(out_ptr + token * (M * K) + column, out.to(v.dtype), exists)


@triton.jit
@no_type_check
def short_attention_backward(
    qkv_ptr, grad_ptr, grad_qkv_ptr, tokens,
    S: tl.constexpr, M: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, column, exists, together = tile_of(tokens, S, M, K, BLOCK_S, BLOCK_K)
    q_ptr = qkv_ptr + token * (3 * M * K) + column
    q = tl.load(q_ptr, exists, 0.0)
    k = tl.load(q_ptr + M * K, exists, 0.0)
    v = tl.load(q_ptr + 2 * M * K, exists, 0.0)
    grad = tl.load(grad_ptr + token * (M * K) + column, exists, 0.0)
    weights = softmax_of(q, k, together, SCALE)
    grad_v = dot(tl.trans(weights.to(grad.dtype)), grad)
    grad_weights = dot(grad, tl.trans(v))
    grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
    grad_scores = (grad_scores * (SCALE * 0.6931471805599453)).to(q.dtype)  # ln 2: SCALE without its log2(e)
    grad_q = dot(grad_scores, k)
    grad_k = dot(tl.trans(grad_scores), q)
    grad_q_ptr = grad_qkv_ptr + token * (3 * M * K) + column
    tl.store(grad_q_ptr, grad_q.to(q.dtype), exists)
    tl.store(grad_q_ptr + M * K, grad_k.to(q.dtype), exists)
    tl.store(grad_q_ptr + 2 * M * K, grad_v.to(q.dtype), exists)
