"""A run of a tiny model with random weights everywhere, and a checkpoint of two ranks, without any training."""

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sora_train.codec.text import load_text_encoder, null_tokens
from sora_train.codec.vae import load_vae
from sora_train.diffusion import DiffusionConfig
from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts
from sora_train.model import ModelConfig, build
from sora_train.recipe import Recipe, save_recipe
from sora_train.train.checkpoint import Snapshot, State

DDPM = DiffusionConfig(kind="ddpm")


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """run_of(model, diffusion, vae, text, frames, width, validation, conditioning, **codec): a run's folder at step 20,
    of clips of 32 x 48 pixels or another width."""

    def make(
        model: ModelConfig,
        diffusion: DiffusionConfig = DDPM,
        vae: str = "builtin",
        text: str = "builtin",
        frames: int = 3,
        width: int = 48,
        validation: dict[str, object] | None = None,
        conditioning: dict[str, float] | None = None,
        **codec: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        folder.mkdir()
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "codec": {"vae": vae, "text": text, "max_tokens": 20, "text_precision": "fp32", **codec},
                "model": dataclasses.asdict(model),
                "diffusion": dataclasses.asdict(diffusion),
                "conditioning": conditioning or {},
                "validation": {
                    "steps": 4,
                    "guidance": 3.0,
                    "prompts": ['a "red" circle\n```\n<script>'],
                    **(validation or {}),
                },
            }
        )
        max_tokens, cleaning = recipe.codec.max_tokens, str(codec.get("caption_cleaning", "none"))
        made, encoder = load_vae(vae), load_text_encoder(text, max_tokens)
        mean, std = tuple(made.mean.tolist()), tuple(made.std.tolist())
        save_recipe(recipe, folder / "recipe.yaml")
        Manifest(
            encoding_hash="",
            vae=VaeFacts(
                name=vae,
                hash=made.hash,
                channels=made.channels,
                factor=made.factor,
                time_factor=made.time_factor,
                mean=mean,
                std=std,
            ),
            text=TextFacts(
                name=text, hash=encoder.hash, width=encoder.width, max_tokens=max_tokens, caption_cleaning=cleaning
            ),
            latents=LatentFormat(moments=made.moments),
            frames=frames,
            fps=8.0,
            height=32,
            width=width,
            buckets={f"{frames}x32x{width}": 7, f"1x32x{width}": 0},
            empty_text=base64.b64encode(null_tokens(encoder)).decode(),
            empty_tokens=2,
            counts=Counts(asked=7, written=7, quarantined=0, filtered=0),
            reasons={},
        ).save(str(folder))
        torch.manual_seed(0)
        shapes = {name: weight.shape for name, weight in build(model).state_dict().items()}
        averaged, trained = ({name: 0.2 * torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
        write_checkpoint(folder / "checkpoints" / "step_00000020", averaged, trained)
        return folder

    return make


def write_checkpoint(folder: Path, averaged: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> None:
    """As two ranks of ZeRO write it: each has its half of every parameter."""
    for rank in range(2):
        owned, offsets = {}, {}
        for name, tensor in trained.items():
            half = tensor.numel() // 2
            part = tensor.flatten()[:half] if rank == 0 else tensor.flatten()[half:]
            owned |= {f"{kind}/{name}": part.clone() for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")}
            offsets[name] = rank * half
        state = State(step=20)
        Snapshot(state, rank, 2, 1, owned, offsets, averaged if rank == 0 else {}, "token").write(folder)
