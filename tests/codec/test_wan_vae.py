"""Latents of Wan's two VAEs as WanPipeline has them, from a clip's pixels to the model and back."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from wan_models import CHANNELS, Kind, frames_by_diffusers, latents_by_diffusers, make_wan_vae, wan_vae

from data_prep.pipeline import check_shapes
from sora_train.codec.files import find_vae
from sora_train.codec.vae import Vae, load_vae
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe

KINDS: tuple[Kind, ...] = ("2.1", "2.2")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_vae(tmp_path_factory.mktemp("pipeline") / "vae", kind).parent


@pytest.fixture(scope="module")
def vae(folder: Path) -> Vae:
    return load_vae(str(folder))


@pytest.fixture(scope="module")
def model(kind: Kind) -> AutoencoderKLWan:
    return wan_vae(kind)


def noise(*shape: int) -> Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_vae_says_its_factors(vae: Vae, kind: Kind):
    assert (vae.channels, vae.time_factor, vae.factor) == (CHANNELS[kind], 4, 8 if kind == "2.1" else 16)
    assert vae.moments == 2


@pytest.mark.parametrize("count", [1, 5, 9])
def test_latents_are_the_pipelines_and_so_are_the_frames_they_become(vae: Vae, model: AutoencoderKLWan, count: int):
    clip = noise(1, count, 64, 96)
    made = vae.normalise(vae.encode(clip)[0, 0])
    expected = latents_by_diffusers(model, clip[0])
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    back = vae.decode(vae.denormalise(made)[None])[0]
    assert back.shape == clip[0].shape
    assert (back - frames_by_diffusers(model, expected)).abs().max() <= 0.52


def test_without_memory_for_a_clip_it_goes_through_in_tiles(kind: Kind, folder: Path):
    """Tiles of 32 of a clip of 64 x 96 pixels; diffusers' own tiling of the same sizes is the oracle."""
    vae, model = load_vae(str(folder)), wan_vae(kind)
    sizes = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 32)
    sizes |= dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 16 if kind == "2.1" else 32)
    model.enable_tiling(**sizes)
    for name, size in sizes.items():
        setattr(vae.model, name, size)
    encode, decode = vae.model.encode, vae.model.decode

    def short(whole: Any) -> Any:
        def step(x: Tensor) -> Any:
            if not vae.model.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return whole(x)

        return step

    vae.model.encode, vae.model.decode = short(encode), short(decode)
    clip = noise(1, 5, 64, 96)
    made = vae.normalise(vae.encode(clip)[0, 0])
    assert vae.remarks == ["VAE: out of memory with one clip; goes on in tiles, whose seams are blended"]
    expected = latents_by_diffusers(model, clip[0])
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    whole = latents_by_diffusers(wan_vae(kind), clip[0])
    assert (whole - expected).abs().max() > 1e-3  # else nothing was tiled
    back = vae.decode(vae.denormalise(made)[None])[0]
    assert (back - frames_by_diffusers(model, expected)).abs().max() <= 0.52


def test_a_recipe_whose_shapes_the_vae_does_not_divide_is_refused(kind: Kind, folder: Path):
    grid, good = (16, 480) if kind == "2.1" else (32, 704)
    files = find_vae(str(folder))

    def check(**data: Any) -> None:
        check_shapes(Recipe.model_validate({"data": data}), files)

    check(frames=81, height=good, width=832)
    check(buckets=["1x64x64", "5x64x96"])
    with pytest.raises(RecipeError) as caught:
        check(frames=80, height=good + 8, width=832)
    assert str(caught.value).splitlines() == [
        "data.frames 80 is not 4k+1, as the VAE needs; use 77 or 81",
        f"data.height {good + 8} does not divide by {grid} (VAE {files.factor} x model.patch 2); use {good} or "
        f"{good + grid}",
    ]


def test_weights_that_are_cut_short_are_found_without_loading_them(kind: Kind, folder: Path, tmp_path: Path):
    cut = Path(shutil.copytree(folder, tmp_path / "cut"))
    find_vae(str(cut))
    (weights,) = (cut / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"codec.vae: {weights} is cut short .*Fetch it again"):
        find_vae(str(cut))
