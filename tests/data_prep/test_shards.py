"""Shards are complete, have full row groups, and hold each clip once."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.commits import Commits
from data_prep.resume import SourceRecord, load_progress
from data_prep.shard_index import stored_clips, sync_index
from data_prep.shards import (
    next_number,
    pick_rows,
    remove_unfinished,
    shard_name,
    write_shard,
)
from data_prep.sources import row_id
from data_prep.stored import count_clips, drop_repeats
from data_prep.writers import Shard
from sora_train import index
from sora_train.errors import UserError
from sora_train.locks import run_lock
from sora_train.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, encode_row, list_shards, shard_files
from sora_train.shard_list import dropped_rows
from sora_train.storage import resolve


def table(start: int, stop: int) -> pa.Table:
    rows = [
        encode_row(
            sample_id=f"{i:05d}", source=f"{i}.mp4", source_size=i, source_version="v", content_hash="", start_s=0.0,
            end_s=1.0, captions=["x"], latents=np.full(4, i), text=[np.zeros((1, 4))],
        )
        for i in range(start, stop)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SHARD_SCHEMA)


def write(folder: Path, start: int, stop: int, key: str = "key") -> None:
    system, path = resolve(str(folder))
    tables = (table(at, min(stop, at + 10)) for at in range(start, stop, 10))
    write_shard(system, f"{path}/bucket=1x8x8/{shard_name(next_number(str(folder)))}", key, tables)


def ids(folder: Path) -> list[str]:
    return [str(sample) for table in stored_clips(str(folder), "key") for sample in table["sample_id"].to_pylist()]


def test_rows_keep_their_order_in_full_row_groups(tmp_path: Path):
    write(tmp_path, 0, 600)
    (file,) = shard_files(str(tmp_path))
    assert ids(tmp_path) == [f"{i:05d}" for i in range(600)]
    found = pq.read_metadata(file)
    assert [found.row_group(g).num_rows for g in range(found.num_row_groups)] == [32] * 18 + [24]


def test_a_commit_says_of_a_shard_what_the_shard_says(tmp_path: Path):
    write(tmp_path, 0, 70)
    (file,) = shard_files(str(tmp_path))
    facts = [row | {"row_id": row_id(row["source"], ("x",))} for row in table(0, 70).to_pylist()]
    commits = Commits(str(tmp_path), "key", "settings")
    commits.shards.append(Shard("1x8x8", facts=facts, path=file, size=Path(file).stat().st_size))
    commits.save_shards()
    committed = {kind: list(index.read(str(tmp_path), kind)) for kind in ("shards", "clips")}
    shutil.rmtree(tmp_path / "index")
    sync_index(str(tmp_path), "key")
    found = {kind: list(index.read(str(tmp_path), kind)) for kind in ("shards", "clips")}
    assert [[table.to_pylist() for table in tables] for tables in committed.values()] == [
        [table.to_pylist() for table in tables] for tables in found.values()
    ]


def test_picked_rows_are_those_that_were_asked_for():
    rows = [0, 1, 2, 7, 9, 10, 39]
    parts = list(pick_rows(table(0, 40), rows))
    assert pa.concat_tables(parts).equals(table(0, 40).take(rows))
    assert [len(part) for part in parts] == [3, 1, 2, 1]


def test_a_second_run_writes_behind_the_first(tmp_path: Path):
    write(tmp_path, 0, 50)
    write(tmp_path, 50, 80)
    assert ids(tmp_path) == [f"{i:05d}" for i in range(80)]


def test_shards_of_another_encoding_are_refused_by_name(tmp_path: Path):
    write(tmp_path, 0, 5, key="another")
    with pytest.raises(UserError, match=r"shards of another encoding \(part-000000.*another folder"):
        list(stored_clips(str(tmp_path), "key"))


def test_a_shard_that_is_no_parquet_is_named(tmp_path: Path):
    write(tmp_path, 0, 5)
    (file,) = shard_files(str(tmp_path))
    Path(file).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="can't be read.*Delete it"):
        list(stored_clips(str(tmp_path), "key"))


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path: Path):
    write(tmp_path, 0, 5)
    left = tmp_path / "bucket=1x8x8" / ".unfinished-part-000001.parquet"
    left.write_bytes(b"half a shard")
    assert ids(tmp_path) == [f"{i:05d}" for i in range(5)]
    remove_unfinished(str(tmp_path))
    assert not left.exists()
    assert len(ids(tmp_path)) == 5


def test_a_clip_in_two_shards_is_dropped_from_the_second(tmp_path: Path):
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 8)
    sync_index(str(tmp_path), "key")
    assert drop_repeats(str(tmp_path), "key") == 2
    first, second = (info.path for info in list_shards(str(tmp_path)))
    assert {file: rows.tolist() for file, rows in dropped_rows(str(tmp_path)).items()} == {second: [0, 1]}
    assert ids(tmp_path) == [f"{i:05d}" for i in range(8)]
    assert drop_repeats(str(tmp_path), "key") == 0
    assert count_clips(str(tmp_path)) == {"1x8x8": 8}
    assert first < second


def test_a_second_run_is_kept_off_the_same_folder(tmp_path: Path):
    with (
        run_lock(str(tmp_path), "sora prep"),
        pytest.raises(UserError, match="another `sora prep` is running"),
        run_lock(str(tmp_path), "sora prep"),
    ):
        pass
    with run_lock(str(tmp_path), "sora prep"):
        pass


def rows_saved(folder: Path) -> set[str]:
    return {
        str(row)
        for table in load_progress(str(folder), "settings").sources(["row_id"])
        for row in table["row_id"].to_pylist()
    }


def test_a_source_is_saved_once_all_its_clips_are_written(tmp_path: Path):
    commits = Commits(str(tmp_path), "key", "settings")
    commits.records = {"a": SourceRecord("a.mp4", 1, "v", ["1", "2"]), "b": SourceRecord("b.mp4", 1, "v", ["3"])}
    commits.save_sources(QUARANTINE_SCHEMA.empty_table(), {"2"})
    assert rows_saved(tmp_path) == {"b"}
    commits.save_sources(QUARANTINE_SCHEMA.empty_table(), set())
    assert rows_saved(tmp_path) == {"a", "b"}
