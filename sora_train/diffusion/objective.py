"""The training objective: how noise is added at a time, what the model predicts, and the loss.

Time 0 is data everywhere in this project, the other end is noise. All arithmetic is float32, whatever the model's
dtype. A model is any callable `(x, t, text, text_mask) -> prediction` with t from 0 (data) to 1000 (noise), of each
clip, or of each frame if first frames may be given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sora_train.diffusion import ddpm, flow, variance
from sora_train.diffusion.conditioning import ConditioningConfig, mean_of_clips, of_frames

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

READ_ONLY_WITH = (
    (("kind", "flow"), ("times", "time_mean", "time_std", "shift", "shift_tokens")),
    (("times", "logit_normal"), ("time_mean", "time_std")),
    (("kind", "ddpm"), ("prediction", "beta_schedule", "beta_start", "beta_end")),
    (("kind", "ddpm"), ("zero_terminal_snr", "min_snr_gamma", "vlb_weight")),
    (("beta_schedule", "linear"), ("beta_start", "beta_end")),
)
"""Settings, and the keys that are read only with them."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The recipe's `diffusion` section. A key that nothing would read is an error."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    kind: Literal["flow", "ddpm"] = "flow"
    """Rectified flow (the model predicts noise minus data), or DDPM with 1000 steps, as Latte."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Flow: how training times are drawn; logit-normal ones are mostly between data and noise."""
    time_mean: float = 0.0
    """Flow: mean of the logit-normal times, which run from 0 (data) to 1 (noise). Above 0 trains more near noise, below
    0 more near the data. Code whose time runs from noise to data has the opposite sign."""
    time_std: float = 1.0
    """Flow: standard deviation of the logit-normal times."""
    shift: float = 1.0
    """Flow: shift of times toward noise, in training and sampling, for higher resolutions; 1 is none."""
    shift_tokens: int = 0
    """Flow: latent positions (f h w) that `shift` is for; clips of m get shift x sqrt(m / this). 0: all get `shift`."""
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    """DDPM: what the model predicts: the noise (as Latte), v (for zero_terminal_snr), or the data."""
    beta_schedule: Literal["linear", "cosine"] = "linear"
    """DDPM: how the variance that a step adds rises: from beta_start to beta_end (as Latte), or by a squared cosine."""
    beta_start: float = 1e-4
    """DDPM, linear: variance added by the first of 1000 steps."""
    beta_end: float = 0.02
    """DDPM, linear: variance added by the last step."""
    zero_terminal_snr: bool = False
    """DDPM: rescales the steps so that the last is pure noise, which sampling starts from; not with epsilon."""
    min_snr_gamma: float = 0.0
    """DDPM: most weight of a step's error in the data (Min-SNR, 5 in the paper); 0 weights all steps equally."""
    vlb_weight: float = 0.001
    """DDPM with `model.learned_variance`: weight of the variational bound, which trains the variance."""

    def __post_init__(self) -> None:
        if self.time_std <= 0 or self.shift <= 0:
            raise ValueError(f"diffusion.time_std {self.time_std} and diffusion.shift {self.shift} must be above 0")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"diffusion.beta_start {self.beta_start} and beta_end {self.beta_end} must rise within 0 to 1"
            )
        for key in ("shift_tokens", "min_snr_gamma", "vlb_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"diffusion.{key} is {getattr(self, key)}; it must be at least 0")
        for (setting, needed), keys in READ_ONLY_WITH:
            for key in keys:
                if getattr(self, setting) != needed and getattr(self, key) != getattr(DiffusionConfig, key):
                    raise ValueError(
                        f"diffusion.{key} {getattr(self, key)} is read only if diffusion.{setting} is {needed}, but it "
                        f"is {getattr(self, setting)}. Set that, or leave {key} at {getattr(DiffusionConfig, key)}"
                    )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "diffusion.zero_terminal_snr needs diffusion.prediction v or sample: at pure noise, predicting the "
                "noise says nothing about the data"
            )


class Objective:
    """The configured objective. It has no state except its settings and the schedule."""

    def __init__(self, config: DiffusionConfig, learned_variance: bool, conditioning: ConditioningConfig) -> None:
        if learned_variance and config.kind != "ddpm":
            raise ValueError("model.learned_variance needs diffusion.kind ddpm: a flow has no variance")
        self.config, self.learned_variance, self.conditioning = config, learned_variance, conditioning
        linear = config.beta_schedule == "linear"
        betas = ddpm.linear_betas(config.beta_start, config.beta_end) if linear else ddpm.cosine_betas()
        self.schedule = ddpm.make_schedule(ddpm.zero_terminal_snr(betas) if config.zero_terminal_snr else betas)
        self.weights = ddpm.min_snr_weights(self.schedule.snr, config.min_snr_gamma, config.prediction)

    def shift(self, shape: tuple[int, int, int, int]) -> float:
        """Flow's shift for latents of axes f c h w."""
        return flow.shift_for(self.config.shift, self.config.shift_tokens, shape)

    def draw_time(self, generator: torch.Generator, shape: tuple[int, int, int, int]) -> Float[Tensor, ""]:
        """The time for one sample's latents of axes f c h w: 0 to 1 for flow, a step 0 to 999 for DDPM."""
        if self.config.kind == "ddpm":
            return torch.randint(ddpm.STEPS, (), generator=generator).float()
        if self.config.times == "uniform":
            return flow.shift_time(torch.rand((), generator=generator), self.shift(shape))
        normal = torch.randn((), generator=generator)
        return flow.shift_time(torch.sigmoid(self.config.time_mean + self.config.time_std * normal), self.shift(shape))

    def model_time(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Times as the model takes them: 0 (data) to 1000 (noise)."""
        return t if self.config.kind == "ddpm" else 1000 * t

    def frame_times(self, t: Float[Tensor, "b"], given: Int[Tensor, "b"] | None, f: int) -> Float[Tensor, "b *f"]:
        """The same for each of f frames, 0 for the `given` first ones; None: of each clip."""
        times = self.model_time(t)
        return times if given is None else of_frames(times, given, f, 0.0)

    def add_noise(
        self,
        x: Float[Tensor, "b f c h w"],
        noise: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b"],
        given: Int[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, "b f c h w"], Float[Tensor, "b f c h w"]]:
        """Noisy latents at times t, and the target of the prediction. The `given` first frames stay clean."""
        f = x.shape[1]
        if self.config.kind == "flow":
            return flow.interpolate(x, noise, of_frames(t, given, f, 0.0)), flow.velocity(x, noise)
        alpha = self.schedule.alphas_cumprod.to(x.device)[t.long()]
        x_t = ddpm.add_noise(x, noise, of_frames(alpha, given, f, 1.0))
        return x_t, ddpm.target(self.config.prediction, x, noise, alpha)

    def loss(
        self,
        model: Model,
        x: Float[Tensor, "b f c h w"],
        noise: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
        given: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b"]:
        """Mean squared error of each sample's prediction, at times that `draw_time` drew.

        `given` is the number of given first frames of each clip. They are clean, have time 0, and are left out of the
        mean. The model then gets a time for each frame, also of clips with 0; if `given` is None, one for each clip.

        With a learned variance: L_simple + vlb_weight L_vlb (Nichol and Dhariwal 2021, eq. 16). L_vlb is a sum over the
        1000 steps, of which a sample has one, so that step's term counts a thousandfold.

        Raises ValueError if the model returns another number of channels.
        """
        x, noise, c = x.float(), noise.float(), x.shape[2]
        x_t, target = self.add_noise(x, noise, t, given)
        output = model(x_t, self.frame_times(t, given, x.shape[1]), text, text_mask).float()
        if output.shape[2] != (2 if self.learned_variance else 1) * c:
            raise ValueError(
                f"the model returns {output.shape[2]} channels for latents of {c}. Expected {c}, or {2 * c} with "
                f"model.learned_variance, which is {self.learned_variance}"
            )
        predicted = output[:, :, :c]
        error = mean_of_clips((predicted - target).square(), given)
        if self.config.kind == "flow":
            return error
        error = self.weights.to(x.device)[t.long()] * error
        if not self.learned_variance:
            return error
        data = ddpm.to_sample(
            self.config.prediction, predicted, x_t, self.schedule.alphas_cumprod.to(x.device)[t.long()]
        )
        bound = variance.bound(self.schedule, x, x_t, data, output[:, :, c:], t, given)
        return error + self.config.vlb_weight * ddpm.STEPS * bound


def make_objective(
    config: DiffusionConfig, learned_variance: bool = False, conditioning: ConditioningConfig | None = None
) -> Objective:
    """The objective of a recipe. With a learned variance, of DDPM only, the model returns twice the channels.

    Without `conditioning` no frames are given.

    Raises ValueError for a learned variance with flow.
    """
    return Objective(config, learned_variance, conditioning or ConditioningConfig())
