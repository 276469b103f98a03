"""Runs of adapters before Ray starts: what may be a base, and that it stays the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.launch.checks import resolve_recipe
from sora_train.launch.clips import read_clips
from sora_train.launch.init_from import check_base_unchanged, check_initial_weights
from sora_train.launch.preflight.verdicts import check_disk
from sora_train.launch.resume import check_resume
from sora_train.launch.run_folder import save_run_description
from sora_train.manifest import Manifest
from sora_train.model import build
from sora_train.model.convert import WEIGHTS, to_diffusers
from sora_train.plan.table import PlanOptions, format_plan
from sora_train.recipe import Recipe
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir


@pytest.fixture(scope="module")
def base(recipe_of, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released Latte."""
    folder = tmp_path_factory.mktemp("base")
    to_diffusers(build(recipe_of(tiny_shards, folder).model), folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, recipe_of, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a run of one step."""
    keys = {"model__init_from": str(base), "lora__rank": 2, "train__zero_stage": 0, "train__steps": 1}
    recipe = resolve_recipe(recipe_of(tiny_shards, tmp_path_factory.mktemp("runs"), name="first", **keys))
    run, shards = Path(recipe.train.output) / recipe.name, recipe.data.output
    save_run_description(run, recipe, Manifest.load(shards), read_clips(recipe))
    sections = recipe.train, recipe.model, recipe.diffusion, ShardSet(shards)
    train(*sections, device=torch.device("cpu"), run_dir=RunDir(run), lora=recipe.lora)
    shutil.copy(run / "recipe.yaml", run / "checkpoints/step_00000001/recipe.yaml")
    return recipe


def run_of(recipe: Recipe) -> Path:
    return Path(recipe.train.output) / recipe.name


def changed(recipe: Recipe, name: str, model: dict | None = None, lora: dict | None = None) -> Recipe:
    update = {"name": name, "model": replace(recipe.model, **model or {})}
    return recipe.model_copy(update=update | {"lora": recipe.lora.model_copy(update=lora or {})})


def test_a_resumed_run_keeps_its_base_and_another_one_is_refused(trained: Recipe, base: Path, tmp_path: Path):
    run = run_of(trained)
    assert len(check_base_unchanged(trained, run)) == 64
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert resolve_recipe(changed(trained, trained.name, {"init_from": str(copy)})).model.init_from == str(base)
    weights = load_file(copy / WEIGHTS)
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, copy / WEIGHTS)
    with pytest.raises(UserError, match=rf"those of {base} had the hash \w+, and {copy} has \w+\. Put the original"):
        check_base_unchanged(changed(trained, trained.name, {"init_from": str(copy)}), run)


def test_a_base_that_is_gone_is_found_where_the_recipe_says(trained: Recipe, base: Path, tmp_path: Path):
    copy, away = Path(shutil.copytree(base, tmp_path / "copy")), tmp_path / "away"
    shutil.move(base, away)
    try:
        moved = resolve_recipe(changed(trained, trained.name, {"init_from": str(copy)}))
        assert moved.model.init_from == str(copy)
        check_base_unchanged(moved, run_of(trained))
        with pytest.raises(UserError, match="the frozen base of the adapters can't be read"):
            check_base_unchanged(trained, run_of(trained))
    finally:
        shutil.move(away, base)


def test_a_resumed_run_keeps_rank_and_targets(trained: Recipe):
    manifest = Manifest.load(trained.data.output)
    assert check_resume(run_of(trained), trained, manifest) == 1
    other = changed(trained, trained.name, lora={"rank": 4, "targets": ("to_q",)})
    with pytest.raises(UserError, match=r"lora.rank was 2 and is 4; lora.targets was"):
        check_resume(run_of(trained), other, manifest)


def test_adapters_are_no_base_and_no_start_of_a_full_training(trained: Recipe):
    for rank in (0, 2):
        second = resolve_recipe(changed(trained, "second", {"init_from": str(run_of(trained))}, {"rank": rank}))
        with pytest.raises(UserError, match=r"holds adapters \(LoRA\), no whole model. Name their base"):
            check_initial_weights(second)


def test_initial_adapters_must_have_the_rank_and_the_targets(trained: Recipe):
    file = str(run_of(trained) / "checkpoints/step_00000001/ema.safetensors")
    check_initial_weights(changed(trained, "second", lora={"init_from": file}))
    with pytest.raises(UserError, match="has rank 2, lora.rank is 3. Set it to the rank in the file"):
        check_initial_weights(changed(trained, "second", lora={"init_from": file, "rank": 3}))
    with pytest.raises(
        UserError, match=r"has adapters of blocks.0.attention.out, which is not among lora.targets to_q"
    ):
        check_initial_weights(changed(trained, "second", lora={"init_from": file, "targets": ("to_q", "to_k", "to_v")}))


def test_the_plan_and_the_disk_count_adapters(trained: Recipe):
    page = format_plan(trained, PlanOptions())
    assert "parameters, of which LoRA of rank 2 trains" in page
    assert "61.4 kB" in check_disk(trained, 10**5, 0)
    with pytest.raises(UserError, match="too little"):
        check_disk(changed(trained, "whole", lora={"rank": 0}), 10**5, 0)
