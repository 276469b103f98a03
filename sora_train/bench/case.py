"""What `bench model` and `bench checkpoint` measure on: a model size, a clip shape, a batch of noise."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from sora_train.bench.core import BenchOptions
from sora_train.errors import RecipeError
from sora_train.latent_shape import latent_shape, shape_errors
from sora_train.model import Transformer, build
from sora_train.model.config import PRESETS, ModelConfig

SMALL: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2, "patch": 2, "text_width": 16}
OWN = {
    "tiny": SMALL | {"sample_size": 8},
    "tiny_wan": SMALL | {"family": "wan", "in_channels": 16},
    "wide": {"depth": 8, "width": 3072, "heads": 24, "text_width": 4096},
}
"""Presets of the bench itself."""


Preset = Literal[
    "S", "B", "L", "XL", "XL_heads64", "XL_heads128", "latte_t2v", "wan2.1_t2v_1.3b", "wan2.1_t2v_14b",
    "wan2.2_ti2v_5b", "wide", "tiny", "tiny_wan",
]  # fmt: skip


class CaseOptions(BenchOptions):
    """The keys that `bench model` and `bench checkpoint` share."""

    presets: tuple[Preset, ...] = ("S",)
    """Model sizes; wide has 8 blocks of width 3072. tiny and tiny_wan only test the bench."""
    batch: PositiveInt = 1
    """Clips per step."""
    text_tokens: PositiveInt = 120
    """Tokens that captions are padded to; a quarter to all of them are real."""
    rounds: PositiveInt = 5
    """Measurements of each variant."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""
    threads: PositiveInt = torch.get_num_threads()
    """Threads on the CPU."""

    @property
    def dtype(self) -> str:
        """fp32 on the CPU, bf16 on a GPU."""
        return "fp32" if self.device == "cpu" else "bf16"


@dataclass(frozen=True)
class Case:
    """Model, clips and device of a measurement."""

    preset: str
    attention: str
    shape: tuple[int, int, int]
    """Frames, height and width in pixels, of a released model's VAE."""
    dtype: str
    checkpointing: str
    batch: int
    text_tokens: int
    device: str
    heads: int = 0
    """0: those of the preset."""

    def __post_init__(self) -> None:
        """RecipeError if torch doesn't have the device, or the preset no such attention or shape."""
        kind = self.device.split(":")[0]
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            raise RecipeError(f"--device {self.device} is not available. Use cpu, or cuda if torch sees a GPU")
        try:
            model = self.model
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if wrong := shape_errors(self.shape, *model.vae_factors, model.patch):
            raise RecipeError(f"shape {'x'.join(map(str, self.shape))} of {self.preset}: {'; '.join(wrong)}")

    @property
    def model(self) -> ModelConfig:
        keys: dict[str, Any] = OWN.get(self.preset) or {"preset": self.preset, **PRESETS[self.preset]}
        # sample_size may stay: positions are interpolated from it
        config = ModelConfig(**keys)
        return replace(config, attention=self.attention, heads=self.heads or config.heads)  # pyright: ignore[reportArgumentType]

    @property
    def is_in_diffusers(self) -> bool:
        """Whether a class of diffusers computes the same."""
        return self.model.family == "wan" or self.attention == "factorised"

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height, width."""
        f, _, h, w = latent_shape(self.model.in_channels, *self.model.vae_factors, *self.shape)
        return f, h, w

    def __str__(self) -> str:
        checkpointing = "" if self.checkpointing == "none" else f", {self.checkpointing} checkpointing"
        shape = "x".join(map(str, self.shape))
        heads = f", {self.heads} heads" if self.heads else ""
        where = f"batch {self.batch} {self.dtype} on {self.device}"
        return f"{self.preset} {self.attention}{heads} {shape} {where}{checkpointing}"


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents `b f c h w`, times, text `b l e` and its mask; captions fill a quarter to all of the tokens."""
    g = torch.Generator().manual_seed(1)
    (f, h, w), config, b, l = case.latents, case.model, case.batch, case.text_tokens  # noqa: E741
    x = torch.randn(b, f, config.in_channels, h, w, generator=g)
    text = torch.randn(b, l, config.text_width, generator=g)
    lengths = torch.linspace(max(l / 4, 1), l, b + 2)[1:-1].long()
    t = 1000 * torch.rand(b, generator=g)
    return x, t, text, torch.arange(l) < lengths[:, None]


def seeded(case: Case) -> Transformer:
    """Our model with random weights. None is zero, which would hide differences."""
    torch.manual_seed(0)
    model = build(case.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors over the largest value of `b`; infinite if a value is not finite."""
    largest = float(b.abs().max())
    found = float((a - b).abs().max()) / largest if largest else math.inf
    return found if math.isfinite(found) else math.inf


def size_of(shape: str) -> tuple[int, int, int]:
    """Frames, height and width of a word such as `16x256x256`. RecipeError if it isn't such a word."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise RecipeError(f"{shape} is not a shape. Write frames, height and width, such as 16x256x256")
    frames, height, width = map(int, found.groups())
    return frames, height, width
