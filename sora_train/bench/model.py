"""`sora bench model`: training steps of our model and of diffusers', a Latte or a Wan, on the same weights.

A step is forward, backward and AdamW, eager and compiled. Every combination of the flags that take several values is
measured. Outputs are compared first: times of a variant whose output differs are not reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from sora_train.bench.case import Case, CaseOptions, inputs, relative, seeded, size_of
from sora_train.bench.core import Row, Table, interleave, log, spread
from sora_train.codec.imports import without_torchao
from sora_train.model.flops import forward_flops, parameter_count
from sora_train.train.hardware import peak_flops, seconds, synchronize
from sora_train.train.norms import fuse_norms
from sora_train.train.profile import LISTED, Breakdown, activities, breakdown

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp8": 0.2}
"""Largest difference of outputs, over the largest output, that rounding explains."""
PROFILED = 3
"""Steps that --profile traces."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class Options(CaseOptions):
    """The flags."""

    attention: tuple[Literal["factorised", "joint"], ...] = ("factorised",)
    """Attention of our model; diffusers has factorised only."""
    heads: tuple[NonNegativeInt, ...] = (0,)
    """Attention heads of our model, such as 16 9; 0: those of the preset."""
    shapes: tuple[str, ...] = ("16x256x256",)
    """Frames, height and width of clips in pixels."""
    dtypes: tuple[Literal["fp32", "bf16", "fp8"], ...] = ()
    """Of weights and arithmetic; if not given, bf16 on a GPU, else fp32. `fp8` is as in training; diffusers then
    computes in bf16."""
    compile: tuple[Literal["no", "yes"], ...] = ("no",)
    """torch.compile of each block; takes up to a minute for each shape."""
    norms: tuple[Literal["torch", "kernels"], ...] = ("torch",)
    """Norms, modulation and residuals of our model by torch, or by our kernels where they fit: in bf16 on a GPU."""
    checkpointing: tuple[Literal["none", "selective", "full"], ...] = ("none",)
    """Activation checkpointing; diffusers uses none for selective."""
    alone: bool = False
    """Leave diffusers out."""
    profile: bool = False
    """Also print the time of each part of a step (products, attention, pointwise, optimizer, gaps) and its slowest
    kernels."""


def cases(options: Options) -> Iterator[Case]:
    """Every combination of the flags."""
    for preset, attention, heads, shape, dtype, checkpointing in product(
        options.presets, options.attention, options.heads, options.shapes, options.dtypes or [options.dtype],
        options.checkpointing,
    ):  # fmt: skip
        yield Case(preset, attention, size_of(shape), dtype, checkpointing, options.batch, options.text_tokens,
                   options.device, heads)  # fmt: skip


class TrainingStep:
    """A model, its AdamW and one batch. `weights` is a folder in diffusers' format; empty: random ones."""

    def __init__(self, case: Case, diffusers: bool, compiled: bool, weights: str = "", fused: bool = False) -> None:
        device, self.dtype = torch.device(case.device), DTYPES[case.dtype]
        with torch.device(device):  # random weights are then drawn there, which is faster
            model, self.run = (load_diffusers if diffusers else load_ours)(case, compiled, weights)
        if fused:
            fuse_norms(model)  # pyright: ignore[reportArgumentType]
        self.model = model.to(device, self.dtype).train()
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.inputs = tuple(x.to(device) for x in inputs(case))

    def forward(self) -> Tensor:
        x, t, text, mask = self.inputs
        return self.run(self.model, x.to(self.dtype), t, text.to(self.dtype), mask).float()

    def output(self) -> Tensor:
        """The model's output on the batch, float32 `b f c h w`."""
        with torch.no_grad():
            return self.forward().cpu()

    def turn(self) -> dict[str, float]:
        """Seconds of forward, backward, optimizer and all of a step."""
        loss: list[Tensor] = []

        def update() -> None:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

        took = {
            "forward_s": seconds(lambda: loss.append(self.forward().square().mean())),
            "backward_s": seconds(lambda: loss[0].backward()),
            "optimizer_s": seconds(update),
        }
        return {**took, "step_s": sum(took.values())}

    def memory(self) -> float:
        """Peak memory of a step on the GPU in 10⁹ bytes, with weights and moments."""
        moments = [value for state in self.adam.state.values() for value in state.values()]
        held = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *moments))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.turn()
        return (held + torch.cuda.max_memory_allocated() - before) / 1e9


Network = tuple[nn.Module, Callable[..., Tensor]]
"""A model, and how to call it: `run(model, x, t, text, mask)` with our axes."""


def load_ours(case: Case, compiled: bool, weights: str) -> Network:
    """Our model, in FP8, checkpointed and compiled as training does it."""
    from sora_train.model.convert import from_diffusers
    from sora_train.train.activation_checkpointing import apply_activation_checkpointing
    from sora_train.train.compile import compile_blocks
    from sora_train.train.fp8 import use_fp8

    model = from_diffusers(weights) if weights else seeded(case)
    if case.dtype == "fp8":
        use_fp8(model, torch.device(case.device))
    apply_activation_checkpointing(model, case.checkpointing)  # pyright: ignore[reportArgumentType]
    if compiled:
        compile_blocks(model, 4)  # with and without gradients, and with both norms
    return model, lambda model, x, t, text, mask: model(x, t, text, mask)


@without_torchao()
def load_diffusers(case: Case, compiled: bool, weights: str) -> Network:
    """diffusers' model, compiled block by block as ours is. Its axes are `b c f h w`.

    A Latte's mask is an additive bias for every frame; a Wan takes text with zeros up to its number of tokens.
    """
    from diffusers import LatteTransformer3DModel, WanTransformer3DModel
    from diffusers.utils import logging

    from sora_train.model.convert_latte import latte_settings
    from sora_train.model.convert_wan import wan_settings

    logging.set_verbosity_error()

    def call_latte(model: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask, 0.0, -10000.0).to(text.dtype)[:, None].repeat_interleave(x.shape[1], dim=0)
        return model(x.transpose(1, 2), t, text, bias, return_dict=False)[0].transpose(1, 2)

    def call_wan(model: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        zeros = (0, 0, 0, case.model.text_tokens - text.shape[1])
        text = nn.functional.pad(text.masked_fill(~mask[..., None], 0), zeros)
        return model(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)

    wan = case.model.family == "wan"
    kind: Any = WanTransformer3DModel if wan else LatteTransformer3DModel
    if weights:
        model = kind.from_pretrained(weights, low_cpu_mem_usage=wan)  # a Wan keeps some parts in float32
    else:
        settings = wan_settings(case.model) if wan else latte_settings(case.model, case.shape[0], padded=False)
        model = kind.from_config(settings)
    if case.checkpointing == "full":
        model.enable_gradient_checkpointing()
    if compiled:
        for module in model.modules():
            if type(module).__name__.endswith("TransformerBlock"):
                module.compile(fullgraph=True, dynamic=False)
    return model, call_wan if wan else call_latte


def bench(options: Options) -> list[Table]:
    """One row for each variant of each case."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    failed: list[str] = []
    profiles: list[Table] = []
    for case in list(cases(options)):
        log(str(case))
        found, more, errors = measure(case, options, not options.alone and case.is_in_diffusers)
        rows += found
        profiles += more
        failed += [f"{case}: {line}" for line in errors]
    note = (
        f"median (minimum – maximum) of {options.rounds} turns; `times diffusers`: eager diffusers' time over "
        "this one's; difference: the largest difference from diffusers' output, over its largest value"
    )
    return [Table("model", rows, [note], failed), *profiles]


def measure(case: Case, options: Options, compare: bool) -> tuple[list[Row], list[Table], list[str]]:
    """Rows, profiles and errors of one case. Compares outputs, times variants in turns, then measures memory."""
    from sora_train.model.convert import to_diffusers

    with tempfile.TemporaryDirectory() as folder:
        if compare:
            to_diffusers(seeded(case), folder, frames=case.shape[0])
        making = {
            name + (", compiled" if compiled == "yes" else "") + (", kernels for norms" if fused else ""): partial(
                TrainingStep, case, name == "diffusers", compiled == "yes", folder if compare else "", fused
            )
            for name in (("diffusers", "ours") if compare else ("ours",))
            for compiled in sorted(set(options.compile))
            for fused in sorted({norms == "kernels" for norms in options.norms} if name == "ours" else {False})
        }
        made, errors = interleave(making, 1, warm_up=0)
    steps = {name: one for name, (one,) in made.items()}
    outputs, more = interleave({name: step.output for name, step in steps.items()}, 1, warm_up=0)
    errors |= more
    reference = next(iter(outputs), "")
    differences = {name: relative(one, outputs[reference][0]) for name, (one,) in outputs.items()}
    for name, difference in differences.items():
        if difference > TOLERANCE[case.dtype]:
            errors[name] = f"its output differs from {reference}'s by {difference:.2g}, so it is not timed"
    turns = {name: steps[name].turn for name in outputs if name not in errors}
    first, more = interleave(turns, 1, warm_up=0)
    errors |= more
    times, more = interleave({name: turns[name] for name in first}, options.rounds, warm_up=0)
    errors |= more
    on_gpu = torch.device(case.device).type == "cuda"
    memory, more = interleave({name: steps[name].memory for name in times if on_gpu}, 1, warm_up=0)
    errors |= more
    base = [turn["step_s"] for turn in times.get("diffusers", [])]
    rows = [
        row_of(case, name, each, base, differences[name], memory.get(name, [None])[0], first[name][0]["step_s"])
        for name, each in times.items()
    ]
    profiles, more = interleave({name: partial(profile, steps[name]) for name in times if options.profile}, 1, 0)
    errors |= more
    tables = [table for name, (found,) in profiles.items() for table in profile_tables(f"{case}, {name}", found)]
    return rows, tables, [f"{name}: {error}" for name, error in errors.items()]


def profile(step: TrainingStep) -> Breakdown:
    """Where the time of PROFILED steps goes."""
    device = next(step.model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        synchronize()
        with torch.profiler.profile(activities=activities(device)) as trace:
            for _ in range(PROFILED):
                step.turn()
        trace.export_chrome_trace(f"{folder}/trace.json")
        return breakdown(Path(folder) / "trace.json")


def profile_tables(what: str, found: Breakdown) -> list[Table]:
    """A table of the parts of a step and one of its slowest kernels."""

    def row(ms: float, calls: int) -> Row:
        return {"ms a step": ms / PROFILED, "share": ms / found.total_ms, "calls a step": calls / PROFILED}

    parts: list[Row] = [{"part": part, **row(*values)} for part, values in found.parts().items()]
    kernels: list[Row] = [
        {"part": kernel.part, **row(kernel.ms, kernel.calls), "kernel": kernel.name[:100].replace("|", "¦")}
        for kernel in found.kernels[:LISTED]
    ]
    note = (
        f"{found.total_ms / PROFILED:.3g} ms a step on the {found.device}, mean of {PROFILED} steps under the profiler"
    )
    return [Table(f"parts of a step: {what}", parts, [note]), Table(f"kernels of a step: {what}", kernels)]


def row_of(
    case: Case, name: str, each: list[dict[str, float]], base: list[float], difference: float | None,
    memory: float | None, first_s: float,
) -> Row:  # fmt: skip
    """The row of a variant: its times and the rates that follow from them."""
    (f, h, w), model = case.latents, case.model
    times: dict[str, Any] = {key: spread([turn[key] for turn in each]) for key in each[0]}
    step = times["step_s"]["median"]
    flops = 3 * case.batch * forward_flops(model, f, h, w, case.text_tokens) / step
    peak = peak_flops(torch.device(case.device), case.dtype != "fp32")
    return {
        "model": case.preset,
        "attention": case.attention,
        "heads": model.heads,
        "shape": "x".join(map(str, case.shape)),
        "batch": case.batch,
        "dtype": case.dtype,
        "checkpointing": case.checkpointing,
        "contender": name,
        **times,
        "tokens_per_s": case.batch * f * h * w / model.patch**2 / step,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "memory_gb": memory,
        "first_step_s": first_s,
        # by turn, so changes in the machine's speed cancel
        "times diffusers": spread([b / turn["step_s"] for b, turn in zip(base, each, strict=False)]) if base else None,
        "difference": difference,
        "parameters_m": parameter_count(model) / 1e6,
    }
