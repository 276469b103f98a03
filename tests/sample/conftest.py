"""A run of a tiny random model, without any training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.model import ModelConfig, build
from sora_train.recipe import Recipe, save_recipe

MODEL = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=8)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, make_manifest) -> Callable[..., Path]:
    """make_run(model, spread, **sections): 3 frames of 16 x 32 pixels, a VAE of factor 2, the builtin text encoder."""

    def make(model: ModelConfig = MODEL, spread: float = 0.2, **sections: dict) -> Path:
        root = tmp_path_factory.mktemp("generate")
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).save_pretrained(root / "vae")
        vae, encoder = load_vae(str(root / "vae")), load_text_encoder("builtin", max_tokens=20)
        folder = root / "runs" / "tiny"
        checkpoint = folder / "checkpoints" / "step_00000020"
        checkpoint.mkdir(parents=True)
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "codec": {"vae": str(root / "vae"), "max_tokens": 20},
                "model": dataclasses.asdict(model),
                "validation": {"steps": 2, "guidance": 3.0},
                **sections,
            }
        )
        manifest = make_manifest(vae, encoder, (3, 16, 32), {})
        save_recipe(recipe, folder / "recipe.yaml")
        manifest.save(str(folder))
        weights = {name: torch.randn_like(weight) * spread for name, weight in build(recipe.model).state_dict().items()}
        save_file(weights, checkpoint / "ema.safetensors")
        return folder

    return make
