"""One variant of `sora bench model`, our model or diffusers', and the training steps that are measured."""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sora_train.bench.core import Flags, seconds
from sora_train.errors import RecipeError
from sora_train.model.config import PRESETS, ModelConfig

TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2, "patch": 2, "text_width": 16, "sample_size": 8}
"""A preset for tests of the bench itself."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Network = tuple[nn.Module, Callable[..., Tensor]]
"""A model, and how to call it: `run(model, x, t, text, mask)` with our axes."""


@dataclass(frozen=True)
class Case:
    """What variants are measured on."""

    preset: str
    attention: str
    shape: tuple[int, int, int]
    """Frames, height and width in pixels; latents are an eighth of the sides."""
    dtype: str
    checkpointing: str
    batch: int
    text_tokens: int
    device: str
    threads: int
    steps: int = 1
    """Steps of a turn."""

    @property
    def model(self) -> ModelConfig:
        keys: dict[str, Any] = TINY if self.preset == "tiny" else {"preset": self.preset, **PRESETS[self.preset]}
        # sample_size may stay: positions are interpolated from it
        return replace(ModelConfig(**keys), attention=self.attention)  # pyright: ignore[reportArgumentType]

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height, width."""
        frames, height, width = self.shape
        return frames, height // 8, width // 8

    def __str__(self) -> str:
        checkpointing = "" if self.checkpointing == "none" else f", {self.checkpointing} checkpointing"
        shape = "x".join(map(str, self.shape))
        return f"{self.preset} {self.attention} {shape} batch {self.batch} {self.dtype} on {self.device}{checkpointing}"


@dataclass(frozen=True)
class Variant:
    """Whose model, and whether torch compiles it. `weights` is a folder in diffusers' format; empty: from a seed."""

    case: Case
    implementation: Literal["ours", "diffusers"]
    compiled: bool
    weights: str = ""

    @property
    def name(self) -> str:
        return f"{self.implementation}, compiled" if self.compiled else self.implementation


class TrainingStep:
    """A model, its AdamW and one batch."""

    def __init__(self, variant: Variant) -> None:
        self.case = case = variant.case
        self.device, self.dtype = torch.device(case.device), DTYPES[case.dtype]
        model, self.run = (load_diffusers if variant.implementation == "diffusers" else load_ours)(variant)
        self.model = model.to(self.device, self.dtype).train()
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.inputs = tuple(x.to(self.device) for x in inputs(case))

    def forward(self) -> Tensor:
        x, t, text, mask = self.inputs
        return self.run(self.model, x.to(self.dtype), t, text.to(self.dtype), mask).float()

    def output(self) -> Tensor:
        """The model's output on the batch, float32 `b f c h w`."""
        with torch.no_grad():
            return self.forward().cpu()

    def turn(self) -> dict[str, float]:
        """Mean seconds of forward, backward and optimizer over the steps of a turn."""
        each = [self.step() for _ in range(self.case.steps)]
        means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        return {**means, "step_s": sum(means.values())}

    def step(self) -> dict[str, float]:
        loss: list[Tensor] = []

        def update() -> None:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

        return {
            "forward_s": seconds(lambda: loss.append(self.forward().square().mean())),
            "backward_s": seconds(lambda: loss[0].backward()),
            "optimizer_s": seconds(update),
        }

    def memory(self) -> float:
        """Peak memory of a step in 10⁹ bytes, with weights and moments; by CUDA's allocator or torch's profiler."""
        moments = [value for state in self.adam.state.values() for value in state.values()]
        held = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *moments))
        if self.device.type == "cpu":
            return (held + peak_allocated(self.step)) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step()
        return (held + torch.cuda.max_memory_allocated(self.device) - before) / 1e9


def peak_allocated(call: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that a call allocates and holds at once."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))  # pyright: ignore
    return max(accumulate(sizes), default=0)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents `b f c h w`, times, text `b l e` and its mask; captions fill a quarter to all of the tokens."""
    g = torch.Generator().manual_seed(1)
    (f, h, w), config, b, l = case.latents, case.model, case.batch, case.text_tokens  # noqa: E741
    x = torch.randn(b, f, config.in_channels, h, w, generator=g)
    text = torch.randn(b, l, config.text_width, generator=g)
    lengths = torch.linspace(max(l / 4, 1), l, b + 2)[1:-1].long()
    t = 1000 * torch.rand(b, generator=g)
    return x, t, text, torch.arange(l) < lengths[:, None]


def seeded(case: Case) -> nn.Module:
    """Our model with random weights. None is zero, which would hide differences."""
    from sora_train.model import Latte

    torch.manual_seed(0)
    model = Latte(case.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def load_ours(variant: Variant) -> Network:
    """Our model, checkpointed and compiled as training does it."""
    from sora_train.model import Latte
    from sora_train.model.convert import from_diffusers
    from sora_train.train.activation_checkpointing import apply_activation_checkpointing
    from sora_train.train.compile import compile_blocks

    model = from_diffusers(variant.weights) if variant.weights else seeded(variant.case)
    assert isinstance(model, Latte)
    apply_activation_checkpointing(model, variant.case.checkpointing)  # pyright: ignore[reportArgumentType]
    if variant.compiled:
        compile_blocks(model, 2)  # with and without gradients
    return model, lambda model, x, t, text, mask: model(x, t, text, mask)


def load_diffusers(variant: Variant) -> Network:
    """diffusers' model. Its axes are `b c f h w`, and its mask is an additive bias for every frame."""
    from diffusers import LatteTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()

    def call(model: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask, 0.0, -10000.0).to(text.dtype)[:, None].repeat_interleave(x.shape[1], dim=0)
        return model(x.transpose(1, 2), t, text, bias, return_dict=False)[0].transpose(1, 2)

    model = LatteTransformer3DModel.from_pretrained(variant.weights, low_cpu_mem_usage=False)
    if variant.case.checkpointing == "full":
        model.enable_gradient_checkpointing()
    return model, partial(torch.compile(call, dynamic=False)) if variant.compiled else call


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors over the largest value of `b`; infinite if a value is not finite."""
    largest = float(b.abs().max())
    found = float((a - b).abs().max()) / largest if largest else math.inf
    return found if math.isfinite(found) else math.inf


def add_case_flags(flags: Flags) -> None:
    """Adds the flags that `bench model` and `bench checkpoint` share."""
    flags.flag("presets", ["S"], "model sizes; tiny only tests the bench", choices=[*PRESETS, "tiny"])
    flags.flag("batch", 1, "clips per step")
    flags.flag("text_tokens", 120, "tokens that captions are padded to; a quarter to all of them are real")
    flags.flag("rounds", 5, "measurements of each variant")
    flags.flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    flags.flag("threads", torch.get_num_threads(), "threads on the CPU")


def check_device(options: Namespace) -> None:
    """RecipeError if torch doesn't have the device of the flags."""
    kind = options.device.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"--device {options.device} is not available. Use cpu, or cuda if torch sees a GPU")


def size_of(shape: str) -> tuple[int, int, int]:
    """Frames, height and width of a word such as `16x256x256`. RecipeError if it isn't such a word."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise RecipeError(f"{shape} is not a shape. Write frames, height and width, such as 16x256x256")
    frames, height, width = map(int, found.groups())
    if height % 16 or width % 16:
        raise RecipeError(f"shape {shape}: height and width must be multiples of 16 (VAE 8 x patch 2)")
    return frames, height, width
