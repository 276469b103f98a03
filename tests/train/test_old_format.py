"""Shards and a checkpoint of format 2 as commit 1cef1c1 (2026-11-23) wrote them: both still open."""

from dataclasses import asdict
from pathlib import Path

import pytest
from reading import losses

from data_prep.inspect.table import inspect
from sora_train.data.shards import ShardSet
from sora_train.recipe import load_recipe

OLD = Path(__file__).parents[1] / "old_format"


def test_old_shards_are_read():
    assert sum(ShardSet(str(OLD / "shards")).rows.values()) == 12
    assert inspect(str(OLD / "shards"))["written"] == 12


def test_an_old_checkpoint_resumes_as_its_run_went_on(start, tmp_path: Path):
    recipe = load_recipe(OLD / "run" / "recipe.yaml")
    task = {
        "out": str(tmp_path / "run"),
        "train": recipe.train.model_dump(),
        "model": {key: value for key, value in asdict(recipe.model).items() if key != "init_from"},
        "resume": str(OLD / "run" / "checkpoints" / "step_00000002"),
    }
    codes, logs = start(1, OLD / "shards", [task])()
    assert codes == [0], logs
    before, now = losses(OLD / "run"), losses(tmp_path / "run")
    assert list(now) == [3, 4]
    assert now == pytest.approx({step: before[step] for step in now}, rel=1e-5)
