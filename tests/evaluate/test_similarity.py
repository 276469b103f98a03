"""Similarity is what transformers' own CLIP says of frames and prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from sora_train.errors import UserError
from sora_train.evaluate.similarity import FRAMES_AT_ONCE, Clip, load_clip, similarity

WORDS = ["<end>", "<start>", "a", "red", "blue", "circle", "moving", "left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder))


def video(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, 48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("frames", [1, 5, FRAMES_AT_ONCE + 3])
def test_similarity_is_transformers_logits_over_their_scale(clip: Clip, frames: int):
    frames_of, scores = video(frames), []
    for prompt in ("a red circle", "a blue circle moving left"):
        with torch.no_grad():
            output = clip.model(
                **clip.tokenizer([prompt], return_tensors="pt"),
                **clip.images(list(frames_of), return_tensors="pt", input_data_format="channels_last"),
            )
        expected = 100 * (output.logits_per_image / clip.model.logit_scale.exp()).mean().item()
        scores.append(similarity(clip, prompt, frames_of))
        assert scores[-1] == pytest.approx(expected, abs=1e-4)
        assert abs(scores[-1]) <= 100
    assert abs(scores[0] - scores[1]) > 0.1


def test_a_prompt_is_cut_where_clip_ends(clip: Clip):
    long = "a red circle moving left a blue circle a red"  # with start and end the 12 tokens that this CLIP takes
    assert similarity(clip, long + " blue circle" * 50, video(2)) == pytest.approx(similarity(clip, long, video(2)))


def test_what_is_no_clip_in_safetensors_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"validation\.clip: no folder"):
        load_clip(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"validation\.clip: .* has no config\.json"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="holds a 't5' model"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"no safetensors in .*: pickled weights are never loaded"):
        load_clip(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="can't be read as a CLIP"):
        load_clip(str(tmp_path))
