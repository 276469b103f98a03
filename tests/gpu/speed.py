"""The parts of the GPU check that measure a model's speed. They fail only if something does not run."""

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sora_train.bench import attention as bench_attention
from sora_train.bench import train as bench_train
from sora_train.bench.case import Case, size_of
from sora_train.bench.core import log, markdown
from sora_train.bench.model import TrainingStep, profile, profile_tables, row_of
from sora_train.errors import error_line
from sora_train.model import ModelConfig, layers, preset
from sora_train.recipe import Recipe, save_recipe
from sora_train.sample import generate_each, load_run
from sora_train.sampling import Sampling
from sora_train.train import norms
from sora_train.train.profile import Breakdown
from tests.gpu import setting
from tests.gpu.setting import apart, join, make_shards, run

TURNS = 5
GOAL = 1.03
"""Of the bare step's time, for `sora train`."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: a model, and whose it is."""

    preset: str
    batch: int
    whose: str = "ours"
    compiled: bool = True
    attention: str = "factorised"
    heads: int = 0
    checkpointing: str = "none"
    dtype: str = "bf16"
    kernels: bool = True
    """Our Triton kernels where they fit, else torch's attention alone."""
    fused: bool = False
    """Our Triton kernels for norms where they fit, too."""
    shape: str = "16x256x256"

    def __str__(self) -> str:
        words = (
            self.preset if self.attention == "factorised" else f"{self.preset} {self.attention}",
            f"{self.heads} heads" if self.heads else "",
            self.whose,
            "compiled" if self.compiled else "eager",
            self.checkpointing if self.checkpointing != "none" else "",
            self.dtype if self.dtype != "bf16" else "",
            "" if self.kernels else "without our kernels",
            "kernels for norms" if self.fused else "",
        )
        return ", ".join(filter(None, words))


VARIANTS = (
    Variant("latte_t2v", 4),
    Variant("latte_t2v", 4, fused=True),
    Variant("latte_t2v", 4, "diffusers"),
    Variant("latte_t2v", 4, compiled=False),
    Variant("latte_t2v", 4, "diffusers", compiled=False),
    Variant("XL", 8),
    Variant("XL", 8, attention="joint"),
    Variant("XL_heads64", 8, attention="joint"),
    Variant("XL_heads128", 8, attention="joint"),
    Variant("L", 8),
    Variant("wide", 4),
    Variant("latte_t2v", 4, dtype="fp8"),
    Variant("latte_t2v", 4, kernels=False),
    Variant("latte_t2v", 8, checkpointing="selective"),
)  # the most valuable first
TINY = (
    Variant("tiny", 1, compiled=False, dtype="fp32", shape="4x32x32"),
    Variant("tiny", 1, "diffusers", compiled=False, dtype="fp32", shape="4x32x32"),
    Variant("tiny", 1, compiled=False, dtype="fp32", kernels=False, shape="4x32x32"),
    Variant("tiny", 1, compiled=False, attention="joint", heads=1, checkpointing="full", dtype="fp8", fused=True,
            shape="4x32x32"),
)  # fmt: skip
PROFILED = (VARIANTS[0], VARIANTS[1], VARIANTS[6], TINY[0])
HEADER = "| what | batch | clip | ms a step | TFLOP/s | MFU | GB | first step, s |\n|---|---|---|---|---|---|---|---|"


def table(device: torch.device, out: Path) -> str:
    """The model alone: forward, backward and AdamW, ours and diffusers', eager and compiled."""
    times, best, failed, profiles = dict[Variant, float](), (0.0, ""), list[str](), dict[str, Breakdown]()
    print(HEADER, flush=True)
    for variant in VARIANTS if device.type == "cuda" else TINY:
        about = f"{variant} | {variant.batch} | {variant.shape}"
        try:
            row, parts = measure(variant, device)
        except Exception as error:  # the other rows are worth having
            failed.append(f"{variant}: {error_line(error)}")
            print(f"| {about} | failed | | | | |", flush=True)
        else:
            times[variant] = row["step_s"]["median"]
            profiles |= {str(variant): parts} if parts else {}
            best = max(best, (row["mfu"] or 0.0, str(variant)))
            mfu, memory = (f"{value:{form}}" if value else "" for value, form in
                           ((row["mfu"], ".1%"), (row["memory_gb"], ".1f")))  # fmt: skip
            print(f"| {about} | {1e3 * times[variant]:.1f} | {row['tflops']:.3g} | {mfu} | {memory} | "
                  f"{row['first_step_s']:.1f} |", flush=True)  # fmt: skip
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, parts in profiles.items():
        print(f"### Parts of a step: {name}")
        print("\n".join(markdown(profile_tables(name, parts)[0]).splitlines()[2:]), flush=True)
    assert not failed, "; ".join(failed)
    return f"{against(times)}; best MFU {best[0]:.1%} ({best[1]})"


def measure(variant: Variant, device: torch.device) -> tuple[dict, Breakdown | None]:
    """A row of `sora bench model`, and of some variants the parts of a step."""
    log(str(variant))
    cuda = device.type == "cuda"
    case = Case(variant.preset, variant.attention, size_of(variant.shape), variant.dtype,
                variant.checkpointing, variant.batch, 120 if cuda else 7, device.type, variant.heads)  # fmt: skip
    fits = layers.fits_short_attention
    layers.fits_short_attention = fits if variant.kernels else lambda qkv, heads: False
    try:
        step = TrainingStep(case, variant.whose == "diffusers", variant.compiled, fused=variant.fused)
        first = step.turn()["step_s"]
        step.turn()
        turns = [step.turn() for _ in range(TURNS)]
        parts = profile(step) if variant in PROFILED else None
        return row_of(case, str(variant), turns, [], None, step.memory() if cuda else None, first), parts
    finally:
        layers.fits_short_attention = fits


def against(times: dict[Variant, float]) -> str:
    """Diffusers' time over ours, for each model that both have."""
    said = []
    for variant, time_s in times.items():
        if variant.whose == "diffusers" and (ours := times.get(replace(variant, whose="ours"))):
            how = "compiled" if variant.compiled else "eager"
            said.append(f"{variant.preset} {how}: {time_s / ours:.2f} × diffusers")
            fast = times.get(replace(variant, whose="ours", compiled=True))
            if not variant.compiled and fast:
                said.append(f"{variant.preset} compiled: {time_s / fast:.2f} × diffusers eager")
    return ", ".join(said)


def attention(device: torch.device, out: Path) -> str:
    """Attention alone: torch's backends, and our kernels, whose outputs must be torch's up to rounding."""
    cuda = device.type == "cuda"
    heads = ("XL", "XL_heads64", "XL_heads128")
    cases = {"factorised": ("latte_t2v",), "joint": heads} if cuda else {"factorised": ("tiny",), "joint": ("tiny",)}
    options = [
        bench_attention.Options(
            presets=presets, attention=(kind,), shapes=("16x256x256" if cuda else "4x32x32",),
            text_tokens=120 if cuda else 7, batch=8 if cuda else 1, rounds=3, device=device.type, tiles=cuda,
        )
        for kind, presets in cases.items()
    ]  # fmt: skip
    tables = [each for one in options for each in bench_attention.bench(one)]
    for each in tables:
        print(markdown(each) + "\n", flush=True)
    rows = [row for each in tables for row in each.rows]
    assert max(row["difference"] for row in rows) < (3e-2 if cuda else 1e-5)
    temporal = {row["contender"]: row for row in rows if row["attention"] == "temporal"}
    return f"{norm_figures(device)}temporal, forward and backward: " + ", ".join(
        f"{name} {row['forward_ms']['median']:.3f} and {row['backward_ms']['median']:.3f} ms"
        for name, row in temporal.items()
    )


def norm_figures(device: torch.device) -> str:
    """Gated residual, norm and modulation of latte_t2v alone: torch.compile and our kernels, which must be right."""
    if device.type != "cuda":
        return ""
    model = preset("latte_t2v")
    assert not (why := norms.why_no_norms(device, model)), why
    times = norms.measure(device, model, 4, 16 * 256, compiled=True)
    return (
        "norms, forward and backward: "
        + ", ".join(f"{name} {1e3 * each:.3f} ms" for name, each in times.items())
        + "; "
    )


def trained(device: torch.device, out: Path) -> str:
    """`sora train` whole: Ray, the loader, DeepSpeed and logs, compared with a bare loop of the same arithmetic."""
    if device.type == "cuda":
        size = setting.Size(ModelConfig(width=1152, depth=12, heads=16, text_width=4096), 16, 32, 120, 96)
        batch, steps, compile = 32, 20, "auto"
    else:
        size, batch, steps, compile = setting.size_of(device), 4, 8, "no"
    make_shards(out / "shards", size)
    keys = ("width", "depth", "heads", "text_width", "sample_size")
    recipe = Recipe.model_validate(
        {
            "name": "speed",
            "data": {"output": str(out / "shards"), "frames": size.frames, "height": 8 * size.side,
                     "width": 8 * size.side},
            "model": {key: getattr(size.model, key) for key in keys},
            "train": {"batch_size": batch, "micro_batch_size": batch // 4, "precision": "bf16", "compile": compile},
            "cluster": {"address": "local", "workers": 1, "gpu": "yes" if device.type == "cuda" else "no"},
        }
    )  # fmt: skip
    (found,) = bench_train.bench(bench_train.Options(steps=steps, rounds=1, workers=(1,)), recipe)
    print("\n".join(line for line in markdown(found).splitlines() if line.startswith("|")))
    bare, whole = found.rows
    ratio = whole["step_s"]["median"] / bare["step_s"]["median"]
    goal = "reached" if ratio <= GOAL else f"missed by {ratio / GOAL - 1:.1%}"
    mfu = f", MFU {whole['mfu']:.1%}" if whole["mfu"] else ""
    return (
        f"sora train takes {ratio:.3f} of the bare step (goal {GOAL:g}: {goal}), {whole['of bare, at best']:.3f} at "
        f"best{mfu}, first step after {whole['first_step_s']['median']:.0f} s"
    )


def sampled(device: torch.device, out: Path) -> str:
    """Samples of a run in bf16, as it trains, compared with float32: seconds and frames."""
    join(device)
    size, steps = setting.size_of(device), 20 if device.type == "cuda" else 4
    shards = make_shards(out / "shards", size)
    run(device, shards, out / "run", steps=1)
    shards.manifest.save(str(out / "run"))
    save_recipe(
        Recipe.model_validate({"model": vars(size.model), "train": {"precision": "bf16"}}), out / "run/recipe.yaml"
    )
    rng = np.random.default_rng(0)
    words = [torch.from_numpy(rng.standard_normal((size.tokens, size.model.text_width), np.float32)) for _ in range(4)]

    def videos(dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        model = load_run(out / "run", device, dtype=dtype)

        def sample(count: int) -> np.ndarray:
            how = Sampling(steps=count, guidance=4.0)
            return np.stack(list(generate_each(model, ["a"] * 4, range(4), how, embeddings=words)))

        sample(2)
        began = time.monotonic()
        made = sample(steps)
        return torch.from_numpy(made).float(), time.monotonic() - began

    (exact, slow), (half, fast) = videos(torch.float32), videos(torch.bfloat16)
    off = apart(half, exact)
    assert off < 0.1, f"frames sampled in bf16 differ by {off:.2f} of float32's"
    return (
        f"{steps} steps of 4 clips with guidance: {fast:.2f} s in bf16, {slow:.2f} s in float32 ({slow / fast:.2f} ×); "
        f"frames within {off:.1e}"
    )
