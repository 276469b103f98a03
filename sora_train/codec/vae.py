"""Encodes frames to latents and decodes them, with a frozen VAE from diffusers.

An image VAE works frame by frame. A causal video VAE makes one latent of the first frame and one of each `time_factor`
further frames (arXiv 2408.06072, section 3.1).

`encode` returns and `decode` takes raw latents, as the VAE defines them. The model sees latents normalised per channel,
`(z - mean) / std`. A clip's latents must not depend on the rest of its batch. On the CPU a batch changes the numbers,
so each clip gets its own forward pass. On other devices several small clips share one, each of them whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from sora_train.codec import DTYPES, CodecConfig
from sora_train.codec.files import VaeFiles, check_complete, damaged_file_errors, find_vae
from sora_train.codec.imports import without_torchao
from sora_train.codec.memory import free_bytes, give_back, is_out_of_memory
from sora_train.errors import UserError
from sora_train.latent_shape import shape_errors

PIXELS_AT_ONCE = 2**20  # 4 frames of 512 x 512: about 2 GB of activations with the Stable Diffusion VAE in float32
BYTES_PER_PIXEL = 2**11  # the same by pixel
PIXELS_AT_ONCE_CPU = 2**17  # activations of the small VAEs then stay in the cache: 1.7 times as fast as 2**19


class Vae:
    """A frozen VAE. `moments` is 2 for a posterior (mean, log-variance), else 1.

    `remarks` collects messages about fallbacks, such as a halved batch. The caller that reports them clears the list.
    """

    def __init__(self, model: Any, files: VaeFiles):
        self.model = model.eval().requires_grad_(False)
        self.files = files
        self.moments, self.channels = files.moments, files.channels
        self.factor, self.time_factor = files.factor, files.time_factor
        self.mean, self.std = torch.tensor(files.mean), torch.tensor(files.std)
        self.remarks: list[str] = []
        pixels = PIXELS_AT_ONCE_CPU if model.device.type == "cpu" else PIXELS_AT_ONCE
        self.pixels_at_once = {"encode": pixels, "decode": pixels}
        self.knows_memory = False
        if files.kind == "AutoencoderKLTemporalDecoder":  # its decoder mixes frames: a whole clip if it fits
            self.pixels_at_once["decode"] = sys.maxsize
        if self.time_factor == 1:
            # Channels last is 1.4 times as fast on the CPU (AMD EPYC, oneDNN, float32) and no slower elsewhere. It
            # applies to 2-d convolutions. The 3-d format was as good for Wan's VAE, but halved CogVideoX's speed.
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def hash(self) -> str:
        """Hash of weights and configuration."""
        return self.files.hash

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "b F H W 3"]) -> Float[Tensor, "b moments f c h w"]:
        """Encodes frames to raw moments of the posterior, float32 on the CPU.

        F frames become `f = 1 + (F - 1) / time_factor` latents. Raises ValueError if height or width is not a multiple
        of `factor`, or if F is not `k time_factor + 1`. Raises torch.OutOfMemoryError (RuntimeError on the CPU) if not
        even one frame fits in memory, or one clip with a video VAE.
        """
        _, count, height, width, _ = frames.shape
        if wrong := shape_errors((count, height, width), self.factor, self.time_factor):
            raise ValueError("; ".join(wrong))
        together = self._together("encode", count * height * width)
        # Only the last copy waits for the GPU, so the next frames are on their way while it computes.
        return torch.cat([self._encode_clips(clips) for clips in frames.split(together)]).cpu()

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "b f c h w"]) -> UInt8[Tensor, "b F H W 3"]:
        """Decodes raw (denormalised) latents to `F = 1 + (f - 1) time_factor` frames.

        The frames are on the CPU. Raises the same errors as `encode` if memory runs out.
        """
        _, count, _, height, width = latents.shape
        self._use_free_memory()
        together = self._together("decode", self._frames(count) * height * width * self.factor**2)
        return torch.cat([self._decode_clips(clips) for clips in latents.split(together)])

    def normalise(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Normalises raw latents: mean 0 and standard deviation 1 in each channel."""
        mean, std = (value[:, None, None].to(latents.device) for value in (self.mean, self.std))
        return (latents - mean) / std

    def denormalise(self, latents: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Inverts `normalise`: converts the model's latents to raw latents."""
        mean, std = (value[:, None, None].to(latents.device) for value in (self.mean, self.std))
        return latents * std + mean

    def _use_free_memory(self) -> None:
        """Lets the first call of `decode` take half of a GPU's free memory. Later ones keep its batch, or what fitted.

        `encode` has a fixed one: another batch may round latents otherwise, and shards must not depend on the GPU.
        """
        if not self.knows_memory:
            fits = free_bytes(self.model.device) // 2 // BYTES_PER_PIXEL
            self.pixels_at_once["decode"], self.knows_memory = max(self.pixels_at_once["decode"], fits), True

    def _frames(self, count: int) -> int:
        return 1 + (count - 1) * self.time_factor

    def _together(self, way: str, pixels: int) -> int:
        """Number of clips, of `pixels` pixels each, that may share a forward pass.

        A clip in its own forward pass always gives the same bits.
        """
        return 1 if self.model.device.type == "cpu" else max(1, self.pixels_at_once[way] // pixels)

    def _encode_clips(self, frames: Tensor) -> Tensor:
        batch, count, height, width, _ = frames.shape
        if self.time_factor > 1:
            x = rearrange(frames, "b F H W c -> b c F H W")
            moments = self._in_parts("encode", x, count * height * width, self._moments)
            return rearrange(moments, "b m c f h w -> b m f c h w").contiguous()
        x = rearrange(frames, "b F H W c -> (b F) c H W")
        moments = self._in_parts("encode", x, height * width, self._moments)
        return rearrange(moments, "(b f) m c h w -> b m f c h w", b=batch).contiguous()

    def _moments(self, x: Tensor) -> Tensor:
        """Moments (stacked along axis 1) of uint8 images or videos `b c ... H W`."""
        device = self.model.device
        x = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        x = (x.float() / 127.5 - 1).to(self.model.dtype, memory_format=self._format(x))
        encoded = self.model.encode(x)
        if self.moments == 1:
            return encoded.latents[:, None].float()
        posterior = encoded.latent_dist
        return torch.stack((posterior.mean, posterior.logvar), dim=1).float()

    def _decode_clips(self, latents: Tensor) -> Tensor:
        batch, count, _, height, width = latents.shape
        pixels = height * width * self.factor**2
        if self.time_factor > 1:
            z = rearrange(latents, "b f c h w -> b c f h w")
            frames = self._in_parts("decode", z, self._frames(count) * pixels, self._pixels)
            return rearrange(frames, "b c F H W -> b F H W c").contiguous()
        if self.files.kind == "AutoencoderKLTemporalDecoder":
            clips = torch.stack([self._in_parts("decode", z, pixels, self._pixels) for z in latents])
            return rearrange(clips, "b F c H W -> b F H W c").contiguous()
        z = rearrange(latents, "b f c h w -> (b f) c h w")
        frames = self._in_parts("decode", z, pixels, self._pixels)
        return rearrange(frames, "(b F) c H W -> b F H W c", b=batch).contiguous()

    def _pixels(self, z: Tensor) -> Tensor:
        """Decodes latents `b c ... h w` to uint8 images or videos `b c ... H W`.

        With a temporal decoder the latents are those of one clip, `f c h w`.
        """
        kind, count = self.files.kind, z.shape[2]
        if kind == "AutoencoderKLCogVideoX" and count > 1 and count % 2 == 0:
            # Its decoder makes 8 frames of 2 latents, not 5: the first latent gives one frame only if their number is
            # odd. So the last latent is repeated and the extra frames are cut. The convolutions are causal in time, so
            # the other frames do not change.
            z = torch.cat((z, z[:, :, -1:]), dim=2)
        z = z.to(self.model.device, self.model.dtype, memory_format=self._format(z))
        options = {"num_frames": len(z)} if kind == "AutoencoderKLTemporalDecoder" else {}
        made = self.model.decode(z, **options).sample.float()
        made = made[:, :, : self._frames(count)] if self.time_factor > 1 else made
        if not made.isfinite().all():  # NaN would become black in uint8
            raise UserError(
                f"the VAE {self.files.place} makes pixels that are not finite of these latents, in {self.model.dtype}",
                code="diverged",
            )
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def _format(self, x: Tensor) -> torch.memory_format:
        return torch.channels_last if x.ndim == 4 else torch.contiguous_format

    def _in_parts(self, way: str, x: Tensor, pixels: int, step: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `step` to all of x in batches that have fit in memory so far.

        `pixels` is the size of one item of x.
        """
        done: list[Tensor] = []
        at = 0
        while at < len(x):
            count = min(len(x) - at, max(1, self.pixels_at_once[way] // pixels))
            try:
                done.append(step(x[at : at + count]))
                at += count
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._make_room(way, count, pixels):
                    raise
            if hasattr(self.model, "clear_cache"):
                self.model.clear_cache()  # Wan's VAE caches the last frames of every layer
            give_back(self.model.device)
        return torch.cat(done)

    def _make_room(self, way: str, count: int, pixels: int) -> bool:
        """Halves the batch, or else turns on tiling. False if both are exhausted."""
        items = "frames" if self.time_factor == 1 else "clips"
        if count > 1:
            self.pixels_at_once[way] = count // 2 * pixels
            self.remarks.append(f"VAE: out of memory with {count} {items} at once; goes on with {count // 2}")
            return True
        if not hasattr(self.model, "use_tiling") or self.model.use_tiling:
            return False
        self.model.enable_tiling()
        self.remarks.append(f"VAE: out of memory with one {items[:-1]}; goes on in tiles, whose seams are blended")
        return True


@without_torchao()
def load_vae(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, models: str = ""
) -> Vae:
    """Loads the VAE that `codec.vae` names: `builtin`, a folder or a hub id.

    The folder or hub id may hold a whole pipeline with a `vae`. `models` is a folder that `sora download` filled. The
    weights have the type `dtype`, float32 or bfloat16. Raises UserError, with what to do, if the VAE can't be loaded.
    """
    import diffusers

    files = find_vae(name, models)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns about keys that TAESD's own class wrote to its config
    kind, place = getattr(diffusers, files.kind), str(files.place)
    try:
        with damaged_file_errors(f"codec.vae: {place}", files.place):
            model, info = kind.from_pretrained(
                place, local_files_only=True, use_safetensors=True, torch_dtype=dtype, low_cpu_mem_usage=False,
                output_loading_info=True,
            )  # fmt: skip
            check_complete(info)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    return Vae(model.to(device), files)


def vae_of(codec: CodecConfig, device: str | torch.device = "cpu") -> Vae:
    """Loads a recipe's VAE in the recipe's precision."""
    return load_vae(codec.vae, device, getattr(torch, DTYPES[codec.precision]), codec.models)
