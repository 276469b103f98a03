"""What a model learns: how data and noise are mixed at a time, and what it has to predict there.

Everywhere in this project time 0 is data and its far end is noise. All arithmetic is float32, whatever the model's
dtype. A model is any callable `(x, t, text, text_mask) -> prediction` with t from 0 (data) to 1000 (noise).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sora_train.diffusion import ddpm, flow

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionConfig:
    """What the model learns to predict, and at which times."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    kind: Literal["flow", "ddpm"] = "flow"
    """Rectified flow (the model predicts noise minus data), or DDPM (it predicts the noise, as Latte)."""
    time_mean: float = 0.0
    """Flow: mean of the logit-normal times; above 0 is toward noise."""
    time_std: float = 1.0
    """Flow: standard deviation of the logit-normal times."""
    shift: float = 1.0
    """Flow: shift of times toward noise, in training and sampling, for higher resolutions; 1 is none."""
    beta_start: float = 1e-4
    """DDPM: variance added by the first of 1000 steps."""
    beta_end: float = 0.02
    """DDPM: variance added by the last step."""

    def __post_init__(self) -> None:
        if self.time_std <= 0 or self.shift <= 0:
            raise ValueError(f"diffusion.time_std {self.time_std} and diffusion.shift {self.shift} must be above 0")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"diffusion.beta_start {self.beta_start} and beta_end {self.beta_end} must rise within 0 to 1"
            )


class Objective:
    """The configured objective; it holds no state beyond its settings."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.alphas = ddpm.alphas_cumprod(config.beta_start, config.beta_end)

    def draw_time(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """One sample's time: 0 to 1 for flow, a step 0 to 999 for DDPM."""
        if self.config.kind == "ddpm":
            return torch.randint(ddpm.STEPS, (), generator=generator).float()
        normal = torch.randn((), generator=generator)
        return flow.shifted(torch.sigmoid(self.config.time_mean + self.config.time_std * normal), self.config.shift)

    def mix(
        self, x: Float[Tensor, "b f c h w"], noise: Float[Tensor, "b f c h w"], t: Float[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b f c h w"], Float[Tensor, "b f c h w"], Float[Tensor, "b"]]:
        """Noisy latents, what to predict there, and the time as the model is told it."""
        if self.config.kind == "ddpm":
            return ddpm.add_noise(x, noise, self.alphas.to(x.device)[t.long()]), noise, t
        return flow.interpolate(x, noise, t), flow.velocity(x, noise), 1000 * t

    def loss(
        self,
        model: Model,
        x: Float[Tensor, "b f c h w"],
        noise: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b"]:
        """Mean squared error of each sample's prediction, at times that `draw_time` drew."""
        x_t, target, told = self.mix(x.float(), noise.float(), t)
        predicted = model(x_t, told, text, text_mask).float()[:, :, : x.shape[2]]
        return (predicted - target).square().mean(dim=(1, 2, 3, 4))


def make_objective(config: DiffusionConfig) -> Objective:
    """The objective that a recipe asks for."""
    return Objective(config)
