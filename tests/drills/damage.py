"""Damage to files: NaN latents, truncated files, flipped bytes, full or read-only disks."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.data.order import batch
from sora_train.data.shards import ShardSet
from sora_train.schema import ROW_GROUP, shard_files


def poisoned(shards: Path, to: Path, sample_ids: set[str]) -> Path:
    """Copies shards, with NaN as latents of these clips."""
    shutil.copytree(shards, to)
    for file in shard_files(str(to)):
        table = pq.ParquetFile(file).read()
        rows = table.to_pylist()
        for row in rows:
            if row["sample_id"] in sample_ids:
                row["latents"] = np.full(len(row["latents"]) // 2, np.nan, np.float16).tobytes()
        table = pa.Table.from_pylist(rows, schema=table.schema)
        pq.write_table(table, file, row_group_size=ROW_GROUP, write_page_checksum=True)
    return to


def stretch(shards: Path, batch_size: int, seed: int, steps: int, first: int, length: int) -> set[str]:
    """Clips to poison, one of each of `length` batches from `first` on, a batch of the first epoch, so that in later
    epochs, where they come in another order, there is no such stretch again.
    """
    clips = ShardSet(str(shards))
    order = clips.sample_order(batch_size, seed)
    taken = [batch(order, number) for number in range(steps + order.steps_per_epoch)]
    for choice in np.ndindex(*[batch_size] * length):
        rows = {taken[first + i].rows[which] for i, which in enumerate(choice)}
        bad = [number for number, of in enumerate(taken) if rows & set(of.rows)]
        streaks = [number for number in bad if all(number + i in bad for i in range(length))]
        if streaks == [first]:
            return set(clips.sample_ids(taken[first].bucket, sorted(rows)))
    raise AssertionError(f"no clips of the batches {first} to {first + length - 1} are far apart later on")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path, at: int) -> None:
    """Flips all bits of the byte at an offset."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


def flip_in_latents(shard: Path) -> None:
    """Flips a byte amid the latents of a shard's first row group."""
    group = pq.ParquetFile(shard).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    flip(shard, columns["latents"].data_page_offset + columns["latents"].total_compressed_size // 2)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mounts a small file system in memory. PermissionError if this process may not."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "drill", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PermissionError(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used(folder: Path) -> int:
    """Used bytes of a folder's disk."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize
