"""`sora bench model`: steps of our model beside those of diffusers' `LatteTransformer3DModel`, on the same weights.

A step is forward, backward and AdamW. Needs torch, einops, safetensors and jaxtyping alone: on a machine that has no
more, `python -m sora_train.bench.model` is the same. Outputs are compared first; if they differ, times mean nothing.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from sora_train.bench.core import Row, Table, interleave, say, spread
from sora_train.bench.options import Common, parse, refuse
from sora_train.bench.output import finish
from sora_train.bench.process import Process
from sora_train.bench.variant import Case, Contender, Trainee, relative, seeded
from sora_train.errors import RecipeError, UserError
from sora_train.model.config import PRESETS
from sora_train.model.flops import forward_flops, parameter_count
from sora_train.train.hardware import peak_flops

ALIKE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of outputs, over the largest output, that rounding explains."""
ABOUT = (
    "Times forward, backward and AdamW of our model beside diffusers' LatteTransformer3DModel with the same weights "
    "and inputs, eager and compiled, each in a process of its own that takes its turn. Every combination of the flags "
    "with several values is measured. Needs torch, einops, safetensors and jaxtyping alone: where nothing more is "
    "installed, `python -m sora_train.bench.model` takes the same flags.\n\nOn a GPU, for instance: sora bench model "
    "--presets latte_t2v --batch 8 --compile no yes --checkpointing none selective"
)


@dataclass(frozen=True)
class Options(Common):
    """What to measure."""

    presets: tuple[str, ...] = ("S",)
    """Shapes of the model: S, B, L, XL, latte_t2v, or tiny, which only shows that all works."""
    attention: tuple[Literal["factorised", "joint"], ...] = ("factorised",)
    """Factorised is diffusers' too; joint stands alone."""
    shapes: tuple[str, ...] = ("16x256x256",)
    """Frames, height and width of clips in pixels; latents are an eighth of the sides."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ()
    """Number format of weights and arithmetic; if not given fp32, on a GPU bf16."""
    compile: tuple[Literal["no", "yes"], ...] = ("no",)
    """Whether torch compiles; `no yes` measures both (minutes for each shape, and a C++ compiler on the CPU)."""
    checkpointing: tuple[Literal["none", "selective", "full"], ...] = ("none",)
    """What the backward pass computes again; diffusers knows no selective one and then keeps all."""
    batch: int = 1
    """Clips at a time."""
    text_tokens: int = 120
    """Tokens that captions are padded to; a quarter to all of them are real."""
    rounds: int = 5
    """Turns of each contender, of which the median counts."""
    steps: int = 1
    """Steps of a turn."""
    warm_up: int = 1
    """Turns before those that count."""
    device: str = ""
    """`cpu` or `cuda`; if not given the GPU, where there is one."""
    threads: int = 0
    """Threads on the CPU; 0 is one for every core."""
    alone: bool = False
    """Leave diffusers out."""


def bench(options: Options) -> list[Table]:
    """A row for each contender of each case. Raises RecipeError for flags that make no sense, before anything runs."""
    rows: list[Row] = []
    notes: list[str] = []
    failed: list[str] = []
    there = find_spec("diffusers") is not None and not options.alone
    if not there:
        notes.append("without diffusers' model" + ("" if options.alone else ", since diffusers is not installed"))
    for case in list(cases(options)):
        say(title(case))
        found, wrong = measure(case, options, there and case.attention == "factorised")
        rows += found
        failed += [f"{title(case)}: {line}" for line in wrong]
    if "joint" in options.attention:
        notes.append("diffusers has no joint attention to compare with")
    notes += [
        f"medians (lowest – highest) of {options.rounds} turns; `times diffusers` is diffusers' uncompiled step over "
        "this one; difference: largest of the outputs from diffusers', over its largest output",
        "memory: weights, moments, gradients and activations as torch counts them"
        + ("" if rows and "rss_gb" not in rows[0] else "; rss_gb: growth of the process, the libraries' own too"),
    ]
    return [Table("model", rows, notes, failed)]


def cases(options: Options) -> Iterator[Case]:
    """Every combination."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise RecipeError(f"--device {device} is not there; it takes cpu, or cuda where torch sees a GPU")
    for name in ("batch", "rounds", "steps", "text_tokens"):
        if not getattr(options, name):
            raise RecipeError(f"--{name} is 0; it takes 1 or more")
    for name in options.presets:
        if name not in (*PRESETS, "tiny"):
            raise RecipeError(f"--presets {name} is none; choices: {', '.join([*PRESETS, 'tiny'])}")
    for preset, attention, shape, dtype, checkpointing in product(
        options.presets,
        options.attention,
        map(size_of, options.shapes),
        options.dtypes or ("fp32" if device == "cpu" else "bf16",),
        options.checkpointing,
    ):
        yield Case(
            preset, attention, shape, dtype, checkpointing, options.batch, options.text_tokens, device,
            options.threads or torch.get_num_threads(), options.steps,
        )  # fmt: skip


def size_of(shape: str) -> tuple[int, int, int]:
    """`16x256x256` as numbers; RecipeError where it is no such thing, or sides don't divide by 16."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise RecipeError(f"--shapes {shape} is no shape; write frames, height and width, such as 16x256x256")
    frames, height, width = map(int, found.groups())
    if height % 16 or width % 16:
        raise RecipeError(f"--shapes {shape}: height and width must be multiples of 16 (VAE 8 x patch 2)")
    return frames, height, width


def title(case: Case) -> str:
    shape = "x".join(map(str, case.shape))
    kept = "" if case.checkpointing == "none" else f", {case.checkpointing} checkpointing"
    return f"{case.preset} {case.attention} {shape} batch {case.batch} {case.dtype} on {case.device}{kept}"


def measure(case: Case, options: Options, beside: bool) -> tuple[list[Row], list[str]]:
    """Rows of one case, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        weights = write_weights(case, folder) if beside else ""
        compiled = [word == "yes" for word in sorted(set(options.compile))]
        contenders = [
            Contender(case, whose, compile, weights)
            for whose in ("ours", "diffusers")
            for compile in compiled
            if whose == "ours" or beside
        ]
        processes = {contender.name: Process(Trainee, contender) for contender in contenders}
        try:
            return turns(case, options, processes)
        finally:
            for process in processes.values():
                process.end()


def write_weights(case: Case, folder: str) -> str:
    """A folder that both read the same weights from."""
    from sora_train.model import Latte
    from sora_train.model.convert import to_diffusers

    model = seeded(case)
    assert isinstance(model, Latte)
    to_diffusers(model, folder, frames=case.shape[0])
    return folder


def turns(case: Case, options: Options, processes: dict[str, Process]) -> tuple[list[Row], list[str]]:
    """Outputs first, then turns, then memory."""
    outputs, broken = interleave(
        {name: partial(process.ask, "output") for name, process in processes.items()}, rounds=1, warm_up=0
    )
    wrong = [f"{name}: {why}" for name, why in broken.items()]
    judge = next((name for name in ("diffusers", "ours") if name in outputs), None)
    differences = {name: relative(found[0], outputs[judge][0]) for name, found in outputs.items()} if judge else {}
    for name in [name for name, difference in differences.items() if difference > ALIKE[case.dtype]]:
        wrong.append(f"{name}: its output differs from {judge}'s by {differences[name]:.2g}, so its times are void")
        del outputs[name]
    acts = {name: partial(processes[name].ask, "turn") for name in outputs}
    found, broken = interleave(acts, options.rounds, options.warm_up)
    wrong += [f"{name}: {why}" for name, why in broken.items()]
    base = [turn["step_s"] for turn in found.get("diffusers", [])]
    rows: list[Row] = []
    for name, each in found.items():
        try:
            memory: dict[str, float] = processes[name].ask("memory")
        except RuntimeError as error:
            wrong.append(f"{name}: memory: {error}")
            memory = {}
        rows.append(row_of(case, name, each, base, differences[name], memory))
        say(f"{name}: {rows[-1]['step_s']['median']:.3g} s a step")
    return rows, wrong


def row_of(
    case: Case, name: str, each: list[dict[str, float]], base: list[float], difference: float, memory: dict[str, float]
) -> Row:
    """Medians, and the rates that follow from the step's."""
    (f, h, w), model = case.latents, case.model
    figures: dict[str, Any] = {key: spread([turn[key] for turn in each]) for key in each[0]}
    step = figures["step_s"]["median"]
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
        **figures,
        "tokens_per_s": case.batch * f * h * w / model.patch**2 / step,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        **memory,
        # paired turn by turn, so that a machine whose speed wanders does less harm
        "times diffusers": spread([b / turn["step_s"] for b, turn in zip(base, each, strict=False)]) if base else None,
        "difference": difference,
        "parameters_m": parameter_count(model) / 1e6,
    }


def main(words: Sequence[str], prog: str = "sora bench model") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, prog, ABOUT)
    refuse(rest, prog)
    return finish(bench(options), options, ["model", *words])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], f"python -m {Path(__file__).parent.parent.name}.bench.model"))
    except UserError as error:
        print(f"sora bench model: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
