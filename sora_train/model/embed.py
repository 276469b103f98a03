"""Embeddings: patches, positions, diffusion time and text.

Sinusoids as in Vaswani et al. 2017; adaLN-single as in PixArt-alpha (arXiv 2310.00426, section 2.3), which Latte uses;
rotary position embeddings (RoPE) as in RoFormer (Su et al. 2021, arXiv 2104.09864, equation 34).
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

TIME_CHANNELS = 256


def to_patches(x: Float[Tensor, "b f c h w"], p: int) -> Float[Tensor, "b f n c*{p}**2"]:
    """Cuts every frame into patches of p x p latents."""
    return rearrange(x, "b f c (h ph) (w pw) -> b f (h w) (c ph pw)", ph=p, pw=p)


def from_patches(x: Float[Tensor, "b f n ppo"], p: int, h: int, w: int) -> Float[Tensor, "b f o {h}*{p} {w}*{p}"]:
    """Joins h x w patches to frames; here the channels come last, as in PixArt's output layer."""
    return rearrange(x, "b f (h w) (ph pw o) -> b f o (h ph) (w pw)", h=h, w=w, ph=p, pw=p)


def angles(position: Float[Tensor, "i"], d: int) -> Float[Tensor, "i {d}//2"]:
    """Positions as angles at d/2 wavelengths from 2 pi to 20,000 pi, in float64."""
    frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64, device=position.device) / (d // 2))
    return position[:, None].double() * frequency


def sinusoid(position: Float[Tensor, "i"], d: int) -> Float[Tensor, "i d"]:
    """Sinusoidal embedding: sines in the first half, cosines in the second."""
    angle = angles(position, d)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def space_positions(h: int, w: int, d: int, base: int, scale: int, device: torch.device) -> Float[Tensor, "n d"]:
    """Embeddings of h x w patches: the column in the first half of d, the row in the second.

    Whatever the grid, its coordinates span 0 to `base / scale`, so that other shapes and resolutions interpolate.
    `base` is the patches on a side that the model was made for, `scale` PixArt's interpolation scale.
    """
    row = torch.arange(h, dtype=torch.float32, device=device) / (h / base) / scale
    column = torch.arange(w, dtype=torch.float32, device=device) / (w / base) / scale
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([sinusoid(columns.flatten(), d // 2), sinusoid(rows.flatten(), d // 2)], dim=1).float()


def frame_positions(f: int, base: int, device: torch.device) -> Float[Tensor, "f"]:
    """Frames counted from 0; with a `base`, scaled so that a clip of any length spans 0 to `base`."""
    frame = torch.arange(f, dtype=torch.float32, device=device)
    return frame * (base / f) if base else frame


def rope_freqs(positions: Float[Tensor, "axes s"], k: int) -> Float[Tensor, "2 s {k}//2"]:
    """Cosines and sines of tokens' positions on one or more axes, for heads of width `k`.

    The frequencies are split evenly over the axes; the first axis takes the remainder.
    """
    count = len(positions)
    share = 2 * (k // (2 * count))
    widths = [k - share * (count - 1)] + [share] * (count - 1)
    angle = torch.cat([angles(position, width) for position, width in zip(positions, widths, strict=True)], dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rope(x: Float[Tensor, "*b s k"], rope: Float[Tensor, "2 s r"]) -> Float[Tensor, "*b s k"]:
    """Rotates element i of a head with element i + k/2, in float32: attention scores then depend on distances alone."""
    (cos, sin), (a, b) = rope, x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def apply_rope_pairs(x: Float[Tensor, "*b s k"], rope: Float[Tensor, "2 s r"]) -> Float[Tensor, "*b s k"]:
    """The same with element 2i rotated with element 2i + 1, as Wan pairs them."""
    (cos, sin), (a, b) = rope, rearrange(x.float(), "... (r two) -> two ... r", two=2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class TimeEmbedding(nn.Module):
    """Diffusion time, 0 (data) to 1000 (noise), as a vector of the model's width."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(TIME_CHANNELS, d)
        self.fc2 = nn.Linear(d, d)

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        half = TIME_CHANNELS // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[..., None].float() * frequency
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.fc2(nn.functional.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class TextEmbedding(nn.Module):
    """Text embeddings as vectors of the model's width."""

    def __init__(self, e: int, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(e, d)
        self.fc2 = nn.Linear(d, d)

    def forward(self, text: Float[Tensor, "*b e"]) -> Float[Tensor, "*b d"]:
        return self.fc2(nn.functional.gelu(self.fc1(text), approximate="tanh"))


def pool(text: Float[Tensor, "b l e"], text_mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b e"]:
    """The mean over a caption's real tokens."""
    weight = text_mask[..., None].to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)
