"""Prep restarts if Ray hangs or a GPU fails, and ends if restarts don't help."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from data_prep import ray_pipeline
from data_prep.pipeline import prep
from data_prep.watchdog import DeviceLost, PipelineStalled, with_watchdog
from sora_train.errors import UserError
from sora_train.recipe import Recipe

pytestmark = pytest.mark.ray


@pytest.fixture
def recipe(tmp_path: Path, write) -> Recipe:
    for number in range(2):
        write(tmp_path / f"{number}.mp4", np.arange(36) / 30)
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video_file_name", "prompt"), ("0.mp4", "one"), ("1.mp4", "two")])
    data = {"captions": str(tmp_path / "captions.csv"), "output": str(tmp_path / "shards")}
    size = {"frames": 4, "fps": 4.0, "height": 16, "width": 32}
    return Recipe.model_validate({"data": data | size, "cluster": {"address": "local"}})


def wait_so_long(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """How long each start of the pipeline is given for its first clip."""
    starts = iter(seconds)

    def watch(items: Iterable, end: Callable):
        return with_watchdog(items, end, startup_timeout_s=next(starts))

    monkeypatch.setattr(ray_pipeline, "with_watchdog", watch)


def test_a_lost_device_is_known_through_ray(local_ray):
    import ray

    def lose(table):
        raise DeviceLost("VAE: cuda:0 no longer works: CUDA error")

    ray_pipeline.quiet_ray_data()
    tables = ray.data.range(4).map_batches(lose, batch_format="pyarrow").iter_batches(batch_size=None)
    with pytest.raises(PipelineStalled) as error:
        list(with_watchdog(tables, lambda: None))
    assert isinstance(error.value, DeviceLost)
    assert str(getattr(error.value, "cause", None)).startswith("VAE: cuda:0 no longer works: CUDA error\n")


@pytest.mark.timeout(1900)
@pytest.mark.slow
def test_a_restart_frees_the_actors_of_a_ray_that_was_connected(recipe: Recipe, monkeypatch, capsys, local_ray):
    """It has two CPUs: no room for a second pipeline next to the first."""
    wait_so_long(monkeypatch, 0.5, 1800)
    assert prep(recipe).counts.written == 2
    assert "gave no output for 0 s; restarts with the missing clips" in capsys.readouterr().out


@pytest.mark.slow
def test_restarts_without_a_clip_end_in_an_error(recipe: Recipe, monkeypatch, local_ray):
    wait_so_long(monkeypatch, 0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="started 3 times in a row without encoding a clip.*`ray status`"):
        prep(recipe)
