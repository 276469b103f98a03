"""What changes the encoding hash, and what does not; and a warning of a model that other networks fit."""

import hashlib
import json

import pytest

from data_prep.buckets import TRANSFORM_VERSION
from data_prep.pipeline import encoding_hash, find_codec, warn_of_model
from sora_train.manifest import SCHEMA_VERSION
from sora_train.recipe import Recipe


def hash_of(**changed: object) -> str:
    codec = {key.removeprefix("codec__"): value for key, value in changed.items() if key.startswith("codec__")}
    recipe = Recipe.model_validate({"codec": codec, "model": {"init_from": changed.get("init_from", "")}})
    return encoding_hash(recipe, *find_codec(recipe))


def test_uncleaned_captions_have_the_hash_of_older_shards():
    recipe = Recipe.model_validate({"codec": {"precision": "bf16"}})
    vae, text = find_codec(recipe)
    before = [SCHEMA_VERSION, TRANSFORM_VERSION, recipe.data.fps, recipe.data.crop, recipe.data.flip]
    before += [vae.hash, "bf16", text.hash, recipe.codec.text_precision, recipe.codec.max_tokens]
    expected = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:32]
    assert hash_of(codec__precision="bf16") == hash_of(codec__precision="bf16", codec__caption_cleaning="none")
    assert hash_of(codec__precision="bf16") == expected


def test_cleaning_and_precision_change_the_encoding_hash():
    cleaned = hash_of(codec__caption_cleaning="lower")
    assert len({cleaned, hash_of(), hash_of(codec__precision="bf16")}) == 3
    assert hash_of(init_from="owner/released") == cleaned  # as the released model reads them
    assert hash_of(init_from="owner/released", codec__caption_cleaning="none") == hash_of()


def test_the_null_prompt_is_not_part_of_a_clips_row():
    assert hash_of(codec__null_prompt="padded") == hash_of(codec__null_prompt="eos") == hash_of()


def test_prep_warns_of_a_model_that_its_networks_do_not_fit(caplog: pytest.LogCaptureFixture):
    recipe = Recipe.model_validate({"model": {"in_channels": 16, "text_width": 4096}})
    warn_of_model(recipe, *find_codec(recipe))
    assert caplog.messages == [
        "prep: the VAE's latents have 4 channels, and model.in_channels is 16. To train on these shards set it to 4",
        "prep: the text encoder's embeddings are 64 wide, and model.text_width is 4096. To train on these shards set "
        "it to 64",
    ]
    fitting = Recipe.model_validate({"model": {"text_width": 64}})
    warn_of_model(fitting, *find_codec(fitting))
    assert len(caplog.messages) == 2
