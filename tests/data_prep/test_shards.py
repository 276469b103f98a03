"""Shards are complete, have full row groups, and hold each clip once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.resume import SavedProgress, SourceRecord, save_progress
from data_prep.shards import (
    next_number,
    pick_rows,
    read_stored_clips,
    remove_unfinished,
    shard_name,
    write_shard,
)
from data_prep.sink import save_interval_s
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


def test_saved_progress_is_loaded_for_the_same_settings_only(tmp_path: Path):
    failures = [failure("s", "corrupt"), failure("t", "timeout"), failure("u", "duplicate", "v")]
    records = {"row": SourceRecord("a.mp4", 5, "7", ["s", "t", "u", "v"])}
    save_progress(str(tmp_path), "settings", records, failures)
    saved = SavedProgress.load(str(tmp_path), "settings")
    assert saved.records == records
    assert saved.permanent_failure("s", {"v"}) == failures[0]
    assert saved.permanent_failure("t", {"v"}) is None, "what may go better next time is tried again"
    assert saved.permanent_failure("u", {"v"}) == failures[2]
    assert saved.permanent_failure("u", set()) is None, "the clip it was a duplicate of is gone"
    assert SavedProgress.load(str(tmp_path), "others") == SavedProgress()
    assert SavedProgress.load(str(tmp_path / "nowhere"), "settings") == SavedProgress()
    (tmp_path / "quarantine.parquet").write_bytes(b"no parquet")
    assert SavedProgress.load(str(tmp_path), "settings").failures == {}


def test_loading_saved_progress_leaves_no_thread_behind(tmp_path: Path):
    save_progress(str(tmp_path), "settings", {"row": SourceRecord("a.mp4", 5, "7", ["s"])}, [failure("s", "corrupt")])
    code = (
        "from pathlib import Path\n"
        "from data_prep.resume import SavedProgress\n"
        "def threads(): return {t.name for t in Path('/proc/self/task').iterdir()"
        " if not (t / 'comm').read_text().startswith('jemalloc')}\n"
        "before = threads()\n"
        f"assert SavedProgress.load({str(tmp_path)!r}, 'settings').failures\n"
        "assert threads() == before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_saving_progress_takes_a_twentieth_of_the_time_at_most():
    now, last, saving = 0.0, 0.0, 0.0
    while now < 1e6:  # seconds, while progress grows and saving takes a thousandth of them
        last = now / 1000
        saving += last
        now += last + save_interval_s(last)
    assert last > 900
    assert saving / now < 0.05
    assert save_interval_s(0.1) == 30
