"""Every kind of VAE against diffusers' own call, and what the pipelines of diffusers do with its latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from einops import rearrange
from safetensors.torch import save_file

from sora_train.codec.files import find_vae
from sora_train.codec.vae import Vae, load_vae
from sora_train.errors import UserError

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "image": (
        AutoencoderKL,
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
        },
    ),
    "tiny": (
        AutoencoderTiny,
        {"encoder_block_out_channels": (8,) * 2, "decoder_block_out_channels": (8,) * 2}
        | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    ),
    "temporal": (
        AutoencoderKLTemporalDecoder,
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32)},
    ),
    "wan": (AutoencoderKLWan, {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1}),
    "wan22": (
        AutoencoderKLWan,
        {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        | {"is_residual": True, "scale_factor_spatial": 16, "decoder_base_dim": 8},
    ),
    "cogvideox": (
        AutoencoderKLCogVideoX,
        {"block_out_channels": (8, 8, 8, 8), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 2},
    ),
}
WAN = {"latents_mean": [0.5, -1.0, 2.0], "latents_std": [2.0, 0.5, 4.0]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random network of the kind, in float32, and the pipeline's folder whose `vae` it was saved to."""
    torch.manual_seed(0)
    make, options = KINDS[request.param]
    model = make(**options, **(WAN if make is AutoencoderKLWan else {})).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "vae")
    return model, folder


def clips(batch: int, count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def by_diffusers(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Moments `m f c h w` of one clip `F H W 3`, by diffusers alone."""
    video = isinstance(model, AutoencoderKLWan | AutoencoderKLCogVideoX)
    x = rearrange(x / 127.5 - 1, "F H W c -> 1 c F H W" if video else "F H W c -> F c H W")
    with torch.no_grad():
        encoded = model.encode(x)
    if isinstance(model, AutoencoderTiny):
        return encoded.latents[None]
    moments = torch.stack((encoded.latent_dist.mean, encoded.latent_dist.logvar))
    return rearrange(moments, "m 1 c f h w -> m f c h w") if video else moments


def back_by_diffusers(model: Any, z: torch.Tensor) -> torch.Tensor:
    """Frames `F H W 3`, from 0 to 255, of one clip's latents `f c h w`, by diffusers alone."""
    video = isinstance(model, AutoencoderKLWan | AutoencoderKLCogVideoX)
    with torch.no_grad():
        if isinstance(model, AutoencoderKLTemporalDecoder):
            made = model.decode(z, num_frames=len(z)).sample
        else:
            made = model.decode(rearrange(z, "f c h w -> 1 c f h w") if video else z).sample
    made = rearrange(made, "1 c F H W -> F H W c" if video else "F c H W -> F H W c")
    return (made.clamp(-1, 1) + 1) * 127.5


@pytest.mark.parametrize("count", [1, 9])
def test_each_kind_encodes_and_decodes_as_diffusers_does(kind: tuple[Any, Path], count: int):
    model, folder = kind
    vae = load_vae(str(folder))
    x = clips(2, count, 64, 32)
    latents = vae.encode(x)
    f = 1 + (count - 1) // vae.time_factor
    assert latents.shape == (2, vae.moments, f, vae.channels, 64 // vae.factor, 32 // vae.factor)
    assert latents.dtype == torch.float32
    for i in range(2):
        torch.testing.assert_close(latents[i], by_diffusers(model, x[i]), atol=1e-5, rtol=1e-4)
    made = vae.decode(latents[:, 0])
    assert made.shape == x.shape
    for i in range(2):
        assert (made[i] - back_by_diffusers(model, latents[i, 0])).abs().max() <= 0.51


def test_a_clips_latents_do_not_depend_on_its_batch(kind: tuple[Any, Path]):
    for dtype in (torch.float32, torch.bfloat16):
        vae = load_vae(str(kind[1]), dtype=dtype)
        for count in (5, 17) if vae.time_factor > 1 else (5, 16, 17):
            x = clips(3, count, 32, 32)
            alone = [vae.encode(clip[None].clone())[0] for clip in x]
            assert torch.equal(vae.encode(x), torch.stack(alone)), (dtype, count)
        assert torch.equal(vae.decode(alone[2][None, 0]), vae.decode(torch.stack(alone)[:, 0])[2:]), dtype


def test_a_clip_longer_than_what_goes_through_at_once_does_not_depend_on_its_batch(shared: Path):
    for dtype in (torch.float32, torch.bfloat16):
        taesd = load_vae(str(shared / "models" / "taesd"), dtype=dtype)
        taesd.pixels_at_once["encode"] = 3 * 64 * 64
        x = clips(2, 17, 64, 64)
        assert torch.equal(taesd.encode(x)[1:], taesd.encode(x[1:].clone()))


def test_bfloat16_is_near_float32(kind: tuple[Any, Path]):
    full, half = load_vae(str(kind[1])), load_vae(str(kind[1]), dtype=torch.bfloat16)
    x = clips(1, 5, 32, 32)
    a, b = full.encode(x), half.encode(x)
    assert b.dtype == torch.float32
    assert (a - b).square().mean() < 1e-3 * a.square().mean()
    made = [vae.decode(a[:, 0]).float() for vae in (full, half)]
    assert (made[0] - made[1]).abs().mean() < 1


@pytest.mark.parametrize("kind", ["wan", "cogvideox"], indirect=True)
@pytest.mark.parametrize("count", [2, 16])
def test_a_video_vae_refuses_frames_that_are_not_4k_plus_1(kind: tuple[Any, Path], count: int):
    low = (count - 1) // 4 * 4 + 1
    with pytest.raises(ValueError, match=rf"frames {count} is not 4k\+1, as the VAE needs; use {low} or {low + 4}"):
        load_vae(str(kind[1])).encode(clips(1, count, 32, 32))


@pytest.mark.parametrize("kind", ["cogvideox"], indirect=True)
@pytest.mark.parametrize("count", [5, 13])
def test_cogvideox_gives_back_as_many_frames_as_it_took_where_its_latents_are_even(kind: tuple[Any, Path], count: int):
    """diffusers makes 8 of 5 and 16 of 13; ours are the first of those with the last latent given twice."""
    model, folder = kind
    vae = load_vae(str(folder))
    latents = vae.encode(clips(1, count, 32, 32))[:, 0]
    assert len(back_by_diffusers(model, latents[0])) == count + 3
    made = vae.decode(latents)
    assert made.shape[1] == count
    longer = torch.cat((latents, latents[:, -1:]), 1)
    assert (made[0] - back_by_diffusers(model, longer[0])[:count]).abs().max() <= 0.51


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_latents_are_normalised_as_diffusers_pipelines_do(kind: tuple[Any, Path]):
    model, folder = kind
    vae = load_vae(str(folder / "vae"))
    z = torch.randn(2, 3, vae.channels, 4, 5)
    if isinstance(model, AutoencoderKLWan):  # pipeline_wan_i2v.py, prepare_latents
        mean = torch.tensor(model.config.latents_mean).view(1, 3, 1, 1, 1)
        inverse = 1.0 / torch.tensor(model.config.latents_std).view(1, 3, 1, 1, 1)
        expected = rearrange((rearrange(z, "b f c h w -> b c f h w") - mean) * inverse, "b c f h w -> b f c h w")
    else:
        expected = z * model.config.scaling_factor
    torch.testing.assert_close(vae.normalise(z), expected)
    torch.testing.assert_close(vae.denormalise(vae.normalise(z)), z)


@pytest.mark.parametrize("kind", ["cogvideox"], indirect=True)
def test_the_inverted_scale_of_image_latents_leaves_a_videos_alone(kind: tuple[Any, Path], tmp_path: Path):
    """`invert_scale_latents` is CogVideoX 1.5's, for the image it is given; videos are decoded from z / scale there."""
    model, _ = kind
    model.register_to_config(invert_scale_latents=True)
    model.save_pretrained(tmp_path)
    model.register_to_config(invert_scale_latents=False)
    assert find_vae(str(tmp_path)).std == (1 / model.config.scaling_factor,) * 3


def test_a_video_vaes_config_that_is_silent_means_what_its_class_means(tmp_path: Path):
    for make, channels in ((AutoencoderKLCogVideoX, 16), (AutoencoderKLTemporalDecoder, 4)):
        (tmp_path / "config.json").write_text(f'{{"_class_name": "{make.__name__}"}}')
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        files = find_vae(str(tmp_path))
        assert files.channels == channels
        assert (files.factor, files.time_factor) == ((8, 4) if make is AutoencoderKLCogVideoX else (1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('"temperal_downsample": [false, false, true]', "compresses time by 2; diffusers reads Wan's VAE only with 4"),
        ('"z_dim": 16', "has no latents_mean and latents_std"),
    ],
)
def test_a_wan_vae_that_can_not_be_read_rightly_is_refused(config: str, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(f'{{"_class_name": "AutoencoderKLWan", {config}}}')
    with pytest.raises(UserError, match=message):
        find_vae(str(tmp_path))


@pytest.mark.parametrize("kind", ["wan", "wan22", "cogvideox"], indirect=True)
def test_pixels_and_frames_of_a_latent_are_what_the_network_makes(kind: tuple[Any, Path]):
    model, folder = kind
    vae: Vae = load_vae(str(folder))
    _, f, _, h, w = by_diffusers(model, clips(1, 9, 64, 32)[0]).shape
    assert (vae.time_factor, vae.factor) == (8 // (f - 1), 64 // h) == (4, 32 // w)
