"""A tiny run of a random model with its shards: clips of 16 frames and pictures, half of the sources held out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.manifest import Manifest
from sora_train.model import Latte, ModelConfig
from sora_train.recipe import Recipe, save_recipe
from sora_train.sample import Run, load_run
from sora_train.schema import ENCODING_KEY, SHARD_SCHEMA, encode_row

MODEL = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=8)
CLIPS, PICTURES = 40, 8
WORDS = ["<end>", "<start>", "a", "red", "blue", "circle", "moving", "left"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest]) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(root / "vae")
    vae, encoder = load_vae(str(root / "vae")), load_text_encoder("builtin", max_tokens=20)
    rng = np.random.default_rng(0)
    for (frames, height, width), first, count in (((16, 16, 24), 0, CLIPS), ((1, 16, 16), CLIPS, PICTURES)):
        rows = []
        for number in range(first, first + count):
            captions = [f"clip {number}", f"number {number}"][: 1 + number % 2]
            rows.append(
                encode_row(
                    sample_id=f"{number:08x}",
                    source=f"{number // 2}.mp4",
                    source_size=1,
                    source_version="",
                    content_hash="",
                    start_s=0.0,
                    end_s=2.0,
                    captions=captions,
                    latents=rng.normal(size=(2, frames, 4, height // 2, width // 2)),
                    text=[embedding.numpy() for embedding in encoder.encode(captions)],
                )
            )
        place = root / "shards" / f"bucket={frames}x{height}x{width}"
        place.mkdir(parents=True)
        schema = SHARD_SCHEMA.with_metadata({ENCODING_KEY: "tiny"})
        for part in (0, 1):
            table = pa.Table.from_pylist(rows[part * count // 2 : (part + 1) * count // 2], schema)
            pq.write_table(table, place / f"{part}.parquet", row_group_size=6)
    manifest = make_manifest(vae, encoder, (16, 16, 24), {"16x16x24": CLIPS, "1x16x16": PICTURES})
    folder = root / "runs" / "tiny"
    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    manifest.save(str(folder))
    manifest.save(str(root / "shards"))
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"output": str(root / "shards"), "holdout_fraction": 0.5},
            "codec": {"vae": str(root / "vae"), "max_tokens": 20, "text_precision": "fp32"},
            "model": dataclasses.asdict(MODEL),
            "validation": {"steps": 2, "guidance": 2.0, "prompts": ["a red circle", "a blue square moving up"]},
        }
    )
    save_recipe(recipe, folder / "recipe.yaml")
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in Latte(recipe.model).state_dict().items()}
    save_file(weights, checkpoint / "ema.safetensors")
    return folder


@pytest.fixture(scope="session")
def run(run_folder: Path) -> Run:
    return load_run(run_folder, device="cpu")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with a tokenizer of eight words."""
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**size, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 0, "bos_token_id": 1}
    config = CLIPConfig(
        text_config=text,
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=12,
        initializer_factor=20.0,  # else all pictures look alike
    )
    CLIPModel(config).save_pretrained(place)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", bos_token="<start>", pad_token="<end>", unk_token="a"
    ).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    return place
