"""What is found out before a run starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.launch.checks import check_codec, check_shards, check_start
from sora_train.model import Latte, ModelConfig
from sora_train.model.convert import to_diffusers
from sora_train.recipe import Recipe


def test_shards_of_other_clips_or_channels_than_the_recipes_are_refused_with_both_numbers(
    builtin_shards: Path, tmp_path: Path, recipe_of
):
    recipe = recipe_of(builtin_shards, tmp_path, data__frames=9, model__text_width=7)
    with pytest.raises(
        UserError, match=r"text_width is 7, .* 64 wide; data asks for clips of 9x32x32, the shards have 2x32x32"
    ):
        check_shards(recipe)


def test_a_vae_that_did_not_make_the_shards_is_refused_by_its_key(
    builtin_shards: Path, tmp_path: Path, recipe_of, shared: Path
):
    taesd = str(shared / "models" / "taesd")
    recipe = recipe_of(builtin_shards, tmp_path, codec__vae=taesd)
    with pytest.raises(UserError, match=r"codec\.vae .*taesd.* --codec\.vae builtin"):
        check_codec(recipe, check_shards(recipe))
    recipe = recipe_of(builtin_shards, tmp_path, codec__vae="nobody/has-this")
    with pytest.raises(UserError, match=r"codec\.vae"):
        check_codec(recipe, check_shards(recipe))


def test_networks_that_made_the_shards_pass(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path)
    check_codec(recipe, check_shards(recipe))


def test_training_starts_from_weights_of_the_same_shape_alone(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path)
    shape = replace(recipe.model, attention="factorised", text_in="spatial", frame_positions="temporal",
                    pooled_text=False)  # fmt: skip
    to_diffusers(Latte(shape), tmp_path / "start")

    def starting(model: ModelConfig) -> Recipe:
        return recipe.model_copy(update={"model": replace(model, init_from=str(tmp_path / "start"))})

    check_start(starting(shape))
    with pytest.raises(UserError, match=rf"init_from.*model.width is {2 * shape.width}, there it is {shape.width}"):
        check_start(starting(replace(shape, width=2 * shape.width)))
    (tmp_path / "start" / "config.json").unlink()
    with pytest.raises(UserError, match=r"can't start from .*config.json is missing"):
        check_start(starting(shape))
