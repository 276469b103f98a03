"""`sora bench data`: our reader of shards compared with raw reads of the same bytes.

All shards are read once per turn, in training's shuffled order with the shard reader and with the training loader, and
as raw bytes; from the page cache and from the disk. SHARDS is a folder of `sora prep` or its URI.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from pyarrow import fs
from pydantic import PositiveInt

from sora_train.bench.core import BenchOptions, Row, Table, drop_from_cache, interleave, log, spread
from sora_train.data.loader import batches, micro_batches
from sora_train.data.order import batch
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig, make_objective
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import shard_files
from sora_train.storage import resolve
from sora_train.train.hardware import seconds

CHUNK = 2**23


class Options(BenchOptions):
    """The flags."""

    batch: PositiveInt = 16
    """Clips per batch."""
    rounds: PositiveInt = 5
    """Turns of each reader."""


def read_raw(folder: str, batch_size: int) -> int:
    """Reads every byte of every file into one buffer."""
    system, _ = resolve(folder)
    for path in shard_files(folder):
        with system.open_input_stream(path, buffer_size=0) as file:
            while file.read(CHUNK):
                pass
    return 0


def read_shards(folder: str, batch_size: int) -> int:
    """Reads an epoch in training's order with the shard reader and returns the number of clips."""
    shards = ShardSet(folder)
    order = shards.sample_order(batch_size, seed=0)
    sampled = (batch(order, number) for number in range(order.steps_per_epoch))
    return sum(len(shards.read(one.bucket, one.rows).sample_ids) for one in sampled)


def load_batches(folder: str, batch_size: int) -> int:
    """The same with the training loader: read-ahead thread, normalisation, noise and times."""
    shards = ShardSet(folder)
    order = shards.sample_order(batch_size, seed=0)
    objective = make_objective(DiffusionConfig(), False)
    make = partial(micro_batches, shards, order, objective, micro_batch_size=batch_size, caption_dropout=0.1)
    loaded = batches(make, range(order.steps_per_epoch))
    return sum(int(micro.weight.sum()) for _, micros in loaded for micro in micros)


READERS: dict[str, Callable[[str, int], int]] = {
    "raw": read_raw, "ours: reader": read_shards, "ours: loader": load_batches,
}  # fmt: skip


def bench(options: Options, folder: str) -> list[Table]:
    """Rates of all readers from the page cache (or from remote storage), and from the disk."""
    Manifest.load(folder)
    system, _ = resolve(folder)
    files = shard_files(folder)
    if not files:
        raise UserError(f"{folder} has no shards. Make some with `sora prep RECIPE`", code="shards")
    batch_size, size = options.batch, sum(info.size for info in system.get_file_info(files))
    table = Table("data", [], [f"{len(files)} files, {size / 1e6:,.1f} MB; batches of {batch_size}"])
    table.notes.append("of raw: raw seconds over the reader's, by turns; GB/s: bytes of the files, opening included")
    places = ("warm", "cold") if isinstance(system, fs.LocalFileSystem) else ("remote",)
    for place in places:
        log(f"reading, {place}")
        calls = {name: partial(time_reader, read, folder, batch_size, place == "cold")
                 for name, read in READERS.items()}  # fmt: skip
        times, errors = interleave(calls, options.rounds)
        table.failed.extend(f"{place}: {name}: {error}" for name, error in errors.items())
        table.rows.extend(rows_of(times, place, size, table.failed))
    return [table]


def time_reader(read: Callable[[str, int], int], folder: str, batch_size: int, cold: bool) -> tuple[float, int]:
    """Seconds and clips of one pass; `cold` drops the files from the page cache first."""
    if cold:
        drop_from_cache(shard_files(folder))
    clips: list[int] = []
    return seconds(lambda: clips.append(read(folder, batch_size))), clips[0]


def rows_of(times: dict[str, list[tuple[float, int]]], place: str, size: int, failed: list[str]) -> list[Row]:
    """The rows of one place. A reader that lost clips has none and is added to `failed`."""
    raw = [took for took, _ in times.get("raw", [])]
    clips = max((each[0][1] for each in times.values()), default=0)
    rows: list[Row] = []
    for name, each in times.items():
        if each[0][1] not in (0, clips):
            failed.append(f"{place}: {name} read {each[0][1]} of {clips} clips, so its times don't count")
            continue
        took = [one for one, _ in each]
        median = statistics.median(took)
        ratio = spread([a / b for a, b in zip(raw, took, strict=True)]) if raw else None
        rows.append({"from": place, "reader": name, "seconds": spread(took), "clips_per_s": clips / median,
                     "gb_per_s": size / median / 1e9, "of raw": ratio})  # fmt: skip
    return rows
