"""Clips reach shards through Ray's tasks, whole and in order; the driver gets only facts."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import writers as module
from data_prep.schemas import ENCODED
from data_prep.shards import remove_unfinished, write_shard
from data_prep.watchdog import PipelineStalled
from data_prep.writers import Shard, ShardWriters, block_facts, facts_of, fetch
from sora_train.errors import UserError
from sora_train.schema import ROW_GROUP, bucket_of, encode_row, shard_files
from sora_train.storage import resolve

pytestmark = pytest.mark.ray
LATENTS = (1, 4, 4, 64, 64)  # 131 kB: a block is in the object store, not in the driver's memory


def block(numbers: range, buckets: tuple[str, ...] = ("4x64x64",), shape: tuple[int, ...] = LATENTS) -> pa.Table:
    rows = [
        {"reason": "", "message": "", "remark": "", "note": "", "asked": [], "row_id": f"row {i}",
         "bucket": buckets[i % len(buckets)], "empty_text": b"empty" if i == numbers.start else None}
        | encode_row(
            sample_id=f"{i:032d}", source=f"a folder of videos/{i}.mp4", source_size=i, source_version="v" * 19,
            content_hash="c" * 64, perceptual_hash="p" * 48, start_s=0.0, end_s=1.0,
            captions=["a caption of some length, as people write them, of a dog that runs along a beach at sunset"],
            latents=np.full(shape, i % 1000), text=[np.full((6, 32), i % 1000)],
        )
        for i in numbers
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ENCODED)


def take(made: ShardWriters, tables: list[pa.Table], skip: Callable[[int], bool] = lambda i: False) -> list[Shard]:
    """Has tables written as the sink does, except the clips to skip."""
    import ray

    for table in tables:
        ref = ray.put(table)
        facts = fetch(block_facts.remote(ref), "facts").to_pylist()
        good: dict[str, list[int]] = {}
        for row, fact in enumerate(facts):
            if not skip(int(fact["sample_id"])):
                good.setdefault(fact["bucket"], []).append(row)
        made.add(ref, good, facts)
        assert made.held_bytes <= made.max_bytes
    made.flush(60)
    assert not made.held_bytes
    return made.take_finished()


def write(folder: Path, tables: list[pa.Table], shard_bytes: int = 256_000_000) -> list[Shard]:
    return take(ShardWriters(str(folder), "key", shard_bytes), tables)


def ids(folder: Path) -> dict[str, list[int]]:
    """Numbers of the clips by bucket, in the order of shards and rows. Checks their tensors."""
    found: dict[str, list[int]] = {}
    for file in shard_files(str(folder)):
        for row in pq.read_table(file, page_checksum_verification=True).to_pylist():
            number = int(row["sample_id"])
            assert set(np.frombuffer(row["latents"], np.float16)) == {number % 1000}
            assert set(np.frombuffer(row["text"][0], np.float16)) == {number % 1000}
            found.setdefault(bucket_of(file), []).append(number)
    return found


def test_each_bucket_has_its_clips_in_order_and_full_row_groups(tmp_path: Path, local_ray):
    buckets = ("4x64x64", "4x64x64", "4x64x64", "2x64x64")
    tables = [block(range(i, i + 24), buckets) for i in range(0, 240, 24)]
    shards = take(ShardWriters(str(tmp_path), "key", 10_000_000), tables, skip=lambda i: i % 10 == 7)
    kept = [i for i in range(240) if i % 10 != 7]
    assert ids(tmp_path) == {"4x64x64": [i for i in kept if i % 4 < 3], "2x64x64": [i for i in kept if i % 4 == 3]}
    files = shard_files(str(tmp_path))
    assert sorted(shard.path for shard in shards) == files
    assert {shard.path: shard.size for shard in shards} == {file: os.stat(file).st_size for file in files}
    assert len([file for file in files if bucket_of(file) == "4x64x64"]) == 3  # 162 clips of 131 kB
    for shard in shards:
        groups = pq.read_metadata(shard.path)
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        assert set(sizes[:-1]) <= {ROW_GROUP}
        names = [fact["sample_id"] for fact in shard.facts]
        assert pq.read_table(shard.path, columns=["sample_id"])["sample_id"].to_pylist() == names


def test_what_is_left_of_a_block_is_written_with_the_next_block(tmp_path: Path, local_ray):
    """Clips of one bucket, and row groups that end within blocks."""
    write(tmp_path, [block(range(i, i + 20)) for i in range(0, 160, 20)], shard_bytes=1)
    assert ids(tmp_path) == {"4x64x64": list(range(160))}
    assert len(shard_files(str(tmp_path))) == 160 // ROW_GROUP


def test_less_than_2_kb_of_a_clip_reach_the_driver(tmp_path: Path, local_ray, monkeypatch: pytest.MonkeyPatch):
    import ray

    got: list[object] = []
    get = ray.get
    monkeypatch.setattr(ray, "get", lambda *args, **options: got.append(get(*args, **options)) or got[-1])
    shards = write(tmp_path, [block(range(i, i + 16)) for i in range(0, 128, 16)], shard_bytes=4_000_000)
    assert sum(len(shard.facts) for shard in shards) == 128
    assert len(shards) == 4
    received = sum(len(ray.cloudpickle.dumps(value)) for value in got)
    assert 100 * 128 < received < 2000 * 128, f"{received / 128:.0f} bytes per clip"


def test_the_facts_have_the_size_of_the_tensors():
    facts = facts_of(block(range(2)))
    assert facts["bytes"].to_pylist() == [2 * np.prod(LATENTS) + 2 * 6 * 32] * 2
    assert facts["tokens"].to_pylist() == [[6]] * 2


def test_held_clips_are_bounded_by_smaller_shards(tmp_path: Path, local_ray):
    """Of eight buckets one has a clip in fifty."""
    buckets = tuple("9x64x64" if i == 49 else f"{1 + i % 7}x64x64" for i in range(50))
    made = ShardWriters(str(tmp_path), "key", 256_000_000)
    made.max_bytes = 8_000_000  # 60 clips
    take(made, [block(range(i, i + 20), buckets) for i in range(0, 200, 20)])
    assert sorted(number for numbers in ids(tmp_path).values() for number in numbers) == list(range(200))
    assert len(shard_files(str(tmp_path))) > 8


def killed_once(mark: Path, work: Callable) -> Callable:
    """Kills its process the first time it is called, after `work`."""

    def run(*args: object, **options: object) -> object:
        result = work(*args, **options)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_killed_writer_changes_nothing(tmp_path: Path, local_ray, monkeypatch: pytest.MonkeyPatch, moment: str):
    import ray

    mark, function, folder = tmp_path / "killed", module.write_blocks._function, tmp_path / "shards"
    killed = killed_once(mark, function)
    if moment == "before the rename":
        kill_in = killed_once_in(mark)

        def killed(folder, path, key, rows, *blocks):
            write_shard(resolve(folder)[0], path, key, kill_in(blocks))
            return function(folder, path, key, rows, *blocks)

    monkeypatch.setattr(module, "write_blocks", ray.remote(num_cpus=0, max_retries=3)(killed))
    write(folder, [block(range(i, i + 16)) for i in range(0, 80, 16)])
    assert mark.exists()
    assert ids(folder) == {"4x64x64": list(range(80))}
    assert len(shard_files(str(folder))) == 1
    assert len(list(folder.rglob(".unfinished-*"))) == (moment == "before the rename")
    remove_unfinished(str(folder))
    assert not list(folder.rglob(".unfinished-*"))


def killed_once_in(mark: Path) -> Callable:
    """Kills the process the first time after the third table."""

    def tables(given):
        for number, table in enumerate(given):
            if number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield table

    return tables


def test_a_shard_that_can_not_be_written_is_one_message(tmp_path: Path, local_ray):
    (tmp_path / "bucket=4x64x64").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"bucket=4x64x64/part-000000-\w+.parquet can't be written: "):
        write(tmp_path, [block(range(40))])


def test_a_lost_block_stalls_the_pipeline(tmp_path: Path, local_ray):
    import ray

    @ray.remote(max_retries=0)
    def lost() -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        return block(range(1))

    with pytest.raises(PipelineStalled, match="the facts of a block was lost"):
        fetch(block_facts.remote(lost.remote()), "the facts of a block")


def test_writers_that_do_not_finish_stall_the_pipeline(tmp_path: Path, local_ray, monkeypatch: pytest.MonkeyPatch):
    """The other bucket is written all the same, before the one that hangs ends with `cancel`."""
    import ray

    function = module.write_blocks._function

    def hang(folder, path, key, rows, *blocks):
        while "8x64x64" in path:
            time.sleep(0.1)
        return function(folder, path, key, rows, *blocks)

    monkeypatch.setattr(module, "write_blocks", ray.remote(num_cpus=0)(hang))
    monkeypatch.setattr(module, "CPUS_OF_A_WRITER", 1)
    made = ShardWriters(str(tmp_path), "key", 256_000_000)
    for bucket in ("8x64x64", "4x64x64"):
        table = ray.put(block(range(16)))
        made.add(table, {bucket: list(range(16))}, fetch(block_facts.remote(table), "facts").to_pylist())
    with pytest.raises(PipelineStalled, match="no shard was written for 10 s"):
        made.flush(10)
    made.cancel()
    assert ids(tmp_path) == {"4x64x64": list(range(16))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_blocks_that_are_lost_with_their_node_stall_the_pipeline(tmp_path: Path, one_ray):
    """Clips of an actor that is gone, as after the end of the stages; those of other nodes are written."""
    import ray
    from ray.cluster_utils import Cluster

    @ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
    class Stage:
        def make(self, start: int) -> pa.Table:
            return block(range(start, start + 16))

    one_ray.stop()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"first": 1}})
    try:
        node = cluster.add_node(num_cpus=1, resources={"second": 1})
        ray.init(cluster.address, log_to_driver=False)
        made = ShardWriters(str(tmp_path), "key", 256_000_000)
        stages = [Stage.options(resources={name: 0.1}).remote() for name in ("first", "second")]
        for stage, start, bucket in zip(stages, (0, 16), ("4x64x64", "8x64x64"), strict=True):
            table = stage.make.remote(start)
            facts = fetch(block_facts.remote(table), "facts").to_pylist()
            made.add(table, {bucket: list(range(16))}, facts)
        for stage in stages:
            ray.kill(stage)
        cluster.remove_node(node, allow_graceful=False)
        with pytest.raises(PipelineStalled, match="the shard .* was lost: "):
            made.flush(60)
        made.cancel()
        assert ids(tmp_path) == {"4x64x64": list(range(16))}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_writer_that_wakes_after_its_repeat_changes_nothing(tmp_path: Path, one_ray, monkeypatch):
    """Its node stops in the middle of a shard until Ray has repeated the task elsewhere, and then goes on."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    stopped, woken, folder = tmp_path / "stopped", tmp_path / "woken", tmp_path / "shards"
    stop_in, write_all = stopped_once_in(stopped), module.write_blocks._function

    def stop_once(folder, path, key, rows, *blocks):
        if stopped.exists():
            return write_all(folder, path, key, rows, *blocks)
        write_shard(resolve(folder)[0], path, key, stop_in(blocks))
        woken.touch()
        return os.stat(path).st_size, ray.util.get_node_ip_address()

    one_ray.stop()
    # A node is lost after three seconds without an answer, a worker on it after ten: by default after seven minutes.
    quick = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    quick |= {"grpc_client_keepalive_time_ms": 5000, "grpc_client_keepalive_timeout_ms": 5000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick})
    node = cluster.add_node(num_cpus=1)
    raylet, worker = node.all_processes["raylet"][0].process.pid, 0
    try:
        ray.init(cluster.address, log_to_driver=False)
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
        task = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=there)(stop_once)
        monkeypatch.setattr(module, "write_blocks", task)
        made = ShardWriters(str(folder), "key", 256_000_000)
        for start in range(0, 80, 16):
            table = ray.put(block(range(start, start + 16)))
            facts = fetch(block_facts.remote(table), "facts").to_pylist()
            made.add(table, {"4x64x64": list(range(16))}, facts)
        flush = threading.Thread(target=made.flush, args=(100,))
        flush.start()
        while not (stopped.exists() and stopped.read_text()):
            time.sleep(0.1)
        worker = int(stopped.read_text())
        os.kill(raylet, signal.SIGSTOP)
        flush.join(150)
        (shard,) = made.take_finished()
        before = Path(shard.path).read_bytes(), os.stat(shard.path).st_ino
        assert not woken.exists()
        os.kill(worker, signal.SIGCONT)
        while not woken.exists():
            time.sleep(0.1)
        assert os.stat(shard.path).st_ino != before[1]  # it was written again
        assert Path(shard.path).read_bytes() == before[0]
        assert ids(folder) == {"4x64x64": list(range(80))}
        assert [path.name for path in folder.rglob("*") if path.is_file()] == [Path(shard.path).name]
    finally:
        for process in filter(None, (worker, raylet)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ray.shutdown()
        cluster.shutdown()


def stopped_once_in(mark: Path) -> Callable:
    """Stops the process the first time after the third table."""

    def tables(given):
        for number, table in enumerate(given):
            if number == 3:
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            yield table

    return tables
