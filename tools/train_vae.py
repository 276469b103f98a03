"""Trains the built-in VAE on frames of the demo's clips.

Usage: `python -m tools.train_vae`.

The VAE is a diffusers `AutoencoderKL` of the usual layout (8 x 8 pixels to one latent of 4 channels), small enough for
the repository. Most of a frame is dark background, so the loss gives the shape and its edge more weight. The last
quarter trains only the decoder, on latents with added noise, so a sampler's small errors become clean edges instead of
smears. The latents' mean and standard deviation per channel are in the VAE's config (`latents_mean`, `latents_std`).
"""

# diffusers annotates its VAE wrongly (tuples of one, outputs that may be None):
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from sora_train.codec import BUILTIN
from sora_train.quickstart.shapes import GROUND, SIZE, make_clips
from sora_train.video import psnr, read_mp4

POSTERIOR_LOG_VARIANCE = -5.0  # initial value: a standard deviation of 0.08, so latents must be further apart
CLIPS, BATCH, SEED = 2400, 16, 0
DECODER_NOISE = 0.15  # share of a latent channel's standard deviation, in the last quarter


def build() -> AutoencoderKL:
    """An untrained VAE of the built-in shape, about 1 M parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = POSTERIOR_LOG_VARIANCE
    return vae


def decoded_frames(clips: int, seed: int) -> Tensor:
    """Every frame of newly made clips, decoded from H.264: uint8 `b 3 H W`."""
    with tempfile.TemporaryDirectory() as folder:
        make_clips(folder, clips, seed)
        frames = np.concatenate([read_mp4(path) for path in sorted(Path(folder).glob("*.mp4"))])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def to_unit(frames: Tensor) -> Tensor:
    return frames.float() / 127.5 - 1


def weighted_error(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 + 4 L2. The shape and two pixels around it weigh 9 times the background."""
    ground = torch.tensor(GROUND, dtype=wanted.dtype)[:, None, None] / 127.5 - 1
    shape = ((wanted - ground).abs().amax(1, keepdim=True) > 0.15).to(wanted.dtype)
    weight = 1 + 8 * F.max_pool2d(shape, 5, stride=1, padding=2)
    error = made - wanted
    return (weight * (error.abs() + 4 * error.square())).sum() / weight.sum() / 3


def reconstruct(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """uint8 frames after the VAE has encoded and decoded them.

    The latents are the posterior's mean.
    """
    with torch.no_grad():
        made = [vae.decode(vae.encode(to_unit(part)).latent_dist.mean).sample for part in frames.split(256)]
    return ((torch.cat(made).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def latent_statistics(vae: AutoencoderKL, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in frames.split(256)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def train(steps: int) -> AutoencoderKL:
    """Trains encoder and decoder, then in the last quarter only the decoder."""
    torch.manual_seed(SEED)
    vae = build()
    frames, held_out = decoded_frames(CLIPS, SEED), decoded_frames(96, SEED + 1)
    encoder_steps = steps * 3 // 4
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        since, length = (step, encoder_steps) if step < encoder_steps else (step - encoder_steps, steps - encoder_steps)
        peak = 1.0 if step < encoder_steps else 0.5
        return peak * min(1.0, (since + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * since / length)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    spread = torch.ones(4)
    started = time.perf_counter()
    for step in range(steps):
        if step == encoder_steps:
            _, spread = latent_statistics(vae, frames[:4096])
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        wanted = to_unit(frames[torch.randint(len(frames), (BATCH,))])
        with torch.autocast("cpu", torch.bfloat16):
            if step < encoder_steps:
                posterior = vae.encode(wanted).latent_dist
                z, kl = posterior.sample(), posterior.kl().mean() / posterior.mean[0].numel()
            else:
                with torch.no_grad():
                    mean = vae.encode(wanted).latent_dist.mean
                sigma = DECODER_NOISE * spread[:, None, None] * torch.rand(BATCH, 1, 1, 1)
                z, kl = mean + sigma * torch.randn_like(mean), torch.zeros(())
            made = vae.decode(z).sample
        error = weighted_error(made.float(), wanted)
        (error + 1e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            quality = psnr(reconstruct(vae, held_out).numpy(), held_out.numpy())
            print(
                f"step {step:5d}  error {error.item():.4f}  kl {kl.item():.3f}  psnr {quality:.2f} dB  {seconds:.0f} s",
                flush=True,
            )
    mean, std = latent_statistics(vae, frames[:8192])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default=str(BUILTIN / "vae"), help="folder to write, in diffusers' format")
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args()
    vae = train(args.steps)
    folder = Path(args.to)
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in vae.state_dict().items()}
    save_file(half, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    vae.save_config(folder)
    reread = AutoencoderKL.from_pretrained(folder)
    size, unseen = sum(tensor.numel() for tensor in half.values()), decoded_frames(192, SEED + 2)
    quality = psnr(reconstruct(reread, unseen).numpy(), unseen.numpy())
    print(json.dumps({"parameters": size, "psnr_float16": round(quality, 2)}))


if __name__ == "__main__":
    main()
