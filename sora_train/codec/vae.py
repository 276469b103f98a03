"""Frames to latents and back with a frozen image VAE of diffusers: `AutoencoderKL`, or `AutoencoderTiny` (TAESD).

Each frame is encoded alone. Latents leave `encode` and enter `decode` raw, as the VAE has them; the model sees them
normalised per channel, `(z - mean) / std`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from sora_train.codec.files import VaeFiles, find_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

PIXELS_AT_ONCE = 2**20  # 4 frames of 512 x 512: about 2 GB of activations with the Stable Diffusion VAE in float32
PIXELS_AT_ONCE_CPU = 2**17  # activations of the small VAEs then stay in the cache: 1.7 times as fast as 2**19


class Vae:
    """A frozen VAE. `moments` is 2 where it has a posterior (mean, log-variance) and 1 where it has none."""

    def __init__(self, model: AutoencoderKL | AutoencoderTiny, files: VaeFiles):
        # Channels last is 1.4 times as fast on the CPU (AMD EPYC, oneDNN, float32) and no slower elsewhere.
        self.model: Any = model.eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)
        self.files = files
        self.moments, self.channels, self.factor = files.moments, files.channels, files.factor
        self.mean, self.std = torch.tensor(files.mean), torch.tensor(files.std)

    @property
    def hash(self) -> str:
        """Hash of weights and configuration."""
        return self.files.hash

    def _pixels_at_once(self) -> int:
        return PIXELS_AT_ONCE_CPU if self.model.device.type == "cpu" else PIXELS_AT_ONCE

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "b F H W 3"]) -> Float[Tensor, "b moments f c h w"]:
        """Raw moments of the posterior, float32 on the CPU. Height and width must be multiples of `factor`."""
        batch, _, height, width, _ = frames.shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"frames of {height}x{width} don't divide by the VAE's factor {self.factor}")
        images = rearrange(frames, "b F H W c -> (b F) c H W")
        parts = []
        for part in images.split(max(1, self._pixels_at_once() // (height * width))):
            x = (part.to(self.model.device).float() / 127.5 - 1).to(self.model.dtype, memory_format=torch.channels_last)
            encoded = self.model.encode(x)
            if self.moments == 2:
                posterior = encoded.latent_dist
                moments = torch.stack((posterior.mean, posterior.logvar), dim=1)
            else:
                moments = encoded.latents[:, None]
            parts.append(moments.float().cpu())
        return rearrange(torch.cat(parts), "(b f) m c h w -> b m f c h w", b=batch).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "b f c h w"]) -> UInt8[Tensor, "b F H W 3"]:
        """Frames of raw (denormalised) latents, on the CPU."""
        batch, _, _, height, width = latents.shape
        images = rearrange(latents, "b f c h w -> (b f) c h w")
        parts = []
        for part in images.split(max(1, self._pixels_at_once() // (height * width * self.factor**2))):
            z = part.to(self.model.device, self.model.dtype, memory_format=torch.channels_last)
            made = self.model.decode(z).sample.float()
            parts.append(((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        return rearrange(torch.cat(parts), "(b F) c H W -> b F H W c", b=batch).contiguous()

    def normalise(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Raw latents to what the model sees: mean 0 and spread 1 in each channel."""
        mean, std = (value[:, None, None].to(latents.device) for value in (self.mean, self.std))
        return (latents - mean) / std

    def denormalise(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """What the model makes to raw latents."""
        mean, std = (value[:, None, None].to(latents.device) for value in (self.mean, self.std))
        return latents * std + mean


def load_vae(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """The VAE that `codec.vae` names: `builtin`, a folder, or a hub id; also the `vae` of a whole pipeline.

    Raises UserError, with what to do, where it can't be had.
    """
    import diffusers

    files = find_vae(name)
    kind = {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny}[files.kind]
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of keys of TAESD's config that its own class wrote
    try:
        model = kind.from_pretrained(
            str(files.place), local_files_only=True, use_safetensors=True, torch_dtype=dtype, low_cpu_mem_usage=False
        )
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    return Vae(model.to(device), files)
