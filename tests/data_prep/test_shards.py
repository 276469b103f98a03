"""Shards are complete, have full row groups, and hold each clip once."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.commits import Commits
from data_prep.resume import SavedProgress, SourceRecord
from data_prep.shard_index import sync_index
from data_prep.shards import (
    next_number,
    pick_rows,
    read_stored_clips,
    remove_unfinished,
    shard_name,
    write_shard,
)
from data_prep.sources import row_id
from data_prep.writers import Shard
from sora_train import index
from sora_train.errors import UserError
from sora_train.locks import run_lock
from sora_train.schema import SHARD_SCHEMA, encode_row, shard_files
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
    clips, twice = read_stored_clips(str(folder), "key")
    assert not twice
    return list(clips)


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
        read_stored_clips(str(tmp_path), "key")


def test_a_shard_that_is_no_parquet_is_named(tmp_path: Path):
    write(tmp_path, 0, 5)
    (file,) = shard_files(str(tmp_path))
    Path(file).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="can't be read.*Delete it"):
        read_stored_clips(str(tmp_path), "key")


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path: Path):
    write(tmp_path, 0, 5)
    left = tmp_path / "bucket=1x8x8" / ".unfinished-part-000001.parquet"
    left.write_bytes(b"half a shard")
    assert ids(tmp_path) == [f"{i:05d}" for i in range(5)]
    remove_unfinished(str(tmp_path))
    assert not left.exists()
    assert len(ids(tmp_path)) == 5


def test_a_clip_in_two_shards_is_reported(tmp_path: Path):
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 8)
    clips, twice = read_stored_clips(str(tmp_path), "key")
    assert len(clips) == 8
    assert list(twice.values()) == [{"00003", "00004"}]
    assert next(iter(twice)) == shard_files(str(tmp_path))[1]


def test_a_second_run_is_kept_off_the_same_folder(tmp_path: Path):
    with (
        run_lock(str(tmp_path), "sora prep"),
        pytest.raises(UserError, match="another `sora prep` is running"),
        run_lock(str(tmp_path), "sora prep"),
    ):
        pass
    with run_lock(str(tmp_path), "sora prep"):
        pass


def failure(sample: str, reason: str, duplicate_of: str = "") -> dict:
    file = {"source": "a.mp4", "source_size": 5, "source_version": "7", "start_s": 0.0, "end_s": 1.0}
    why = {"stage": "decode", "reason": reason, "message": "m", "kind": "quarantined", "duplicate_of": duplicate_of}
    return {"sample_id": sample} | file | why


def save(folder: Path, records: dict[str, SourceRecord], failures: list[dict]) -> None:
    commits = Commits(str(folder), "key", "settings")
    commits.records = dict(records)
    commits.save_sources(failures, set())


def test_saved_progress_is_loaded_for_the_same_settings_only(tmp_path: Path):
    failures = [failure("s", "corrupt"), failure("t", "timeout"), failure("u", "duplicate", "v")]
    records = {"row": SourceRecord("a.mp4", 5, "7", ["s", "t", "u", "v"])}
    save(tmp_path, records, failures)
    saved = SavedProgress.load(str(tmp_path), "settings")
    assert saved.records == records
    assert saved.permanent_failure("s", records["row"], {"v"}) == failures[0]
    assert saved.permanent_failure("t", records["row"], {"v"}) is None, "what may go better next time is tried again"
    assert saved.permanent_failure("u", records["row"], {"v"}) == failures[2]
    assert saved.permanent_failure("u", records["row"], set()) is None, "the clip it was a duplicate of is gone"
    other = SourceRecord("a.mp4", 5, "8", ["s"])
    assert saved.permanent_failure("s", other, {"v"}) is None, "it failed in another version of the file"
    assert SavedProgress.load(str(tmp_path), "others") == SavedProgress()
    assert SavedProgress.load(str(tmp_path / "nowhere"), "settings") == SavedProgress()
    later = {"row": SourceRecord("a.mp4", 6, "8", ["s"]), "more": SourceRecord("b.mp4", 1, "7", ["x"])}
    save(tmp_path, later, [])
    assert SavedProgress.load(str(tmp_path), "settings").records == later


def test_a_source_is_saved_once_all_its_clips_are_written(tmp_path: Path):
    commits = Commits(str(tmp_path), "key", "settings")
    commits.records = {"a": SourceRecord("a.mp4", 1, "v", ["1", "2"]), "b": SourceRecord("b.mp4", 1, "v", ["3"])}
    commits.save_sources([], {"2"})
    assert list(SavedProgress.load(str(tmp_path), "settings").records) == ["b"]
    commits.save_sources([], set())
    assert set(SavedProgress.load(str(tmp_path), "settings").records) == {"a", "b"}


def test_loading_saved_progress_leaves_no_thread_behind(tmp_path: Path):
    save(tmp_path, {"row": SourceRecord("a.mp4", 5, "7", ["s"])}, [failure("s", "corrupt")])
    code = (
        "from pathlib import Path\n"
        "from data_prep.resume import SavedProgress\n"
        "def threads(): return {t.name for t in Path('/proc/self/task').iterdir()"
        " if not (t / 'comm').read_text().startswith('jemalloc')}\n"
        "before = threads()\n"
        f"assert SavedProgress.load({str(tmp_path)!r}, 'settings').failures\n"
        "import time\n"
        "ends = time.monotonic() + 10\n"
        "while threads() != before and time.monotonic() < ends: time.sleep(0.05)\n"  # a joined thread takes a moment
        "assert threads() == before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
