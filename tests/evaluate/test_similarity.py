"""Similarity is what transformers' own CLIP says of frames and prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_train.errors import UserError
from sora_train.evaluate.similarity import FRAMES_AT_ONCE, Clip, load_clip, similarity


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return load_clip(str(clip_folder))


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


def test_what_is_no_clip_in_safetensors_is_refused(clip_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"validation\.clip: no folder"):
        load_clip(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"validation\.clip: .* has no config\.json"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="holds a 't5' model"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"no safetensors in .*: pickled weights are never loaded"):
        load_clip(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="model.safetensors is cut short or not a safetensors file"):
        load_clip(str(tmp_path))
