"""Measures what `sora prep` does before it encodes, on made metadata: reading captions, finding files, comparing.

    python tools/bench_prep_metadata.py make FOLDER 10000000      # captions, an index, files of one byte
    python tools/bench_prep_metadata.py run FOLDER [rows] [selection.near_duplicates]

`make` gives each file ten captions, each of these one clip in the shards, which are empty files of the size that the
index says. A hundredth of the sources has no record, so it is still to do. `run` prints seconds and the peak memory.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.duplicates import Duplicates
from data_prep.resume import SETTINGS_KEY, load_progress, reconcile
from data_prep.sources import read_rows, row_key
from data_prep.stats import PrepStats
from data_prep.stored import read_stored
from sora_train import index
from sora_train.data.config import DataConfig, SelectionConfig

BLOCK, CAPTIONS, SHARD_ROWS, MTIME = 500_000, 10, 10_000, 1_700_000_000


def make(folder: Path, count: int) -> None:
    """Makes captions, files, and the index of `count` clips."""
    media, shards = folder / "media", folder / "shards"
    (shards / "bucket=16x256x256").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    writer = pq.ParquetWriter(
        folder / "captions.parquet", pa.schema({"video_file_name": pa.string(), "prompt": pa.string()})
    )
    for begin in range(0, count, BLOCK):
        numbers = range(begin, min(count, begin + BLOCK))
        names = [f"{i // CAPTIONS // 1000}/clip_{i // CAPTIONS:08d}.mp4" for i in numbers]
        for name in dict.fromkeys(names):
            path = media / name
            if name.endswith("000.mp4"):
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            os.utime(path, (MTIME, MTIME))
        captions = [f"a caption of the usual length, which says what is seen in the clip, number {i}" for i in numbers]
        writer.write_table(pa.table({"video_file_name": names, "prompt": captions}))
        keys = [row_key(name, (caption,)).hex() for name, caption in zip(names, captions, strict=True)]
        digits = rng.bytes(16 * len(keys)).hex()
        samples = [digits[i : i + 32] for i in range(0, len(digits), 32)]
        looks = rng.bytes(24 * len(keys)).hex()
        n = len(keys)
        shard_names = [f"bucket=16x256x256/part-{i // SHARD_ROWS:06d}.parquet" for i in numbers]
        facts: dict[str, Any] = {
            "row_id": keys, "sample_id": samples, "source": names, "source_size": np.ones(n, int),
            "source_version": [str(MTIME * 10**9)] * n, "content_hash": [s[::-1] + s for s in samples],
            "perceptual_hash": [looks[i : i + 48] for i in range(0, len(looks), 48)], "start_s": np.zeros(n),
            "end_s": np.ones(n), "tokens": [[20]] * n, "shard": shard_names,
            "row": np.arange(begin, begin + n, dtype=np.int32) % SHARD_ROWS,
        }  # fmt: skip
        clips = pa.table([facts[name] for name in index.CLIPS.names], index.CLIPS.names)
        index.append(str(shards), "clips", clips.cast(index.CLIPS))
        rows: list[dict] = []
        for shard in dict.fromkeys(shard_names):
            with open(shards / shard, "wb") as file:
                file.truncate(SHARD_ROWS * 1_000_000)
            inside = names[len(rows) * SHARD_ROWS :][:SHARD_ROWS]
            groups = [32] * (len(inside) // 32) + [len(inside) % 32] * (len(inside) % 32 > 0)
            rows.append(index.shard_row(shard, SHARD_ROWS * 1_000_000, "key", groups, inside))
        index.append(str(shards), "shards", pa.Table.from_pylist(rows, index.SHARDS))
        done = np.arange(n) % 100 != 0
        remarks = [["hdr"] if i % 50 == 1 else [] for i in numbers]
        columns: list[Any] = [keys, names, np.ones(n, int), facts["source_version"], [[s] for s in samples], remarks]
        records = pa.table(columns, index.SOURCES.names).cast(index.SOURCES)
        index.append(str(shards), "sources", records.filter(pa.array(done)), {SETTINGS_KEY: "settings"})
        print(f"{begin + n} made", flush=True)
    writer.close()


def run(folder: Path, *flags: str) -> None:
    """Measures reading and comparing; with a number of bits, loading the hashes of duplicates too."""
    began = time.monotonic()

    def report(what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{time.monotonic() - began:7.1f} s  {time.process_time():7.1f} s of CPU  {peak:5.2f} GB peak  {what}",
            flush=True,
        )

    captions = next(folder.glob("captions.*"))
    data = DataConfig(captions=str(captions), root=str(folder / "media"), output=str(folder / "shards"))
    report("imported")
    rows = read_rows(data)
    report(f"{len(rows)} rows of {rows.sources} sources read, files found")
    stored, saved = read_stored(data.output, "key"), load_progress(data.output, "settings")
    state = reconcile(data, rows, stored, saved, PrepStats(rows.sources, 0.1, data.output))
    report(f"compared: {state.stats.summary()}; {state.pending} to process")
    first = next(iter(state.rounds(400_000)), [])
    report(f"first round: {len(first)} sources")
    if flags:
        duplicates = Duplicates(SelectionConfig(duplicates=True, near_duplicates=int(flags[0])))
        for table in state.known_hashes():
            duplicates.add_table(table)
        report(f"{len(duplicates)} clips known to the search for duplicates")
        looks = [hashlib.sha256(str(i).encode()).hexdigest()[:48] for i in range(1000)]
        start = time.monotonic()
        for look in looks:
            duplicates.find(look, look, (0.0, 1.0))
        report(f"one looked up in {(time.monotonic() - start):.2f} ms")


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    make(Path(folder), int(rest[0])) if command == "make" else run(Path(folder), *rest)
