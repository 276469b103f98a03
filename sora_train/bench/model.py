"""`sora bench model`: training steps of our model and of diffusers' `LatteTransformer3DModel` on the same weights.

A step is forward, backward and AdamW. `python -m sora_train.bench.model` needs only torch, einops, safetensors and
jaxtyping. Outputs are compared first: times of a variant whose output differs are not reported.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from sora_train.bench.core import Flags, Row, Table, finish, interleave, log, spread
from sora_train.bench.variant import (
    Case,
    TrainingStep,
    Variant,
    add_case_flags,
    check_device,
    relative,
    seeded,
    size_of,
)
from sora_train.errors import RecipeError, UserError
from sora_train.model.flops import forward_flops, parameter_count
from sora_train.train.hardware import peak_flops

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of outputs, over the largest output, that rounding explains."""
ABOUT = """Times forward, backward and AdamW of our model and of diffusers' LatteTransformer3DModel with the same
weights and inputs, eager and compiled, in turns. Measures every combination of the flags that
take several values. Example for a GPU: sora bench model --presets latte_t2v --batch 8 --compile no yes --checkpointing
none selective"""


def flags_of(prog: str) -> Flags:
    """The flags of the command."""
    flags = Flags(prog, ABOUT)
    add_case_flags(flags)
    flags.flag("attention", ["factorised"], "diffusers has factorised only", choices=["factorised", "joint"])
    flags.flag("shapes", ["16x256x256"], "frames, height and width of clips in pixels")
    flags.flag(
        "dtypes", [""], "of weights and arithmetic; by default bf16 on a GPU, else fp32", choices=["fp32", "bf16"]
    )
    flags.flag("compile", ["no"], "torch.compile; takes minutes for each shape", choices=["no", "yes"])
    flags.flag("checkpointing", ["none"], "activation checkpointing; diffusers uses none for selective",
               choices=["none", "selective", "full"])  # fmt: skip
    flags.flag("steps", 1, "steps of each measurement")
    flags.flag("warm_up", 1, "measurements that don't count")
    flags.flag("alone", False, "leave diffusers out")
    return flags


def cases(options: Namespace) -> Iterator[Case]:
    """Every combination of the flags."""
    check_device(options)
    default = "fp32" if options.device == "cpu" else "bf16"
    for preset, attention, shape, dtype, checkpointing in product(
        options.presets, options.attention, options.shapes, options.dtypes, options.checkpointing
    ):
        yield Case(
            preset, attention, size_of(shape), dtype or default, checkpointing, options.batch, options.text_tokens,
            options.device, options.threads, options.steps,
        )  # fmt: skip


def bench(options: Namespace) -> list[Table]:
    """One row for each variant of each case."""
    rows: list[Row] = []
    failed: list[str] = []
    compare = find_spec("diffusers") is not None and not options.alone
    for case in list(cases(options)):
        log(str(case))
        found, errors = measure(case, options, compare and case.attention == "factorised")
        rows += found
        failed += [f"{case}: {line}" for line in errors]
    notes = [
        f"median (minimum – maximum) of {options.rounds} turns; `times diffusers`: eager diffusers' time over "
        "this one's; difference: the largest difference from diffusers' output, over its largest value",
        "memory: weights, moments, gradients and activations as torch counts them",
    ]
    if not compare:
        notes.append("without diffusers' model" + ("" if options.alone else ": diffusers is not installed"))
    return [Table("model", rows, notes, failed)]


def measure(case: Case, options: Namespace, compare: bool) -> tuple[list[Row], list[str]]:
    """The rows of one case, and its errors: compares outputs, then times in turns, then measures memory."""
    torch.set_num_threads(case.threads)
    with tempfile.TemporaryDirectory() as folder:
        if compare:
            write_weights(case, folder)
        variants = [
            Variant(case, implementation, compiled == "yes", folder if compare else "")
            for implementation in (("diffusers", "ours") if compare else ("ours",))
            for compiled in sorted(set(options.compile))
        ]
        made, errors = interleave({one.name: partial(TrainingStep, one) for one in variants}, 1, warm_up=0)
    steps = {name: one for name, (one,) in made.items()}
    outputs, more = interleave({name: step.output for name, step in steps.items()}, 1, warm_up=0)
    errors |= more
    reference = next(iter(outputs), "")
    differences = {name: relative(one, outputs[reference][0]) for name, (one,) in outputs.items()}
    for name, difference in differences.items():
        if difference > TOLERANCE[case.dtype]:
            errors[name] = f"its output differs from {reference}'s by {difference:.2g}, so it is not timed"
    calls = {name: steps[name].turn for name in outputs if name not in errors}
    times, more = interleave(calls, options.rounds, options.warm_up)
    errors |= more
    memory, more = interleave({name: steps[name].memory for name in times}, 1, warm_up=0)
    errors |= more
    base = [turn["step_s"] for turn in times.get("diffusers", [])]
    rows = [row_of(case, name, each, base, differences[name], memory.get(name, [None])[0])
            for name, each in times.items()]  # fmt: skip
    return rows, [f"{name}: {error}" for name, error in errors.items()]


def write_weights(case: Case, folder: str) -> None:
    """Writes the weights that both implementations load."""
    from sora_train.model import Latte
    from sora_train.model.convert import to_diffusers

    model = seeded(case)
    assert isinstance(model, Latte)
    to_diffusers(model, folder, frames=case.shape[0])


def row_of(
    case: Case, name: str, each: list[dict[str, float]], base: list[float], difference: float, memory: float | None
) -> Row:
    """The row of a variant: its times and the rates that follow from them."""
    (f, h, w), model = case.latents, case.model
    times: dict[str, Any] = {key: spread([turn[key] for turn in each]) for key in each[0]}
    step = times["step_s"]["median"]
    flops = 3 * case.batch * forward_flops(model, f, h, w, case.text_tokens) / step
    peak = peak_flops(torch.device(case.device), case.dtype == "bf16")
    return {
        "model": case.preset,
        "attention": case.attention,
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
        # by turn, so changes in the machine's speed cancel
        "times diffusers": spread([b / turn["step_s"] for b, turn in zip(base, each, strict=False)]) if base else None,
        "difference": difference,
        "parameters_m": parameter_count(model) / 1e6,
    }


def main(words: Sequence[str], prog: str = "sora bench model") -> int:
    """The command; returns the exit status."""
    options = flags_of(prog).parse(words)
    return finish(bench(options), ["model", *words], options.out)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], "python -m sora_train.bench.model"))
    except UserError as error:
        print(f"sora bench model: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
