"""Tiny random networks of Wan's classes, made by diffusers and transformers, for tests of every package.

`kind` is "2.1" (16 latent channels, 4 x 8 x 8) or "2.2" (residual, patch 2, 48 latent channels, 4 x 16 x 16).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from sora_train.codec import BUILTIN
from sora_train.codec.text import load_tokenizer

Kind = Literal["2.1", "2.2"]
CHANNELS = {"2.1": 16, "2.2": 48}
SHIFT = {"2.1": 3.0, "2.2": 5.0}
TEXT_WIDTH = 32


def wan_vae(kind: Kind, seed: int = 0, **options: Any) -> AutoencoderKLWan:
    """A random VAE, whose `latents_mean` and `latents_std` are random too."""
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}
    channels = options.get("z_dim", CHANNELS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = torch.randn(channels) * 0.3, 0.2 + torch.rand(channels)
        size: dict[str, Any] = {"base_dim": 4, "z_dim": channels, "num_res_blocks": 1}
        kinds = {**residual, "scale_factor_spatial": 16} if kind == "2.2" else {}
        statistics = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        return varied(of_class(AutoencoderKLWan, size | kinds | statistics | options))


def umt5(vocabulary: int, seed: int = 0, **options: Any) -> UMT5EncoderModel:
    """A random text encoder, whose every layer has its own relative positions as UMT5's have."""
    size: dict[str, Any] = {
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": vocabulary,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return varied(UMT5EncoderModel(UMT5Config(**size | options)).eval())


def wan_transformer(kind: Kind, seed: int = 0, **options: Any) -> WanTransformer3DModel:
    """A random transformer. No weight is zero, so every gate is open."""
    channels = CHANNELS[kind]
    size: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "ffn_dim": 48,
    }
    ends = {"in_channels": channels, "out_channels": channels, "text_dim": TEXT_WIDTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return varied(of_class(WanTransformer3DModel, size | ends | options))


def of_class(kind: Any, config: dict[str, Any]) -> Any:
    return kind(**config).eval()


def varied(model: Any) -> Any:
    """The model with other norms and biases than its class begins with, so a test sees whether they are used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim <= 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_wan_vae(folder: Path, kind: Kind, **options: Any) -> Path:
    """Saves a random VAE to `folder` itself."""
    wan_vae(kind, **options).save_pretrained(folder)
    return folder


def make_umt5(folder: Path, tokenizer: Path = BUILTIN / "text", **options: Any) -> Path:
    """Saves a random UMT5 and a tokenizer to `folder/text_encoder` and `folder/tokenizer`, as a pipeline has them.

    The built-in tokenizer has 326 tokens. T5's own is `../shared/models/t5_tokenizer`.
    """
    words = load_tokenizer(tokenizer)
    umt5(len(words), **options).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    return folder


def make_wan_pipeline(folder: Path, kind: Kind, tokenizer: Path = BUILTIN / "text") -> Path:
    """Saves a whole random `WanPipeline` to `folder`."""
    words = load_tokenizer(tokenizer)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT[kind]}
    WanPipeline(
        tokenizer=words,  # pyright: ignore[reportArgumentType]
        text_encoder=umt5(len(words)),
        vae=wan_vae(kind),
        scheduler=UniPCMultistepScheduler(num_train_timesteps=1000, **flow),  # pyright: ignore[reportArgumentType]
        transformer=wan_transformer(kind),
        expand_timesteps=kind == "2.2",
    ).save_pretrained(folder)
    return folder


def open_wan_pipeline(folder: Path) -> WanPipeline:
    """Loads a saved `WanPipeline` in float32.

    diffusers opens a saved WanTransformer3DModel only where `accelerate` is installed (its `_keep_in_fp32_modules`),
    which the project doesn't need. So the transformer's weights are put in here.
    """
    config: Any = WanTransformer3DModel.load_config(str(folder / "transformer"))
    transformer: Any = WanTransformer3DModel.from_config(config)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    transformer.load_state_dict(weights)
    return WanPipeline.from_pretrained(
        str(folder), transformer=transformer.eval(), local_files_only=True, low_cpu_mem_usage=False
    )


def latents_by_diffusers(model: Any, clip: Tensor) -> Tensor:
    """Normalised latents `f c h w` of a clip `F H W 3`: the mode, as WanImageToVideoPipeline's `prepare_latents`."""
    video = VideoProcessor(model.config.scale_factor_spatial).preprocess_video(clip.numpy()[None] / 255)
    with torch.no_grad():
        latents = model.encode(video.float()).latent_dist.mode()
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return rearrange((latents - mean) * (1.0 / std), "1 c f h w -> f c h w")


def frames_by_diffusers(model: Any, latents: Tensor) -> Tensor:
    """Frames `F H W 3` from 0 to 255 of normalised latents `f c h w`, as WanPipeline ends."""
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    z = rearrange(latents, "f c h w -> 1 c f h w") / (1.0 / std) + mean
    with torch.no_grad():
        video = model.decode(z, return_dict=False)[0]
    made: Any = VideoProcessor().postprocess_video(video, output_type="np")
    return torch.from_numpy(made[0]) * 255
