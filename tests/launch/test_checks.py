"""Checks before a run starts."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sora_train.data.config import DataConfig
from sora_train.diffusion import ConditioningConfig
from sora_train.errors import UserError
from sora_train.launch.checks import (
    check_codec,
    check_shards,
    check_text,
    resolve_recipe,
)
from sora_train.launch.init_from import check_initial_weights
from sora_train.launch.resume import CLIP_KEYS, FIXED_KEYS, saved_null_prompt
from sora_train.launch.run_folder import check_writable, remove_run
from sora_train.launch.trainer import launch_training
from sora_train.model import Latte, ModelConfig
from sora_train.model.convert import WEIGHTS, to_diffusers
from sora_train.recipe import Recipe, save_recipe
from sora_train.train.config import TrainConfig


def test_shards_that_do_not_fit_are_refused_with_both_numbers(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, data__frames=9, model__text_width=7)
    with pytest.raises(
        UserError,
        match="set model.text_width to 64; .* 9x32x32 and the shards hold 2x32x32: set data.frames to 2; or data.o",
    ):
        check_shards(recipe)


def test_given_frames_that_leave_nothing_to_learn_are_refused(builtin_shards: Path, tmp_path: Path, recipe_of):
    def asked(frames: int) -> Recipe:
        given = ConditioningConfig(frames=frames, probability=0.5)
        return recipe_of(builtin_shards, tmp_path).model_copy(update={"conditioning": given})

    check_shards(asked(1))
    with pytest.raises(UserError, match="conditioning.frames 2 leaves nothing to learn, since the longest .* 2 latent"):
        check_shards(asked(2))


def test_a_shape_that_no_shards_can_have_is_refused_with_those_that_work(
    builtin_shards: Path, tmp_path: Path, recipe_of
):
    with pytest.raises(UserError) as caught:
        check_shards(recipe_of(builtin_shards, tmp_path, data__frames=3, data__height=36))
    assert str(caught.value).endswith(
        "set data.frames to 2 and data.height to 32; or data.output to another folder and run `sora prep` to make "
        "others (data.height 36 does not divide by 16 (VAE 8 x model.patch 2); use 32 or 48)"
    )
    check_shards(recipe_of(builtin_shards, tmp_path, data__frames=2, data__height=32))


def test_a_vae_that_did_not_make_the_shards_is_refused(builtin_shards: Path, tmp_path: Path, recipe_of, shared: Path):
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


def test_shards_with_other_caption_cleaning_are_refused(builtin_shards: Path, tmp_path: Path, recipe_of):
    shape = replace(recipe_of(builtin_shards, tmp_path).model, attention="factorised", cross_attention_in="spatial",
                    temporal_positions="temporal", pooled_text=False)  # fmt: skip
    to_diffusers(Latte(shape), tmp_path / "start")
    start = {"model__init_from": str(tmp_path / "start")}
    scratch = resolve_recipe(recipe_of(builtin_shards, tmp_path))
    manifest = check_shards(scratch)
    check_text(scratch, manifest)
    assert scratch.codec.null_prompt == "eos"
    with pytest.raises(UserError, match=r"caption_cleaning is lower, but .* with none, and model.init_from .*: none$"):
        check_text(resolve_recipe(recipe_of(builtin_shards, tmp_path, **start)), manifest)
    stated = resolve_recipe(recipe_of(builtin_shards, tmp_path, **start, codec__caption_cleaning="none"))
    assert stated.codec.null_prompt == "padded"
    with pytest.raises(UserError, match=r"Run `sora prep` again, or set codec.null_prompt: eos"):
        check_text(stated, manifest)
    eos = recipe_of(builtin_shards, tmp_path, **start, codec__caption_cleaning="none", codec__null_prompt="eos")
    check_text(resolve_recipe(eos), manifest)


def test_a_run_that_goes_on_keeps_the_null_prompt_it_learned(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = resolve_recipe(recipe_of(builtin_shards, tmp_path))
    save_recipe(recipe_of(builtin_shards, tmp_path), tmp_path / "recipe.yaml")  # `auto`, as before there was the key
    assert saved_null_prompt(tmp_path) == recipe.codec.null_prompt == "eos"
    padded = recipe_of(builtin_shards, tmp_path, codec__null_prompt="padded")
    save_recipe(padded, tmp_path / "recipe.yaml")
    assert saved_null_prompt(tmp_path) == resolve_recipe(padded).codec.null_prompt == "padded"


def test_training_starts_from_weights_of_the_same_shape_alone(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path)
    shape = replace(recipe.model, attention="factorised", cross_attention_in="spatial", temporal_positions="temporal",
                    pooled_text=False)  # fmt: skip
    to_diffusers(Latte(shape), tmp_path / "start")

    def starting(model: ModelConfig) -> Recipe:
        return recipe.model_copy(update={"model": replace(model, init_from=str(tmp_path / "start"))})

    check_initial_weights(starting(shape))
    with pytest.raises(UserError, match=rf"init_from.*model.width is {2 * shape.width}, there it is {shape.width}"):
        check_initial_weights(starting(replace(shape, width=2 * shape.width)))
    (tmp_path / "start" / "config.json").unlink()
    with pytest.raises(UserError, match=r"can't start from .*config.json is missing"):
        check_initial_weights(starting(shape))


def test_initial_weights_without_a_tensor_end_the_command_before_ray(builtin_shards: Path, tmp_path: Path, recipe_of):
    shape = replace(recipe_of(builtin_shards, tmp_path).model, attention="factorised", cross_attention_in="spatial",
                    temporal_positions="temporal", pooled_text=False)  # fmt: skip
    to_diffusers(Latte(shape), tmp_path / "start")
    file = tmp_path / "start" / WEIGHTS
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "proj_out.bias"}, file)
    changes = {f"model__{key}": getattr(shape, key) for key in ("attention", "temporal_positions", "pooled_text")}
    changes |= {"model__init_from": str(tmp_path / "start"), "cluster__address": "none:1"}  # which Ray can't reach
    changes |= {"codec__caption_cleaning": "none", "codec__null_prompt": "eos"}
    with pytest.raises(UserError, match=r"start lacks 1 tensor: proj_out.bias. Fetch the weights again"):
        launch_training(recipe_of(builtin_shards, tmp_path / "runs", **changes))


@pytest.mark.parametrize("place", ["a file", "/proc/self"])
def test_a_run_folder_that_cannot_be_written_is_refused(place: str, builtin_shards: Path, tmp_path: Path, recipe_of):
    (tmp_path / "a file").write_text("")
    output = tmp_path / place
    with pytest.raises(UserError, match=rf"the run's folder {output}/tiny can't be written.*--train.output"):
        launch_training(recipe_of(builtin_shards, output))


def test_a_check_of_the_run_folder_leaves_nothing_behind(tmp_path: Path):
    check_writable(tmp_path / "runs/new")
    assert not list(tmp_path.iterdir())


def test_clearing_a_run_removes_what_it_wrote_and_nothing_else(tmp_path: Path):
    files = """metrics.jsonl events.jsonl wandb.json report.html failure.txt stop.json leave trained/rank_00000.jsonl
        profile/trace.json.gz"""
    wrote = ["checkpoints/step_00000004/state.json", "samples/step_00000004/sheet.png", *files.split()]
    others = ["shards/manifest.json", "clips/a.mp4", "notes.txt", "samples/final/mine.mp4", "checkpoints/mine.txt"]
    for name in wrote + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_run(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(others)


def test_the_training_keys_that_may_change_on_resume_are_these():
    """A new key is fixed or free by decision: add it to `FIXED_KEYS` if it decides what is learned, else here.

    `changed_arithmetic` allows some changes of `precision` and `zero_stage` alone.
    """
    free = """activation_checkpointing checkpoint_every compile deepspeed gradient_clip guard_max_consecutive
        guard_max_rollbacks guard_spike keep_by keep_checkpoints learning_rate log_every log_samples micro_batch_size
        offload output precision profile reduce_dtype schedule shard_cache_gb steps warmup_steps weight_decay
        zero_stage"""
    keys = {f"train.{key}" for key in TrainConfig.model_fields}
    assert {key for key in keys if not key.startswith(FIXED_KEYS)} == {f"train.{key}" for key in free.split()}
    paths = "captions caption_column file_column max_bad_fraction output root timeout_s"
    keys = {f"data.{key}" for key in DataConfig.model_fields}
    assert {key for key in keys if not key.startswith(FIXED_KEYS + CLIP_KEYS)} == {
        f"data.{key}" for key in paths.split()
    }
