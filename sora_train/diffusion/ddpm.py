"""DDPM (Ho et al. 2020, arXiv 2006.11239): 1000 steps, step 0 next to data, step 999 noise.

The signal-to-noise ratio (SNR) of a step is alpha / (1 - alpha), where alpha is the cumulative product of 1 - beta:
the share of the data's variance that is left. The schedule is computed in float64 and kept in float32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 1000

Prediction = Literal["epsilon", "v", "sample"]


@dataclass(frozen=True)
class Schedule:
    """The noise schedule: coefficients of the 1000 steps, in float32."""

    betas: Float[Tensor, "1000"]
    """Variance that the step adds."""
    alphas_cumprod: Float[Tensor, "1000"]
    """Share of the data's variance that is left after the step."""
    snr: Float[Tensor, "1000"]
    """alpha / (1 - alpha)."""
    posterior_coef_x0: Float[Tensor, "1000"]
    """Weight of the data in the mean of the posterior q(x_t-1 | x_t, x), Ho et al. eq. 7."""
    posterior_coef_xt: Float[Tensor, "1000"]
    """Weight of x_t in the same mean."""
    posterior_log_variance: Float[Tensor, "1000"]
    """Log of the posterior's variance beta tilde (eq. 7). It would be 0 at the first step, which takes the second's."""
    log_beta: Float[Tensor, "1000"]
    """Log of beta."""


def make_schedule(betas: Float[Tensor, "1000"]) -> Schedule:
    """The schedule of these betas, which are float64."""
    alphas = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([torch.ones_like(alphas[:1]), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    variance = torch.cat([variance[1:2], variance[1:]])
    return Schedule(
        betas=betas.float(),
        alphas_cumprod=alphas.float(),
        snr=(alphas / (1 - alphas)).float(),
        posterior_coef_x0=(betas * before.sqrt() / (1 - alphas)).float(),
        posterior_coef_xt=((1 - before) * (1 - betas).sqrt() / (1 - alphas)).float(),
        posterior_log_variance=variance.log().float(),
        log_beta=betas.log().float(),
    )


def linear_betas(start: float, end: float) -> Float[Tensor, "1000"]:
    """Betas that rise linearly, in float64 (Ho et al., section 4)."""
    return torch.linspace(start, end, STEPS, dtype=torch.float64)


def cosine_betas() -> Float[Tensor, "1000"]:
    """Betas whose alpha follows a squared cosine, in float64 (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    alpha = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha[1:] / alpha[:-1]).clamp(max=0.999)


def zero_terminal_snr(betas: Float[Tensor, "1000"]) -> Float[Tensor, "1000"]:
    """Rescales betas so the last step is pure noise and the first is unchanged (Lin et al. 2023, algorithm 1).

    arXiv 2305.08891: sampling starts at pure noise, so training should end there.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas = root**2
    return torch.cat([1 - alphas[:1], 1 - alphas[1:] / alphas[:-1]])


def min_snr_weights(snr: Float[Tensor, "1000"], gamma: float, prediction: Prediction) -> Float[Tensor, "1000"]:
    """Min-SNR loss weights (Hang et al. 2023, arXiv 2303.09556): no step's error in the data counts above `gamma`.

    That is min(SNR, gamma) on the error in the data, so / SNR on epsilon's and / (SNR + 1) on v's. Finite at SNR 0:
    1 for epsilon, and 0 for the others. A gamma of 0 weights all steps equally.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else 1)


def add_noise(
    x: Float[Tensor, "b f c h w"], noise: Float[Tensor, "b f c h w"], alpha: Float[Tensor, "b #f"]
) -> Float[Tensor, "b f c h w"]:
    """x_t = sqrt(alpha_t) x + sqrt(1 - alpha_t) noise  (eq. 4, alpha cumulative)."""
    alpha = alpha[:, :, None, None, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


def target(
    prediction: Prediction, x: Float[Tensor, "b f c h w"], noise: Float[Tensor, "b f c h w"], alpha: Float[Tensor, "b"]
) -> Float[Tensor, "b f c h w"]:
    """The training target: epsilon (the noise), sample (the data), or v.

    v = sqrt(alpha) noise - sqrt(1 - alpha) x  (Salimans and Ho 2022, arXiv 2202.00512, section 4).
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x
    alpha = alpha[:, None, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x


def to_sample(
    prediction: Prediction,
    predicted: Float[Tensor, "b f c h w"],
    x_t: Float[Tensor, "b f c h w"],
    alpha: Float[Tensor, "b"],
) -> Float[Tensor, "b f c h w"]:
    """The data by a prediction at x_t: inverts `target`. From epsilon only if alpha is above 0."""
    if prediction == "sample":
        return predicted
    alpha = alpha[:, None, None, None, None]
    if prediction == "epsilon":
        return (x_t - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    return alpha.sqrt() * x_t - (1 - alpha).sqrt() * predicted
