"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): straight paths between data and noise.

Time runs from 0 (data) to 1 (noise). Times are drawn and shifted as in Esser et al. 2024 (arXiv 2403.03206).
"""

import math

from jaxtyping import Float
from torch import Tensor


def interpolate(
    x: Float[Tensor, "b f c h w"], noise: Float[Tensor, "b f c h w"], t: Float[Tensor, "b #f"]
) -> Float[Tensor, "b f c h w"]:
    """x_t = (1 - t) x + t noise  (eq. 1, with time reversed)."""
    t = t[:, :, None, None, None]
    return (1 - t) * x + t * noise


def velocity(x: Float[Tensor, "*b"], noise: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """d x_t / dt = noise - x, the same at every t."""
    return noise - x


def shift_time(t: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """Moves times toward noise: s t / (1 + (s - 1) t)  (Esser et al., eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def shift_for(shift: float, shift_tokens: int, shape: tuple[int, int, int, int]) -> float:
    """The shift for latents of `shape`, f c h w: shift sqrt(m / shift_tokens) for their m = f h w positions (eq. 23).

    More positions show more of the same scene, so hiding it takes more noise. With `shift_tokens` 0 the shift is the
    same for every shape.
    """
    f, _, h, w = shape
    return shift * math.sqrt(f * h * w / shift_tokens) if shift_tokens else shift
