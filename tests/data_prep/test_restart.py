"""Prep restarts if Ray hangs or a GPU fails, and ends if restarts don't help."""

import csv
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep import ray_pipeline
from data_prep.executor import lost_means_stalled
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_repeat_that_gives_another_number_of_blocks_is_a_stall(tmp_path: Path, one_ray, change: int):
    """As if a file timed out only when its clips are decoded again, because their node was lost."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.data import ActorPoolStrategy

    began, lost = tmp_path / "began", tmp_path / "lost"

    class Decode:
        def __call__(self, table: pa.Table) -> Iterator[dict]:
            count = 6 + change * began.exists()
            for _ in range(count):
                yield {"frames": [np.zeros(500_000, np.uint8)]}
            began.touch()

    class Encode:
        def __call__(self, table: pa.Table) -> dict:
            while not lost.exists():
                time.sleep(0.1)
            return {"latents": [1] * len(table)}

    def read(found: list[BaseException]) -> None:
        ray_pipeline.quiet_ray_data()
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = 400_000
        context.execution_options.preserve_order = True
        stages = ray.data.from_arrow(pa.table({"source": [1]}))
        for stage, node in ((Decode, "second"), (Encode, "first")):
            where = {"num_cpus": 0.1, "resources": {node: 0.1}, "compute": ActorPoolStrategy(size=1)}
            stages = stages.map_batches(stage, batch_size=None, batch_format="pyarrow", **where)
        try:
            with lost_means_stalled("a block of clips"):
                list(stages.iter_internal_ref_bundles())
        except BaseException as error:
            found.append(error)

    one_ray.stop()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"first": 1}})
    try:
        node = cluster.add_node(num_cpus=1, resources={"second": 1})
        ray.init(cluster.address, log_to_driver=False)
        found: list[BaseException] = []
        reader = threading.Thread(target=read, args=(found,))
        reader.start()
        while not began.exists():
            time.sleep(0.1)
        time.sleep(1)  # until the last block is in the node's store
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, resources={"second": 1})
        lost.touch()
        reader.join(200)
        assert [type(error) for error in found] == [PipelineStalled]
        assert "a block of clips was lost: StreamingGeneratorReplayInconsistentError" in str(found[0])
    finally:
        ray.shutdown()
        cluster.shutdown()


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
