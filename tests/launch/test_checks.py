"""What is found out before a run starts."""

from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.launch.checks import check_codec, check_shards


def test_shards_of_other_clips_or_channels_than_the_recipes_are_refused_with_both_numbers(
    builtin_shards: Path, tmp_path: Path, recipe_of
):
    recipe = recipe_of(builtin_shards, tmp_path, data__frames=9, model__text_width=7)
    with pytest.raises(UserError, match=r"text_width is 7, .* 64 wide; data.frames is 9, the shards' clips have 2"):
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
