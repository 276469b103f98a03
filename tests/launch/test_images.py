"""Images of `validation.images` are read before Ray starts, and validations find them in the run's folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.errors import UserError
from sora_train.launch.checks import check_shards, resolve_recipe
from sora_train.launch.images import load_images, read_images, save_images
from sora_train.launch.trainer import launch_training

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def recipe_with(builtin_shards: Path, tmp_path: Path, recipe_of):
    """recipe_with(images): a recipe whose validation begins with images, on a cluster that Ray can't reach."""

    def make(*images: str, **changes: object):
        more = {"validation__every": 4, "validation__prompts": PROMPTS, "validation__images": images}
        more |= {"conditioning__probability": 0.5, "cluster__address": "none:1", **changes}
        return recipe_of(builtin_shards, tmp_path / "runs", **more)

    return make


def image(place: Path, value: int) -> str:
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(place)
    return str(place)


def values(images) -> list[int | None]:
    return [None if each is None else int(each.frames.mean()) for each in images]


def test_each_prompt_has_its_image_or_that_of_all(recipe_with, tmp_path: Path):
    one, two = image(tmp_path / "1.png", 50), image(tmp_path / "2.png", 90)
    for names, expected in (
        ((one, two), [50, 90]),
        ((two,), [90, 90]),
        (("", one), [None, 50]),
        ((), []),
    ):
        recipe = recipe_with(*names)
        found = read_images(recipe, check_shards(recipe))
        assert values(found) == expected
        assert all(each is None or each.frames.shape == (1, 32, 32, 3) for each in found)
        save_images(tmp_path, found)
        loaded = load_images(tmp_path) or []
        assert values(loaded) == expected
        assert [each and each.sha256 for each in loaded] == [each and each.sha256 for each in found]
    assert load_images(tmp_path) is None  # the last start had none


def test_names_are_absolute_because_the_folder_of_a_node_is_another(recipe_with, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "1.png", 50)
    assert resolve_recipe(recipe_with("1.png", "")).validation.images == (str(tmp_path / "1.png"), "")


def test_an_image_that_is_none_ends_the_command_before_ray(recipe_with, tmp_path: Path):
    with pytest.raises(UserError, match=r"validation.images .*nowhere.png: there is no such file"):
        launch_training(recipe_with(str(tmp_path / "nowhere.png")))
    (tmp_path / "text.png").write_text("a red circle\n" * 50)
    with pytest.raises(UserError, match=r"validation.images .*text.png is not an image. Name an image: JPEG"):
        launch_training(recipe_with(str(tmp_path / "text.png")))
    assert not (tmp_path / "runs").exists()


def test_samples_that_the_model_never_learned_are_warned_of(recipe_with, tmp_path: Path, capsys):
    recipe = recipe_with("", image(tmp_path / "1.png", 50), conditioning__probability=1.0)
    read_images(recipe, check_shards(recipe))
    assert "conditioning.probability is 1, so the model learned only to continue" in capsys.readouterr().err
