"""Where `auto` of `codec.caption_cleaning` and `codec.null_prompt` comes from."""

import json
from pathlib import Path

import pytest

from sora_train.codec import CodecConfig
from sora_train.codec.conventions import clean, cleaning_of, null_prompt_of
from sora_train.errors import UserError
from sora_train.manifest import Manifest

AUTO = CodecConfig()


def released(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def test_cleaning_is_latte_pipelines_own_without_extra_packages():
    assert clean(" A Red\tÇa  VA. ", "lower") == " A Red\tÇa  VA. ".lower().strip() == "a red\tça  va."
    assert clean(" A Red ", "none") == " A Red "


def test_a_model_from_scratch_reads_captions_as_written_and_one_token_for_none():
    assert (cleaning_of(AUTO, ""), null_prompt_of(AUTO, "")) == ("none", "eos")


@pytest.mark.parametrize(
    ("name", "null_prompt"),
    [
        ("LatteTransformer3DModel", "padded"),
        ("LatteT2V", "padded"),
        ("PixArtTransformer2DModel", "eos"),
        ("Transformer2DModel", "eos"),
    ],
)
def test_released_weights_bring_what_their_pipeline_does(name: str, null_prompt: str, tmp_path: Path):
    alone, inside = released(tmp_path / "alone", name), tmp_path / "pipeline"
    released(inside / "transformer", name)
    for folder in (alone, str(inside)):
        assert (cleaning_of(AUTO, folder), null_prompt_of(AUTO, folder)) == ("lower", null_prompt)
    assert cleaning_of(AUTO, "owner/name") == "lower"  # known before it is fetched


def test_what_the_recipe_states_counts(tmp_path: Path):
    stated = CodecConfig(caption_cleaning="none", null_prompt="eos")
    folder = released(tmp_path, "LatteT2V")
    assert (cleaning_of(stated, folder), null_prompt_of(stated, folder)) == ("none", "eos")
    assert null_prompt_of(CodecConfig(null_prompt="padded"), "") == "padded"


def test_weights_of_ours_bring_what_they_learned(tiny_shards: Path, tmp_path: Path):
    manifest = Manifest.load(str(tiny_shards))
    text = manifest.text.model_copy(update={"caption_cleaning": "lower"})
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    for cleaning, null_prompt in (("lower", "padded"), ("none", "eos")):
        made = manifest if cleaning == "none" else manifest.model_copy(update={"text": text})
        made.save(str(tmp_path / "run"))
        (tmp_path / "run" / "recipe.yaml").write_text(f"codec: {{null_prompt: {null_prompt}}}\n")
        for folder in (tmp_path / "run", checkpoint):
            assert (cleaning_of(AUTO, str(folder)), null_prompt_of(AUTO, str(folder))) == (cleaning, null_prompt)
    (tmp_path / "run" / "recipe.yaml").write_text("name: of-before-these-keys\n")
    assert null_prompt_of(AUTO, str(checkpoint)) == "eos"


def test_shards_of_before_have_no_padding_and_say_so(tiny_shards: Path):
    manifest = Manifest.load(str(tiny_shards)).model_copy(update={"empty_tokens": 1})
    assert manifest.text.caption_cleaning == "none"
    assert manifest.null_embedding("eos").shape[0] == 1
    with pytest.raises(UserError, match=r"`sora prep` again, or set codec.null_prompt: eos"):
        manifest.null_embedding("padded")
