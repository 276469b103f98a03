"""Benchmark of the last step of `sora prep`, without a codec: made clips from Ray's object store to shards.

    python -m tests.drills.sink FOLDER [--clips 500] [--rounds 3] [--core-share 0.3]

Variants take turns: `driver` is how prep wrote until 2026-11-27, all in the driver, which is also how fast one process
copies a clip three times; `1 writer` and `2 writers` are `data_prep/writers.py` with so many writers at a time. Prints
clips/s, GB/s, and CPU time per clip of the driver and of all processes, which other work on the machine changes less.
FOLDER is deleted; on /dev/shm the disk is not the limit.

With `--core-share` each of Ray's workers gets this share of one core (Linux control groups, as root), so a machine of
two cores shows what a second writer adds on one that has a core for each.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from data_prep import writers
from data_prep.schemas import ENCODED
from data_prep.writers import ShardWriters, block_facts, fetch
from sora_train.schema import ENCODING_KEY, ROW_GROUP, SHARD_SCHEMA
from sora_train.storage import atomic_write, resolve

BUCKET, LATENTS, TOKENS, WIDTH = "16x256x256", (2, 16, 4, 32, 32), 100, 4096
CLIP_BYTES = 2 * (int(np.prod(LATENTS)) + TOKENS * WIDTH)
BLOCK_CLIPS, SHARD_BYTES = 16, 128 * 10**6
CPU_GROUPS, PERIOD_US = Path("/sys/fs/cgroup/cpu"), 20_000
IDLE_WORKERS = 8
"""Number of CPUs given to Ray, which ends idle workers above this number after a second."""


@ray.remote(num_cpus=1)
def make_block(start: int) -> pa.Table:
    """A block of clips as long as 16 x 256 x 256 with 100 tokens of T5-XXL."""
    random = np.random.default_rng(start)
    rows = [
        {"sample_id": f"{i:032d}", "source": f"folder/{i}.mp4", "source_size": i, "source_version": "1" * 19,
         "row_id": "r", "content_hash": "c" * 64, "perceptual_hash": "p" * 48, "start_s": 0.0, "end_s": 1.0,
         "captions": ["c" * 80], "latents": random.bytes(2 * int(np.prod(LATENTS))),
         "text": [random.bytes(2 * TOKENS * WIDTH)], "tokens": [TOKENS], "bucket": BUCKET, "reason": "", "note": ""}
        for i in range(start, start + BLOCK_CLIPS)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ENCODED)


def by_driver(folder: Path, blocks: list[ray.ObjectRef]) -> None:
    """What `sora prep` did before writers, with its 256 clips per shard."""
    system, path = resolve(str(folder))
    schema = SHARD_SCHEMA.with_metadata({ENCODING_KEY: b"key"})
    held: list[pa.Table] = []
    for number, block in enumerate(blocks):
        table = ray.get(block)
        table.drop_columns(["latents", "text", "tokens"]).to_pylist()
        held.append(table.take(list(range(len(table)))).select(SHARD_SCHEMA.names))
        if sum(map(len, held)) >= 256 or number == len(blocks) - 1:
            buffer = io.BytesIO()
            options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            table = pa.concat_tables(held).cast(schema)
            pq.write_table(table, buffer, row_group_size=ROW_GROUP, write_page_checksum=True, **options)
            atomic_write(system, f"{path}/bucket={BUCKET}/part-{number:06d}.parquet", buffer.getvalue())
            held = []


def by_writers(folder: Path, blocks: list[ray.ObjectRef], count: int) -> None:
    """As the sink does, with `count` writers at a time."""
    writers.WRITERS_PER_NODE, writers.CPUS_OF_A_WRITER = count, 1
    made = ShardWriters(str(folder), "key", SHARD_BYTES)
    for block in blocks:
        facts = fetch(block_facts.remote(block), "facts").to_pylist()
        made.add(block, {BUCKET: list(range(len(facts)))}, facts)
    made.flush(600)


def cpu_of_all() -> float:
    """CPU seconds of this process and of Ray's workers."""
    me = psutil.Process()
    found = 0.0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            if process == me or "ray::" in "".join(process.cmdline()[:1]):
                found += sum(process.cpu_times()[:2])
    return found


@contextlib.contextmanager
def limited_workers(share: float | None) -> Iterator[None]:
    """Holds each of Ray's workers that run by now to a share of a core."""
    groups = []
    if share:
        for process in psutil.Process().children(recursive=True):
            if "ray::" in "".join(process.cmdline()[:1]):
                groups.append(group := CPU_GROUPS / f"sora_sink_{process.pid}")
                group.mkdir()
                (group / "cpu.cfs_period_us").write_text(f"{PERIOD_US}")
                (group / "cpu.cfs_quota_us").write_text(f"{int(share * PERIOD_US)}")
                (group / "cgroup.procs").write_text(f"{process.pid}")
    try:
        yield
    finally:
        for group in groups:
            with contextlib.suppress(OSError):  # a worker that has ended
                (CPU_GROUPS / "cgroup.procs").write_text(group.name.rpartition("_")[2])
            group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.sink", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core-share", type=float)
    asked = parser.parse_args()
    ray.init(
        address="local", num_cpus=IDLE_WORKERS, include_dashboard=False, log_to_driver=False,
        object_store_memory=6 * 10**9,
    )  # fmt: skip
    blocks = [make_block.remote(i) for i in range(0, asked.clips, BLOCK_CLIPS)]
    ray.wait(blocks, num_returns=len(blocks))
    clips = BLOCK_CLIPS * len(blocks)
    variants: dict[str, Callable[[Path], None]] = {
        "driver": lambda folder: by_driver(folder, blocks),
        "1 writer": lambda folder: by_writers(folder, blocks, 1),
        "2 writers": lambda folder: by_writers(folder, blocks, 2),
    }
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    by_writers(asked.folder, blocks, 2)  # warms up
    with limited_workers(asked.core_share):
        for _ in range(asked.rounds):
            for name, write in variants.items():
                shutil.rmtree(asked.folder, ignore_errors=True)
                began, cpu, every = time.monotonic(), time.process_time(), cpu_of_all()
                write(asked.folder)
                took, cpu, every = time.monotonic() - began, time.process_time() - cpu, cpu_of_all() - every
                rates[name].append((clips / took, 1000 * cpu / clips, 1000 * every / clips))
    shutil.rmtree(asked.folder, ignore_errors=True)
    held = f", workers held to {asked.core_share} of a core each" if asked.core_share else ""
    print(f"{clips} clips of {CLIP_BYTES / 1e6:.2f} MB, blocks of {BLOCK_CLIPS}, {asked.rounds} rounds{held}")
    print("| variant | clips/s (median, rounds) | GB/s | CPU ms per clip: driver | all |\n|---|---|---|---|---|")
    for name, found in rates.items():
        each = [rate for rate, _, _ in found]
        middle, cpu, every = (statistics.median(values) for values in zip(*found, strict=True))
        rounds = ", ".join(f"{rate:.0f}" for rate in each)
        print(f"| {name} | {middle:.0f} ({rounds}) | {middle * CLIP_BYTES / 1e9:.2f} | {cpu:.2f} | {every:.2f} |")


if __name__ == "__main__":
    main()
