"""Frames to latents and back, against diffusers itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from einops import rearrange
from safetensors.torch import load_file, save_file

from sora_train.codec import BUILTIN, CodecConfig
from sora_train.codec.files import damaged_file_errors, find_vae
from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import Vae, load_vae, vae_of
from sora_train.errors import UserError
from sora_train.quickstart.shapes import all_scenes, draw


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL that shrinks by 4, with a spread per channel in its configuration."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        latents_mean=[1.0, 2.0, 3.0],
        latents_std=[0.5, 1.0, 2.0],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tiny: Path) -> Vae:
    return load_vae(str(tiny))


def frames(batch: int, count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_by_default_latents_are_those_of_float32_and_bf16_is_far_from_them():
    clip = torch.from_numpy(draw(all_scenes()[0], np.random.default_rng(0)))[None]
    exact, half = vae_of(CodecConfig()), vae_of(CodecConfig(precision="bf16"))
    latents = [exact.normalise(made.encode(clip)[:, 0]) for made in (load_vae("builtin"), exact, half)]
    assert torch.equal(latents[0], latents[1])
    assert (latents[2] - latents[1]).square().mean().sqrt() > 0.001  # a tenth of the noise at DDPM's lowest step


def test_a_vae_with_a_posterior_gives_mean_and_log_variance(vae: Vae, tiny: Path):
    x = frames(2, 3, 16, 24)
    latents = vae.encode(x)
    assert latents.shape == (2, 2, 3, 3, 4, 6)
    reference = AutoencoderKL.from_pretrained(tiny)
    with torch.no_grad():
        posterior = reference.encode(rearrange(x, "b F H W c -> (b F) c H W") / 127.5 - 1).latent_dist
    torch.testing.assert_close(
        rearrange(latents[:, 0], "b f c h w -> (b f) c h w"), posterior.mean, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        rearrange(latents[:, 1], "b f c h w -> (b f) c h w"), posterior.logvar, atol=1e-5, rtol=1e-5
    )


def test_taesd_is_diffusers_own(shared: Path):
    folder = shared / "models" / "taesd"
    taesd, x = load_vae(str(folder)), frames(1, 2, 32, 32)
    assert (taesd.channels, taesd.factor, taesd.moments) == (4, 8, 1)
    latents = taesd.encode(x)
    reference = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        expected = reference.encode(rearrange(x, "b F H W c -> (b F) c H W") / 127.5 - 1).latents
        decoded = reference.decode(expected).sample
    torch.testing.assert_close(latents[0, 0], expected, atol=1e-5, rtol=1e-5)
    expected_frames = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert (taesd.decode(latents[:, 0])[0] - expected_frames).abs().max() <= 0.51


def test_a_frame_is_encoded_the_same_alone_and_in_a_batch(vae: Vae):
    x = frames(3, 400, 16, 16)  # more than goes through at once
    latents = vae.encode(x)
    torch.testing.assert_close(vae.encode(x[2:, 399:])[0, :, 0], latents[2, :, 399], atol=1e-5, rtol=1e-5)


def test_denormalise_undoes_normalise_and_uses_each_channels_own_spread(vae: Vae):
    latents = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(vae.denormalise(vae.normalise(latents)), latents)
    constant = torch.tensor([1.0, 2.0, 3.0])[:, None, None] + torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    torch.testing.assert_close(vae.normalise(constant.expand(3, 2, 2)), torch.ones(3, 2, 2))


def test_decoded_frames_have_the_pixels_size(vae: Vae):
    assert vae.decode(torch.zeros(1, 2, 3, 4, 6)).shape == (1, 2, 16, 24, 3)


def test_a_size_that_does_not_divide_is_refused(vae: Vae):
    with pytest.raises(ValueError, match="height 30 does not divide by 4, the VAE's factor; use 28 or 32"):
        vae.encode(frames(1, 1, 30, 32))


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny])
def test_a_config_that_is_silent_means_what_its_class_means(kind: type, tmp_path: Path):
    model = kind()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{kind.__name__}"}}')
    files, config = find_vae(str(tmp_path)), model.config
    blocks = config.encoder_block_out_channels if kind is AutoencoderTiny else config.block_out_channels
    assert files.std == (1 / config.scaling_factor,) * config.latent_channels
    assert (files.channels, files.factor) == (config.latent_channels, 2 ** (len(blocks) - 1))


def test_two_folders_with_the_same_content_hash_alike_and_other_weights_do_not(tiny: Path, tmp_path: Path, vae: Vae):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert find_vae(str(tmp_path)).hash == vae.hash
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert find_vae(str(tmp_path)).hash != vae.hash


def test_a_network_of_another_class_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="holds a UNet2DModel. Supported: AutoencoderKL, AutoencoderTiny, "):
        load_vae(str(tmp_path))


def test_the_embedded_vae_brings_the_demos_clips_back():
    builtin = load_vae("builtin")
    clip = torch.from_numpy(np.stack([draw(all_scenes()[i], np.random.default_rng(i)) for i in (0, 17, 40, 71)]))
    latents = builtin.encode(clip)
    error = (builtin.decode(latents[:, 0]).float() - clip.float()) / 255
    assert -10 * error.square().mean().log10() > 30  # dB
    normalised = builtin.normalise(latents[:, 0])
    assert normalised.mean((0, 1, 3, 4)).abs().max() < 0.3
    assert 0.5 < normalised.std() < 2


@pytest.mark.parametrize("key", ["vae", "text"])
@pytest.mark.parametrize("name", ["config.json", "*.safetensors", "tokenizer.json"])
def test_a_network_whose_files_were_cut_is_one_message_that_names_them(tmp_path: Path, key: str, name: str):
    folder = tmp_path / key
    shutil.copytree(BUILTIN / key, folder)
    for file in folder.glob(name):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(
            UserError, match=rf"{folder}.* (cut short|can't be read .*damaged).*[Ff]etch (it|them) again"
        ):
            (load_vae if key == "vae" else load_text_encoder)(str(folder))


@pytest.mark.parametrize("key", ["vae", "text"])
def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(tmp_path: Path, key: str):
    folder = tmp_path / key
    shutil.copytree(BUILTIN / key, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in sorted(tensors) if name.endswith("weight") and "shared" not in name)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 of the network's tensors are not there, such as {lost}.*Fetch them again"):
        (load_vae if key == "vae" else load_text_encoder)(str(folder))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("T5Tokenizer needs sentencepiece"), "a package is missing here .*sentencepiece"),
        (PermissionError(13, "Permission denied"), "can't be read: Permission denied"),
        (ValueError("no such model type"), "of another kind of network. Fetch them again$"),
    ],
)
def test_what_is_not_damage_is_not_called_so(error: Exception, words: str):
    with pytest.raises(UserError, match=words) as caught, damaged_file_errors("codec.text: folder"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_too_little_memory_stays_what_it_is(error: Exception):
    with pytest.raises(type(error)), damaged_file_errors("codec.vae: folder"):
        raise error


def test_a_network_of_a_newer_library_says_so(tmp_path: Path):
    shutil.copytree(BUILTIN / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "99.1", "act_fn": "new"}))
    with pytest.raises(UserError, match=r"install diffusers 99\.1, which wrote them; \d"):
        load_vae(str(tmp_path / "vae"))


def test_pixels_that_are_not_finite_are_an_error_and_no_black_video():
    broken, latents = load_vae("builtin"), torch.zeros(1, 2, 4, 2, 2)
    assert broken.decode(latents).shape == (1, 2, 16, 16, 3)
    with torch.no_grad():
        broken.model.decoder.conv_out.bias[1] = torch.nan
    with pytest.raises(UserError, match="makes pixels that are not finite of these latents, in torch.float32"):
        broken.decode(latents)
