"""`kill -9` of the driver, an actor or a writer during encoding does not change the clips."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray.cluster_utils import Cluster

from data_prep.shards import read_shards
from sora_train.manifest import Manifest
from sora_train.quickstart.shapes import make_clips
from sora_train.schema import shard_files

ACTORS, WRITER = ("Decode", "EncodeVideo", "EmbedText"), "write_blocks"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 sources of two clips each, and 20 that are no videos."""
    folder = tmp_path_factory.mktemp("videos")
    make_clips(folder, 500)
    with (folder / "captions.csv").open("a", newline="") as file:
        for i in range(20):
            (folder / f"bad_{i}.mp4").write_text("no video")
            file.write(f"bad_{i}.mp4,nothing to see {i}\r\n")
    return folder


@pytest.fixture(scope="module")
def unbroken(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert ended(start(videos, folder)) == 0
    return folder


def start(videos: Path, folder: Path, address: str = "local") -> subprocess.Popen:
    """`sora prep` in a process of its own, its lines in `folder/log`."""
    data = {"captions": str(videos / "captions.csv"), "output": str(folder / "shards"), "frames": 4, "fps": 8,
            "height": 64, "width": 64, "stride_s": 0.5}  # fmt: skip
    recipe = {"data": data, "cluster": {"address": address}, "prep": {"shard_mb": 1}}  # of 256 MB there would be one
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "sora_train.cli", "prep", str(folder / "recipe.yaml")],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "RAY_ADDRESS": ""},
        )  # fmt: skip


def ended(process: subprocess.Popen) -> int:
    """Its exit code, once it has ended; kills it after 15 minutes, which only a busy machine needs."""
    try:
        return process.wait(timeout=900)
    finally:
        process.kill()


def contents(folder: Path) -> dict[str, dict]:
    rows = [row for _, table in read_shards(str(folder / "shards")) for row in table.to_pylist()]
    clips = {row["sample_id"]: row for row in rows}
    assert len(clips) == len(rows), "a clip is in the shards twice"
    return clips


def lost(folder: Path) -> set[tuple[str, str]]:
    rows = pq.read_table(folder / "shards" / "quarantine.parquet").to_pylist()
    return {(row["source"], row["reason"]) for row in rows}


def assert_equal(folder: Path, unbroken: Path) -> None:
    found, wanted = contents(folder), contents(unbroken)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert lost(folder) == lost(unbroken)
    assert Manifest.load(str(folder / "shards")) == Manifest.load(str(unbroken / "shards"))


def kill(process: subprocess.Popen, whom: str) -> list[psutil.Process]:
    """Kills the driver, an actor of a stage, or a writer; returns the processes that the driver had started.

    Raises StopIteration if there is none.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    if whom == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
    elif whom == WRITER:
        next(writers(process)).kill()
    else:
        next(child for child in family if whom in "".join(child.cmdline()[:1])).kill()
    return family


def writers(process: subprocess.Popen) -> Iterator[psutil.Process]:
    """Processes that write a shard just now. Each takes milliseconds, so this looks often."""
    while process.poll() is None:
        family, until = psutil.Process(process.pid).children(recursive=True), time.monotonic() + 0.5
        while time.monotonic() < until:
            for child in family:
                with contextlib.suppress(psutil.Error):
                    if WRITER in "".join(child.cmdline()[:1]):
                        yield child


def wait_for_shard(folder: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while not shard_files(str(folder / "shards")):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)


def left_over(family: list[psutil.Process], seconds: float = 30.0) -> list[str]:
    """Processes still alive after a while, except Ray's two agents, which take a minute to end and are killed."""
    _, alive = psutil.wait_procs(family, timeout=seconds)
    agents = [process for process in alive if any("agent" in word.lower() for word in process.cmdline())]
    for process in agents:
        process.kill()
    return [process.name() for process in alive if process not in agents]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_a_run_resumes_after_its_driver_was_killed(videos: Path, unbroken: Path, tmp_path: Path):
    process = start(videos, tmp_path)
    wait_for_shard(tmp_path, process)
    assert left_over(kill(process, "driver"), seconds=10.0) == []
    before = {file: os.stat(file).st_mtime_ns for file in shard_files(str(tmp_path / "shards"))}
    assert ended(start(videos, tmp_path)) == 0, (tmp_path / "log").read_text()
    assert {file: os.stat(file).st_mtime_ns for file in before} == before, "what was done was done again"
    assert_equal(tmp_path, unbroken)
    assert Manifest.load(str(tmp_path / "shards")).counts.model_dump() == {
        "asked": 1020, "written": 1000, "quarantined": 20, "filtered": 0,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", range(10))
def test_a_kill_at_any_moment_changes_no_clip(videos: Path, unbroken: Path, tmp_path: Path, number: int):
    draw = random.Random(number)
    early = number < 4  # later the decoders have done their work and are gone
    whom = ("driver", *ACTORS)[number] if early else ("driver", WRITER, *ACTORS[1:])[number % 4]
    process = start(videos, tmp_path)
    if early:  # while actors start and first clips are decoded
        while not (tmp_path / "log").read_text().count(" s so far") and process.poll() is None:
            time.sleep(0.05)
    else:
        wait_for_shard(tmp_path, process)
    moment = draw.uniform(0, 16 if early else 4)
    time.sleep(moment)
    finished = process.poll() is not None
    found = len(contents(tmp_path))
    if not finished:
        try:
            family = kill(process, whom)
        except StopIteration:
            whom = f"{whom} (was not there)"
    code = ended(process)
    if whom == "driver" and not finished:
        assert left_over(family, seconds=10.0) == []
    again = ""
    if code:
        assert ended(start(videos, tmp_path)) == 0, (tmp_path / "log").read_text()
        again = ", run again"
    assert_equal(tmp_path, unbroken)
    since = "the start" if early else "the first shard"
    print(f"{whom} killed {moment:.1f} s after {since}, {found} clips written: exit code {code}{again}; equal")
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_the_loss_of_a_node_changes_no_clip(videos: Path, unbroken: Path, tmp_path: Path):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        node = cluster.add_node(num_cpus=2)
        process = start(videos, tmp_path, cluster.address)
        wait_for_shard(tmp_path, process)
        cluster.remove_node(node, allow_graceful=False)
        code = ended(process)
        if code:
            assert ended(start(videos, tmp_path, cluster.address)) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    assert_equal(tmp_path, unbroken)
    print(f"a node of two lost: exit code {code}{', run again' if code else ''}; equal")
