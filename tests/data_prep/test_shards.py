"""Shards are written whole, hold whole row groups, and lose only what is taken out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.inspect import format_table, inspect
from data_prep.shards import ShardWriter, finished_clips, known_failures, sweep, take_out, write_quarantine
from sora_train.errors import UserError
from sora_train.schema import SHARD_SCHEMA, encode_row, shard_files


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
    writer = ShardWriter(str(folder), "1x8x8", key)
    for at in range(start, stop, 10):
        writer.add(table(at, min(stop, at + 10)))
    writer.close()


def ids(folder: Path) -> list[str]:
    return [sample for clips in finished_clips(str(folder), "key").values() for sample in clips]


def test_rows_keep_their_order_in_several_shards_of_small_row_groups(tmp_path: Path):
    write(tmp_path, 0, 600)
    files = shard_files(str(tmp_path))
    assert len(files) == 3
    assert ids(tmp_path) == [f"{i:05d}" for i in range(600)]
    groups = [
        pq.read_metadata(file).row_group(g).num_rows
        for file in files
        for g in range(pq.read_metadata(file).num_row_groups)
    ]
    assert groups == [32] * 18 + [24]


def test_a_second_run_writes_behind_the_first(tmp_path: Path):
    write(tmp_path, 0, 50)
    write(tmp_path, 50, 80)
    assert ids(tmp_path) == [f"{i:05d}" for i in range(80)]


def test_what_is_taken_out_is_gone_and_the_rest_stays(tmp_path: Path):
    write(tmp_path, 0, 50)
    (file,) = shard_files(str(tmp_path))
    before = pq.read_table(file)
    take_out(str(tmp_path), file, {"00003", "00049"})
    after = pq.read_table(file)
    kept = [i for i in range(50) if i not in (3, 49)]
    assert after.equals(before.take(kept))
    assert finished_clips(str(tmp_path), "key")[file]["00004"] == ("4.mp4", 4, "v")
    take_out(str(tmp_path), file, {f"{i:05d}" for i in range(50)})
    assert shard_files(str(tmp_path)) == []


def test_shards_of_another_encoding_are_refused_by_name(tmp_path: Path):
    write(tmp_path, 0, 5, key="another")
    with pytest.raises(UserError, match=r"shards of another encoding \(part-000000.*another folder"):
        finished_clips(str(tmp_path), "key")


def test_a_shard_that_is_no_parquet_is_named(tmp_path: Path):
    write(tmp_path, 0, 5)
    (file,) = shard_files(str(tmp_path))
    Path(file).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="can't be read.*delete it"):
        finished_clips(str(tmp_path), "key")


def test_what_a_killed_run_left_is_swept_away(tmp_path: Path):
    write(tmp_path, 0, 5)
    left = tmp_path / "bucket=1x8x8" / ".unfinished-part-000001.parquet"
    left.write_bytes(b"half a shard")
    assert ids(tmp_path) == [f"{i:05d}" for i in range(5)]
    sweep(str(tmp_path))
    assert not left.exists()
    assert len(ids(tmp_path)) == 5


def test_inspect_counts_shards_and_quarantine(tmp_path: Path):
    write(tmp_path, 0, 40)
    lost = {"sample_id": "s", "source": "a.mp4", "start_s": 0.0, "end_s": 1.0, "stage": "open", "message": "m"}
    write_quarantine(
        str(tmp_path),
        [lost | {"reason": "unreadable", "kind": "quarantined"}] * 2
        + [lost | {"reason": "too_short", "kind": "filtered"}],
        "key",
    )
    counts = inspect(str(tmp_path))
    assert counts == {
        "rows": 43, "written": 40, "quarantined": 2, "filtered": 1,
        "buckets": {"1x8x8": 40}, "reasons": {"too_short": 1, "unreadable": 2},
    }  # fmt: skip
    assert "unreadable" in format_table(counts)
    with pytest.raises(UserError, match="holds no shards"):
        inspect(str(tmp_path / "nowhere"))
    file = next((tmp_path / "bucket=1x8x8").glob("*.parquet"))
    with pytest.raises(UserError, match="is a file"):
        inspect(str(file))
    file.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=f"{file.name} can't be read .* delete it"):
        inspect(str(tmp_path))


def test_a_lasting_reason_is_known_again_for_the_same_file_and_encoding_alone(tmp_path: Path):
    common = {"source": "a.mp4", "source_size": 5, "source_version": "7", "message": "m", "kind": "quarantined"}
    reasons = {"s": "corrupt", "t": "timeout"}
    write_quarantine(str(tmp_path), [common | {"sample_id": i, "reason": r} for i, r in reasons.items()], "key")
    assert known_failures(str(tmp_path), "key") == {("s", 5, "7"): ("corrupt", "m")}
    assert known_failures(str(tmp_path), "another key") == {}
    assert known_failures(str(tmp_path / "nowhere"), "key") == {}
    (tmp_path / "quarantine.parquet").write_bytes(b"no parquet")
    assert known_failures(str(tmp_path), "key") == {}
