"""DDPM's learned-range variance (Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.1).

The model returns a number v for every latent. It interpolates from the least (-1) to the largest (1) possible variance
of a reverse step (eq. 15), and is trained by the variational bound alone (eq. 16).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sora_train.diffusion.conditioning import mean_of_clips
from sora_train.diffusion.ddpm import Schedule

BIN = 2 / 255  # one of 256 grey levels on a scale from -1 to 1


def learned_log_variance(
    schedule: Schedule, v: Float[Tensor, "b f c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b f c h w"]:
    """Log of the reverse step's variance: from log beta tilde at v = -1 to log beta at v = 1 (eq. 15)."""
    share = (v + 1) / 2
    return share * at(schedule.log_beta, t, v) + (1 - share) * at(schedule.posterior_log_variance, t, v)


def posterior_mean(
    schedule: Schedule, x: Float[Tensor, "b f c h w"], x_t: Float[Tensor, "b f c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b f c h w"]:
    """Mean of the posterior q(x_t-1 | x_t, x) (eq. 10 and 11; Ho et al. 2020, eq. 7)."""
    return at(schedule.posterior_coef_x0, t, x) * x + at(schedule.posterior_coef_xt, t, x) * x_t


def bound(
    schedule: Schedule,
    x: Float[Tensor, "b f c h w"],
    x_t: Float[Tensor, "b f c h w"],
    x_predicted: Float[Tensor, "b f c h w"],
    v: Float[Tensor, "b f c h w"],
    t: Float[Tensor, "b"],
    given: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "b"]:
    """The term of the variational bound of step t, in bits per dimension (eq. 4 to 6), without `given` first frames.

    The sum over all steps bounds the negative log-likelihood; the term of pure noise, eq. 7, has nothing to learn. No
    gradient reaches `x_predicted`: the mean is trained by the simple loss, as in the paper below eq. 16.
    """
    mean = posterior_mean(schedule, x_predicted.detach(), x_t, t)
    log_variance = learned_log_variance(schedule, v, t)
    true_mean, true_log_variance = posterior_mean(schedule, x, x_t, t), at(schedule.posterior_log_variance, t, x)
    divergence = kl(true_mean, true_log_variance, mean, log_variance)
    # Other steps get finite numbers here: an infinity in the branch not taken would make the gradient NaN.
    first = (t == 0)[:, None, None, None, None]
    likelihood = log_likelihood(x, torch.where(first, mean, x), torch.where(first, log_variance, -2.0))
    return mean_of_clips(torch.where(first, -likelihood, divergence), given) / math.log(2)


def kl(
    mean: Float[Tensor, "*x"],
    log_variance: Float[Tensor, "*#x"],
    other_mean: Float[Tensor, "*#x"],
    other_log_variance: Float[Tensor, "*#x"],
) -> Float[Tensor, "*x"]:
    """KL divergence of the second normal distribution from the first, in nats."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def log_likelihood(
    x: Float[Tensor, "*x"], mean: Float[Tensor, "*#x"], log_variance: Float[Tensor, "*#x"]
) -> Float[Tensor, "*x"]:
    """Log-probability, in nats, that a normal variable falls into the bin around x (Ho et al. 2020, eq. 13).

    It is meant for pixels: 8-bit values on a scale from -1 to 1 are 2/255 apart, and the outermost bins are open.
    Latents are neither 8-bit nor bounded, but the paper's code and Latte treat them as pixels, and so does this: each
    latent has a bin of 2/255 around it, and beyond +-0.999 the bin is open. It affects only the first of 1000 steps.
    """
    low, high = (((x + side - mean) * torch.exp(-0.5 * log_variance)) for side in (-BIN / 2, BIN / 2))
    # log(P(high) - P(low)) in the left tail, where it is exact: P(z) = 1 - P(-z)
    right = low + high > 0
    upper, lower = log_cdf(torch.where(right, -low, high)), log_cdf(torch.where(right, -high, low))
    inside = upper + torch.log((-torch.expm1(lower - upper)).clamp(min=1e-12))
    return torch.where(x < -0.999, log_cdf(high), torch.where(x > 0.999, log_cdf(-low), inside))


def log_cdf(z: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """Log-probability that a standard normal variable is below z; exact even where the probability underflows to 0."""
    return torch.special.log_ndtr(z)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def at(values: Float[Tensor, "1000"], t: Float[Tensor, "b"], like: Float[Tensor, "b *x"]) -> Float[Tensor, "b *_"]:
    """The schedule's values at steps t, on the device of `like` and with axes to broadcast to it."""
    return values.to(like.device)[t.long()][:, None, None, None, None]
