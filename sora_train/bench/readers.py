"""Readers that `sora bench data` has read the same shards, each once through; and where the bytes come from."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyarrow import fs
from pyarrow import parquet as pq

from sora_train.data.loader import batches
from sora_train.data.order import batch
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig, make_objective
from sora_train.errors import UserError
from sora_train.schema import shard_files
from sora_train.storage import resolve

Reader = Callable[[str, int], int]
"""Reads a folder of shards once, in batches of so many clips, and says how many clips it was."""
CHUNK = 2**23


def raw(folder: str, batch_size: int) -> int:
    """Every byte of every file, one file after the other, into one place in memory."""
    system, _ = resolve(folder)
    place = bytearray(CHUNK)
    for path in shard_files(folder):
        if isinstance(system, fs.LocalFileSystem):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(place):
                    pass
        else:
            with system.open_input_stream(path, buffer_size=0) as file:
                while file.read(CHUNK):
                    pass
    return 0


def raw_kept(folder: str, batch_size: int) -> int:
    """The same, each file into memory of its own."""
    system, _ = resolve(folder)
    for path in shard_files(folder):
        with system.open_input_file(path) as file:
            file.read(file.size())
    return 0


def ours(folder: str, batch_size: int) -> int:
    """An epoch in training's own shuffled order, as far as the shard reader: clips as float16 arrays."""
    shards = ShardSet(folder)
    plan = shards.plan(batch_size, seed=0)
    taken = (batch(plan, number) for number in range(plan.steps_per_epoch))
    return sum(len(shards.read(one.bucket, one.rows).sample_ids) for one in taken)


def loader(folder: str, batch_size: int) -> int:
    """The same as the training loop gets it: by a thread that reads ahead, normalised, with noise and times drawn."""
    shards = ShardSet(folder)
    plan = shards.plan(batch_size, seed=0)
    made = batches(
        shards, plan, make_objective(DiffusionConfig(), False), range(plan.steps_per_epoch),
        micro_batch_size=batch_size, caption_dropout=0.1,
    )  # fmt: skip
    return sum(int(micro.weight.sum()) for _, micros in made for micro in micros)


def pyarrow(folder: str, batch_size: int) -> int:
    """Row group after row group as Arrow tables: not shuffled, nothing decoded, no checksums."""
    system, _ = resolve(folder)
    rows = 0
    for path in shard_files(folder):
        file = pq.ParquetFile(path, filesystem=system)
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group, use_threads=False).num_rows
    return rows


def ray_data(folder: str, batch_size: int) -> int:
    """`ray.data.read_parquet`, not shuffled, batches as Arrow tables. On the Ray that is there."""
    import ray.data

    system, _ = resolve(folder)
    found = ray.data.read_parquet(shard_files(folder), filesystem=system)
    return sum(len(table) for table in found.iter_batches(batch_size=batch_size, batch_format="pyarrow"))


def hugging_face(folder: str, batch_size: int) -> int:
    """`datasets`, streaming, not shuffled, batches as Arrow tables. Local files only."""
    import datasets  # pyright: ignore[reportMissingImports]

    found = datasets.load_dataset("parquet", data_files=shard_files(folder), split="train", streaming=True)
    return sum(len(table) for table in found.with_format("arrow").iter(batch_size=batch_size))


def forget(folder: str) -> float:
    """Has the system forget what it holds of a local folder's files, and says which share of them it holds still."""
    gc.collect()  # files that are mapped are not forgotten
    held = looked = 0
    for path in shard_files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, os.fstat(file.fileno()).st_size, CHUNK):
                looked += 1
                try:
                    held += bool(os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT))
                except OSError as error:
                    if error.errno != errno.EAGAIN:  # what it says of a page that it would have to fetch
                        raise
    return held / max(looked, 1)


def can_forget() -> bool:
    """Whether the system has what `forget` needs: Linux."""
    return hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")


@contextmanager
def on_s3(folder: str) -> Iterator[str]:
    """A copy of a folder of shards on an S3 server on loopback, which ends with the context (moto, a process of its
    own). UserError where it can't be had.
    """
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    before = {name: os.environ.get(name) for name in names}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, server)
        values = (f"http://127.0.0.1:{port}", "bench", "bench", "us-east-1")
        os.environ.update(dict(zip(names, values, strict=True)))
        made = fs.S3FileSystem(endpoint_override=values[0], allow_bucket_creation=True)
        made.create_dir("bench")
        fs.copy_files(resolve(folder)[1], "bench/shards", source_filesystem=fs.LocalFileSystem(),
                      destination_filesystem=made)  # fmt: skip
        yield "s3://bench/shards"
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Until a server listens; UserError where it ended or does not within a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as looking:
            if not looking.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    raise UserError("the S3 server did not start; it needs moto with its server: pip install 'moto[server,s3]'")
