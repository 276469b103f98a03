"""Initial weights of a new run, and resuming on other clips: everything decided before Ray starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.export import export
from sora_train.launch.checks import resolve_recipe
from sora_train.launch.clips import check_clips, read_clips, saved_clips
from sora_train.launch.init_from import check_initial_weights, initial_weights_warnings
from sora_train.launch.resume import check_resume, describe_changes
from sora_train.launch.run_folder import save_run_description
from sora_train.manifest import Manifest
from sora_train.model import Latte
from sora_train.recipe import Recipe
from sora_train.train.initial import load_initial
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir

FLOW_JOINT_POOLED = {"model__attention": "joint", "model__temporal_positions": "input", "model__pooled_text": True}


@pytest.fixture(scope="module")
def recipe(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory, recipe_of) -> Recipe:
    """A model that no pipeline of diffusers can hold."""
    return recipe_of(
        tiny_shards,
        tmp_path_factory.mktemp("runs"),
        name="first",
        train__zero_stage=0,
        train__steps=2,
        train__checkpoint_every=1,
        train__ema_decay=0.5,
        data__holdout_fraction=0.2,
        **FLOW_JOINT_POOLED,
    )


@pytest.fixture(scope="module")
def trained(recipe: Recipe) -> Path:
    """Two steps of it in this process, recorded as `sora train` does."""
    run, shards = Path(recipe.train.output) / recipe.name, recipe.data.output
    save_run_description(run, recipe, Manifest.load(shards), read_clips(recipe))
    split = ShardSet(shards, recipe.data.holdout_fraction)
    train(recipe.train, recipe.model, recipe.diffusion, split, device=torch.device("cpu"), run_dir=RunDir(run))
    for checkpoint in (run / "checkpoints").iterdir():
        for name in ("recipe.yaml", "manifest.json"):
            shutil.copy(run / name, checkpoint / name)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def without(shards: Path, clips: int, to: Path) -> Path:
    """The shards without their first few clips."""
    shutil.copytree(shards, to)
    file = to / "bucket=2x32x32/part.parquet"
    pq.write_table(pq.read_table(file).slice(clips), file, row_group_size=8)
    return to


def reading(recipe: Recipe, shards: Path) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"output": str(shards)})})


def starting_at(recipe: Recipe, folder: str) -> Recipe:
    """A new run's recipe as `sora train` takes it."""
    return resolve_recipe(
        recipe.model_copy(update={"name": "second", "model": replace(recipe.model, init_from=folder)})
    )


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "raw export"])
def test_a_new_run_starts_from_a_run_a_checkpoint_or_an_export(run: Path, recipe: Recipe, tmp_path: Path, kind: str):
    last = run / "checkpoints/step_00000002"
    folder = {"run": run, "checkpoint": last}.get(kind) or tmp_path / "export"
    if "export" in kind:
        export(run, folder, weights_only=True, weights="raw" if "raw" in kind else "ema")
    start = starting_at(recipe, str(folder))
    check_initial_weights(start)
    assert initial_weights_warnings(start, Manifest.load(recipe.data.output)) == []
    model = Latte(recipe.model)
    load_initial(model, Path(start.model.init_from))
    expected = load_file(folder / "model.safetensors" if "export" in kind else last / "ema.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_shape_are_refused_key_by_key(run: Path, recipe: Recipe):
    other = recipe.model_copy(update={"model": replace(recipe.model, width=32, heads=4)})
    with pytest.raises(
        UserError,
        match=r"model.width is 32, there it is 16; model.heads is 4, there it is 2. Set the keys of model",
    ):
        check_initial_weights(starting_at(other, str(run)))


def test_a_run_without_a_checkpoint_is_no_start(run: Path, recipe: Recipe):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        starting_at(recipe, str(run))


def test_weights_that_learned_something_else_are_remarked_on(run: Path, recipe: Recipe):
    ddpm = replace(recipe.diffusion, kind="ddpm")
    more = recipe.data.model_copy(update={"holdout_fraction": 0.5})
    start = starting_at(recipe.model_copy(update={"diffusion": ddpm, "data": more}), str(run))
    objective, held_out = initial_weights_warnings(start, Manifest.load(recipe.data.output))
    assert "diffusion.kind flow there, ddpm here" in objective
    assert "data.holdout_fraction was 0.2 there and is 0.5" in held_out


def test_a_resumed_run_needs_the_weights_it_began_with_no_more(trained: Path, recipe: Recipe, tmp_path: Path):
    shutil.copytree(trained, tmp_path / recipe.name)
    there = recipe.train.model_copy(update={"output": str(tmp_path)})
    gone = recipe.model_copy(update={"train": there, "model": replace(recipe.model, init_from=str(tmp_path / "gone"))})
    assert resolve_recipe(gone).model.init_from == ""
    with pytest.raises(UserError, match="model.init_from"):
        resolve_recipe(gone, fresh=True)


def test_other_clips_are_refused_with_both_ways_on(run: Path, recipe: Recipe, tiny_shards: Path, tmp_path: Path):
    manifest = Manifest.load(str(tiny_shards))
    assert check_resume(run, recipe, manifest, read_clips(recipe)) == 2
    fewer = reading(recipe, without(tiny_shards, 3, tmp_path / "fewer"))
    clips = read_clips(fewer)
    with pytest.raises(UserError, match=rf"removed: 2 clips \(1.mp4, 2.mp4\).*--new-data.*--model.init_from {run}"):
        check_resume(run, fewer, manifest, clips)
    assert check_resume(run, fewer, manifest, clips, new_data=True) == 2
    assert "removed: 2 clips" in check_clips(run, fewer.data.output, clips, new_data=True)
    save_run_description(run, fewer, manifest, clips)
    assert check_resume(run, fewer, manifest, clips) == 2
    assert check_clips(run, fewer.data.output, clips, new_data=True) == ""


def test_keys_that_cut_clips_may_change_with_new_data_alone(run: Path, recipe: Recipe):
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"stride_s": 1.0})})
    manifest, clips = Manifest.load(recipe.data.output), read_clips(recipe)
    with pytest.raises(UserError, match=r"data.stride_s was 0.0 and is 1.0.*add --new-data"):
        check_resume(run, longer, manifest, clips)
    assert check_resume(run, longer, manifest, clips, new_data=True) == 2


def test_a_clip_never_changes_sides_by_another_name(run: Path, recipe: Recipe, tiny_shards: Path, tmp_path: Path):
    before = saved_clips(run)
    assert before is not None
    held_out = sorted(before.sources(held_out=True).values())
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_shards, renamed)
    file = renamed / "bucket=2x32x32/part.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    (row,) = [row for row in rows if row["source"] == "3.mp4"]
    assert row["source"] not in held_out
    row["source"] = held_out[0]
    pq.write_table(table.from_pylist(rows, schema=table.schema), file, row_group_size=8)
    with pytest.raises(UserError, match=r"1 clip \(.*\) that the run has trained on would be held out now"):
        check_clips(run, str(renamed), read_clips(reading(recipe, renamed)), new_data=True)


def test_the_runs_manifest_says_how_many_clips_are_held_out(trained: Path):
    clips = saved_clips(trained)
    assert clips is not None
    held_out = len(clips.sources(held_out=True))
    assert json.loads((trained / "manifest.json").read_text())["held_out"] == {"2x32x32": held_out}
    assert held_out + len(clips.sources(held_out=False)) == 21


def test_a_raised_rate_is_said_with_both_values(run: Path, recipe: Recipe):
    assert describe_changes(run, recipe, 2) == ""
    higher = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 9, "learning_rate": 1e-3})})
    assert describe_changes(run, higher, 2) == (
        "train.learning_rate was 0.0001 and is 0.001; train.steps was 2 and is 9; "
        "the learning rate is 0.0001 at step 2 and 0.001 at step 3"
    )
    steered = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 9, "guard_spike": 7.0})})
    assert describe_changes(run, steered, 2) == "train.guard_spike was 5.0 and is 7.0; train.steps was 2 and is 9"
