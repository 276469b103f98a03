"""DDPM (Ho et al. 2020, arXiv 2006.11239): 1000 steps, step 0 next to data, step 999 noise."""

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 1000


def alphas_cumprod(beta_start: float, beta_end: float) -> Float[Tensor, "1000"]:
    """Share of the data's variance that is left after each step, for linearly rising beta."""
    beta = torch.linspace(beta_start, beta_end, STEPS, dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0).float()


def add_noise(
    x: Float[Tensor, "b f c h w"], noise: Float[Tensor, "b f c h w"], alpha: Float[Tensor, "b"]
) -> Float[Tensor, "b f c h w"]:
    """x_t = sqrt(alpha_t) x + sqrt(1 - alpha_t) noise  (eq. 4, alpha cumulative)."""
    alpha = alpha[:, None, None, None, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise
