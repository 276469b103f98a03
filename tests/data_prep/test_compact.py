"""Compaction: fewer files with the same clips in the same order, also after a kill at any moment."""

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import compact
from data_prep.compact import compact_shards
from data_prep.shard_index import drop_rows, sync_index
from data_prep.shards import read_shards, write_shard
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.locks import run_lock
from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts
from sora_train.schema import SHARD_SCHEMA, encode_row, shard_files
from sora_train.storage import resolve

SHARD_BYTES = 40_000  # about 100 clips


def write(folder: str, number: int, start: int, stop: int, bucket: str = "1x8x8") -> None:
    rows = [
        encode_row(
            sample_id=f"{i:05d}", source=f"{i // 3}.mp4", source_size=i, source_version="v", content_hash=f"c{i}",
            start_s=0.5, end_s=1.0, captions=[f"clip {i}"], latents=np.full((1, 1, 4, 1, 1), i),
            text=[np.zeros((30, 4))],
        )
        for i in range(start, stop)
    ]  # fmt: skip
    system, path = resolve(folder)
    name = f"{path}/bucket={bucket}/part-{number:06d}-{number:08d}.parquet"
    write_shard(system, name, "key", [pa.Table.from_pylist(rows, SHARD_SCHEMA)])


def fill(folder: str) -> None:
    """Small shards, a large one, one with dropped clips, one that is alone in its bucket; 200 clips, 22 dropped."""
    for number, (start, stop) in enumerate([(0, 30), (30, 37), (37, 137), (137, 142), (142, 150), (150, 190)]):
        write(folder, number, start, stop)
    write(folder, 9, 190, 200, "1x16x8")
    Manifest(
        encoding_hash="key",
        vae=VaeFacts(name="none", hash="", channels=4, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4),
        text=TextFacts(name="none", hash="", width=4, max_tokens=30),
        latents=LatentFormat(moments=1),
        frames=1, fps=8.0, height=8, width=8, buckets={}, empty_tokens=1, reasons={},
        empty_text=base64.b64encode(np.zeros((1, 4), np.float16).tobytes()).decode(),
        counts=Counts(asked=200, written=200, quarantined=0, filtered=0),
    ).save(folder)  # fmt: skip
    sync_index(folder, "key")
    drop_rows(folder, {"bucket=1x8x8/part-000005-00000005.parquet": [*range(10, 31)]})
    drop_rows(folder, {"bucket=1x8x8/part-000000-00000000.parquet": [4]})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    fill(str(tmp_path))
    return str(tmp_path)


def described(folder: str) -> tuple:
    """What training sees of both splits, and the content of all clips."""
    splits = [ShardSet(folder, 0.3, split) for split in ("train", "holdout")]
    seen = [(split.rows, split.fingerprint, [split.all_sample_ids(name) for name in split.rows]) for split in splits]
    rows = [row for _, table in read_shards(folder) for row in table.to_pylist()]
    return seen, rows


def test_compaction_leaves_fewer_files_with_the_same_clips_in_order(folder: str):
    before, size = described(folder), sum(Path(file).stat().st_size for file in shard_files(folder))
    assert len(before[1]) == 178
    compact_shards(folder, SHARD_BYTES)
    files = shard_files(folder)
    assert described(folder) == before
    assert [pq.read_metadata(file).num_rows for file in files] == [10, 36, 100, 32]
    assert sum(Path(file).stat().st_size for file in files) < size
    untouched = {file: Path(file).stat().st_mtime_ns for file in files}
    compact_shards(folder, SHARD_BYTES)
    assert {file: Path(file).stat().st_mtime_ns for file in shard_files(folder)} == untouched, "nothing is worth it now"
    for file in Path(folder, "index").glob("*/*"):
        file.unlink()
    assert described(folder) == before, "no clip is dropped any more, so the files alone say the same"


@pytest.mark.parametrize("step", range(1, 7))
def test_a_kill_at_any_moment_shows_each_clip_once(folder: str, step: int, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C before one of the steps leaves the same files as a kill."""
    before, steps = described(folder), 0

    def counted(act):
        def run(*args):
            nonlocal steps
            steps += 1
            if steps == step:
                raise KeyboardInterrupt
            return act(*args)

        return run

    with monkeypatch.context() as patch:
        for name in ("append", "atomic_write", "storage_errors"):  # the last one before files are deleted
            patch.setattr(compact, name, counted(getattr(compact, name)))
        with pytest.raises(KeyboardInterrupt):
            compact_shards(folder, SHARD_BYTES)
    assert described(folder) == before
    sync_index(folder, "key")
    assert described(folder) == before
    compact_shards(folder, SHARD_BYTES)
    assert described(folder) == before
    assert len(shard_files(folder)) == 4


def test_the_new_name_is_sorted_where_the_old_ones_were(tmp_path: Path):
    for name in ("0000", "0001", "x"):  # shards that another program named
        write(str(tmp_path), 0, int(name, 36), int(name, 36) + 1)
        made = tmp_path / "bucket=1x8x8"
        (made / "part-000000-00000000.parquet").rename(made / f"{name}.parquet")
    fill(str(tmp_path / "other"))
    Manifest.load(str(tmp_path / "other")).save(str(tmp_path))
    before = described(str(tmp_path))[1]
    compact_shards(str(tmp_path), SHARD_BYTES)
    assert described(str(tmp_path))[1] == before
    assert len(shard_files(str(tmp_path))) == 1


def test_a_folder_in_use_or_without_a_manifest_is_refused(folder: str, tmp_path: Path):
    with run_lock(folder, "sora prep"), pytest.raises(UserError, check=lambda error: error.code == "locked"):
        compact_shards(folder, SHARD_BYTES)
    with pytest.raises(UserError, check=lambda error: error.code == "shards"):
        compact_shards(str(tmp_path / "none"), SHARD_BYTES)


def test_shards_in_a_bucket_are_compacted(s3: str):
    fill(f"{s3}/shards")
    before = described(f"{s3}/shards")
    compact_shards(f"{s3}/shards", SHARD_BYTES)
    assert described(f"{s3}/shards") == before
    assert len(shard_files(f"{s3}/shards")) == 4
