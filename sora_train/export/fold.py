"""Folds the normalisation of latents into a VAE's 1 x 1 convolutions.

After that the VAE's latents are those that the model sees.

The encoder of an `AutoencoderKL` ends with a 1 x 1 convolution that returns the posterior's moments. Its decoder begins
with another. Latents (z - m) / s have the posterior's mean (mean - m) / s and log-variance logvar - 2 log s; decoding
begins with z s + m. All of that is linear, so the two 1 x 1 convolutions absorb it.

A log-variance beyond diffusers' bounds, -30 and 20, is clamped before the fold in the original VAE and after it in the
folded one. Real values are within the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def fold_latent_norm(vae: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Folds mean and std into an `AutoencoderKL`, in place; scaling_factor becomes 1.

    A VAE without the 1 x 1 convolutions gets them. Computed in float64, because decoding must invert encoding.
    """
    c = len(mean)
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    into, out = vae.quant_conv or identity(2 * c), vae.post_quant_conv or identity(c)
    assert into.bias is not None
    assert out.bias is not None
    scale = torch.cat([1 / s, torch.ones_like(s)])
    shift = torch.cat([-m / s, -2 * s.log()])
    weight, bias = into.weight.double(), into.bias.double()
    into.weight.copy_(weight * scale[:, None, None, None])
    into.bias.copy_(bias * scale + shift)
    weight = out.weight.double()
    out.bias.copy_(out.bias.double() + weight[:, :, 0, 0] @ m)
    out.weight.copy_(weight * s[None, :, None, None])
    vae.quant_conv, vae.post_quant_conv = into, out
    vae.register_to_config(
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
    )


def identity(channels: int) -> nn.Conv2d:
    """The identity as a 1 x 1 convolution."""
    convolution = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
