"""`sora bench attention`: the attention of a model's blocks by torch's backends and by our kernels.

Each kind of a block's attention (spatial, temporal or joint, and to the text) is measured alone, forward and backward,
from the projection's output to its gradient. `torch` is what the model uses, except where `triton` fits. A backend
that cannot compute a case is named in a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from sora_train.bench.case import Case, CaseOptions, relative, size_of
from sora_train.bench.core import Row, Table, interleave, log, spread
from sora_train.bench.model import DTYPES
from sora_train.kernels.short_attention import allocate_output, fits_short_attention, launch, short_attention
from sora_train.model.attention_shapes import AttentionShape, attention_shapes
from sora_train.train.hardware import seconds

CALLS = 20
"""Calls of one measurement. A short call on a GPU takes less time than its launch, which a larger batch hides."""
SHARE = 64
"""Heads are padded to multiples of this width in the variant `padded`."""


class Options(CaseOptions):
    """The flags."""

    attention: tuple[Literal["factorised", "joint"], ...] = ("factorised",)
    """Attention of the model."""
    heads: tuple[NonNegativeInt, ...] = (0,)
    """Attention heads, such as 16 9; 0: those of the preset."""
    shapes: tuple[str, ...] = ("16x256x256",)
    """Frames, height and width of clips in pixels."""
    flex: bool = False
    """Measure FlexAttention too, which is compiled for each shape first."""
    tiles: bool = False
    """Measure our kernels with other tiles too: `triton 32/2` has 32 tokens and 2 warps."""


def run_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """With heads padded to a multiple of `SHARE`."""
    width = q.shape[-1]
    q, k, v = (pad(x, (0, -width % SHARE)) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, scale=1 / math.sqrt(width))[..., :width]


def run_flash3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention-3, whose package is `flash_attn_interface`. It has no mask."""
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    if mask is not None:
        raise ValueError("FlashAttention-3 takes no mask")
    y = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)


def run_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """FlexAttention without a mask."""
    if mask is not None:
        raise ValueError("measured without a mask only")
    return compiled_flex()(q, k, v)


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def variants(
    case: Case, one: AttentionShape, options: Options
) -> dict[str, Callable[[], tuple[Tensor, Callable[[], object]]]]:
    """By name, what calculates the output and returns it with a function that calculates the gradients."""
    device = torch.device(case.device)
    inputs, mask = one.inputs(device, DTYPES[case.dtype]), one.mask(device)
    by = partial(one.run, inputs, mask)
    found: dict[str, tuple[Any, Callable[[], Tensor]]] = {"torch": (nullcontext, by)}
    if one.k % SHARE:
        found["padded"] = nullcontext, partial(by, run_padded)
    if case.device != "cpu":
        for name in ("flash", "cudnn", "efficient"):
            backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
            found[name] = partial(sdpa_kernel, backend), by
        if options.flex:
            found["flex"] = nullcontext, partial(by, run_flex)
        if find_spec("flash_attn_interface"):
            found["flash3"] = nullcontext, partial(by, run_flash3)
    fits = one.kind != "text" and fits_short_attention(inputs[0], one.m)
    if fits:
        found["triton"] = nullcontext, partial(short_attention, inputs[0], one.m)

    def run(context: Any, forward: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        with context():
            y = forward()
        return y, partial(torch.autograd.grad, y, inputs, torch.ones_like(y), retain_graph=True)

    tiles = [(s, warps) for s in (16, 32, 64) for warps in (1, 2, 4) if s >= one.s and fits and options.tiles]
    others = {f"triton {s}/{warps}": partial(run_tile, inputs[0].detach(), one.m, (s, warps)) for s, warps in tiles}
    return {name: partial(run, *each) for name, each in found.items()} | others


def run_tile(qkv: Tensor, heads: int, tile: tuple[int, int]) -> tuple[Tensor, Callable[[], object]]:
    """Our kernels with a tile of so many tokens and warps."""
    from sora_train.kernels.short_attention_triton import short_attention_backward, short_attention_forward

    out, grad_qkv = allocate_output(qkv, heads), torch.empty_like(qkv)
    launch(short_attention_forward, (qkv, out), heads, tile)
    backward = partial(launch, short_attention_backward, (qkv, torch.ones_like(out), grad_qkv), heads, tile)
    return out, backward


def turn(run: Callable[[], tuple[Tensor, Callable[[], object]]]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    _, backward = run()
    backward()
    forward_s = seconds(lambda: [run() for _ in range(CALLS)])
    return 1e3 * forward_s / CALLS, 1e3 * seconds(lambda: [backward() for _ in range(CALLS)]) / CALLS


def bench(options: Options) -> list[Table]:
    """One row for each variant of each kind of attention."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    notes = [f"median (minimum – maximum) of {options.rounds} turns of {CALLS} calls; difference: from torch's output"]
    for preset, attention, heads, shape in product(options.presets, options.attention, options.heads, options.shapes):
        case = Case(preset, attention, size_of(shape), options.dtype, "none", options.batch, options.text_tokens,
                    options.device, heads)  # fmt: skip
        log(str(case))
        for one in attention_shapes(case.model, case.latents, case.batch, case.text_tokens):
            runs = variants(case, one, options)
            outputs, _ = interleave({name: lambda run=run: run()[0].detach() for name, run in runs.items()}, 1, 0)
            times, errors = interleave({name: partial(turn, run) for name, run in runs.items()}, options.rounds)
            notes += [f"{preset} {one.kind}: no {name}: {error[:100]}" for name, error in errors.items()]
            rows += [
                row_of(case, one, name, each) | {"difference": relative(outputs[name][0], outputs["torch"][0])}
                for name, each in times.items()
            ]
    return [Table("attention", rows, notes)]


def row_of(case: Case, one: AttentionShape, name: str, turns: list[tuple[float, float]]) -> Row:
    """The row of a variant: its times and the rates that follow from them."""
    forward, backward = spread([turn[0] for turn in turns]), spread([turn[1] for turn in turns])
    return {
        "model": case.preset,
        "attention": one.kind,
        "groups": one.g,
        "tokens": f"{one.s}" if one.kind != "text" else f"{one.s} to {one.l}",
        "heads": f"{one.m} of {one.k}",
        "dtype": case.dtype,
        "contender": name,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": one.flops / forward["median"] / 1e9,
        "backward_tflops": 2.5 * one.flops / backward["median"] / 1e9,
    }
