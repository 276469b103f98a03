"""The index: what was appended is read in order, whatever was merged, killed or damaged in between."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train import index
from sora_train.data.order import stable_hash
from sora_train.index import CLIPS, KINDS, SHARDS, append, clip_rows, compact, last_rows, pieces, read, shard_row
from sora_train.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, encode_row, holdout_hash


def failures(*numbers: int) -> pa.Table:
    """A row of the quarantine for each number, which is its `sample_id`."""
    empty = dict.fromkeys(QUARANTINE_SCHEMA.names)
    return pa.Table.from_pylist([empty | {"sample_id": str(number)} for number in numbers], QUARANTINE_SCHEMA)


def shards(*rows: tuple[str, int]) -> pa.Table:
    return pa.Table.from_pylist([shard_row(name, size, "e", [2, 1], ["a", "b", "b"]) for name, size in rows], SHARDS)


def ids(folder: Path | str, **how) -> list[int]:
    return [int(name) for table in read(str(folder), "failures", **how) for name in table["sample_id"].to_pylist()]


def files(folder: Path, kind: str = "failures") -> list[Path]:
    return sorted((folder / "index" / kind).iterdir())


def test_every_kind_is_read_as_it_was_appended(tmp_path: Path):
    clip = encode_row(
        sample_id="s", source="a.mp4", source_size=7, source_version="v", content_hash="c", perceptual_hash="p",
        start_s=0.5, end_s=1.5, captions=["x", "y"], latents=np.zeros(4), text=[np.zeros((3, 4)), np.zeros((2, 4))],
    )  # fmt: skip
    source = {"row_id": "r", "source": "a", "source_size": 1, "source_version": "", "sample_ids": ["s"], "remarks": []}
    tables = {
        "clips": clip_rows(pa.Table.from_pylist([clip] * 3, SHARD_SCHEMA), "bucket=1x8x8/a.parquet", ["r"] * 3),
        "shards": shards(("a", 3), ("b", 4)),
        "sources": pa.Table.from_pylist([source], KINDS["sources"]),
        "failures": failures(1, 2),
    }
    for kind, table in tables.items():
        assert list(read(str(tmp_path), kind)) == []
        append(str(tmp_path), kind, table, {"settings_hash": "h"})
        assert pa.concat_tables(read(str(tmp_path), kind)).equals(table)
        assert pieces(str(tmp_path), kind)[0].metadata == {"settings_hash": "h"}
    assert tables["clips"].schema == CLIPS
    assert tables["clips"]["row"].to_pylist() == [0, 1, 2]
    assert tables["clips"]["tokens"][0].as_py() == [3, 2]
    assert next(read(str(tmp_path), "clips", columns=["source"])).column_names == ["source"]


def test_the_holdout_hash_is_that_of_the_sample_order(tmp_path: Path):
    assert all(holdout_hash(name) == stable_hash("holdout", name) for name in ("", "a.mp4", "ä/ö.mp4"))
    assert shard_row("a", 1, "e", [2], ["x", "y"])["holdout"] == [holdout_hash("x"), holdout_hash("y")]


def test_pieces_are_read_in_the_order_in_which_they_were_appended(tmp_path: Path):
    for number in range(12):
        append(str(tmp_path), "failures", failures(number))
    append(str(tmp_path), "failures", failures())
    assert len(files(tmp_path)) == 12, "no rows make no piece"
    assert ids(tmp_path) == list(range(12))


def test_only_pieces_with_the_metadata_asked_for_are_read(tmp_path: Path):
    for number, key in enumerate("abba"):
        append(str(tmp_path), "failures", failures(number), {"settings_hash": key})
    assert ids(tmp_path, metadata={"settings_hash": "a"}) == [0, 3]
    compact(str(tmp_path), "failures", grace_s=0.0)
    assert len(files(tmp_path)) == 3, "pieces of other settings are not merged"
    assert ids(tmp_path) == [0, 1, 2, 3]
    assert ids(tmp_path, metadata={"settings_hash": "b"}) == [1, 2]


def test_compaction_keeps_rows_order_and_the_numbers_of_later_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(6):
        append(str(tmp_path), "failures", failures(number))
    size = files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(index, "PIECE_BYTES", 3 * size + 20)
    compact(str(tmp_path), "failures", above=6)
    assert len(files(tmp_path)) == 6, "there are not more than 6"
    for number in range(6, 30):
        compact(str(tmp_path), "failures", grace_s=0.0)
        append(str(tmp_path), "failures", failures(number))
        assert ids(tmp_path) == list(range(number + 1))
    compact(str(tmp_path), "failures", grace_s=0.0)
    assert len(files(tmp_path)) < 20


def test_a_kill_between_the_two_halves_of_a_compaction_changes_nothing(tmp_path: Path):
    for number in range(4):
        append(str(tmp_path), "failures", failures(number))
    compact(str(tmp_path), "failures")  # the new piece is written, none is deleted yet
    assert len(files(tmp_path)) == 5
    assert ids(tmp_path) == [0, 1, 2, 3]
    append(str(tmp_path), "failures", failures(4))
    compact(str(tmp_path), "failures")  # and again: what was replaced stays replaced
    assert len(files(tmp_path)) == 7
    assert ids(tmp_path) == [0, 1, 2, 3, 4]
    files(tmp_path)[1].unlink()  # a kill within the deletion
    compact(str(tmp_path), "failures", grace_s=0.0)
    assert len(files(tmp_path)) == 1
    assert ids(tmp_path) == [0, 1, 2, 3, 4]


def test_a_reader_that_began_before_a_compaction_ends_well(tmp_path: Path):
    for number in range(3):
        append(str(tmp_path), "failures", failures(number))
    tables = read(str(tmp_path), "failures")
    found = [next(tables)]
    compact(str(tmp_path), "failures")
    found += tables
    assert pa.concat_tables(found)["sample_id"].to_pylist() == ["0", "1", "2"]


def test_the_last_row_of_a_shard_survives_a_compaction(tmp_path: Path):
    for rows in ([("a", 1), ("b", 2)], [("b", 3)], [("c", 4), ("a", 5), ("c", 6)]):
        append(str(tmp_path), "shards", shards(*rows))
    wanted = [("b", 3), ("a", 5), ("c", 6)]
    everything = pa.concat_tables(read(str(tmp_path), "shards"))
    for table in (last_rows(everything, "shard"), None):
        if table is None:
            compact(str(tmp_path), "shards", grace_s=0.0)
            (table,) = read(str(tmp_path), "shards")
        assert list(zip(table["shard"].to_pylist(), table["bytes"].to_pylist(), strict=True)) == wanted
    compact(str(tmp_path), "shards", above=0, grace_s=0.0)
    assert len(files(tmp_path, "shards")) == 1


def test_rows_may_be_filtered_as_pieces_are_merged(tmp_path: Path):
    for number in range(4):
        append(str(tmp_path), "failures", failures(number, number + 10))
    compact(str(tmp_path), "failures", keep=lambda table: table.slice(1), grace_s=0.0)
    assert ids(tmp_path) == [10, 11, 12, 13]


def test_unfinished_and_foreign_files_are_ignored(tmp_path: Path):
    append(str(tmp_path), "failures", failures(0))
    for name in (".unfinished-abc-00000001-abc.index", "notes.txt", "00000001-abc.parquet"):
        (tmp_path / "index" / "failures" / name).write_bytes(b"half a piece")
    assert ids(tmp_path) == [0]


def test_a_damaged_piece_is_skipped_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(3):
        append(str(tmp_path), "failures", failures(number))
    file = files(tmp_path)[1]
    content = file.read_bytes()
    for wrong in (b"", content[:-5], content[:40], b"no parquet"):
        file.write_bytes(wrong)
        caplog.clear()
        assert ids(tmp_path) == [0, 2]
        assert f"{file}: this piece of the index is damaged and ignored" in caplog.text
    pq.write_table(pa.table({"sample_id": ["1"]}), file)
    assert ids(tmp_path) == [0, 2], "a piece of another version has other columns"


def test_a_flipped_byte_gives_the_same_rows_or_none(tmp_path: Path):
    table = failures(*range(50))
    append(str(tmp_path), "failures", table)
    (file,) = files(tmp_path)
    content, lost = file.read_bytes(), 0
    for place in range(4, len(content), 53):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        found = list(read(str(tmp_path), "failures", columns=["sample_id"]))
        lost += not found
        assert all(part["sample_id"].equals(table["sample_id"]) for part in found)
    assert lost > 5


def test_row_groups_bound_what_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index, "GROUP_VALUES", 7)
    append(str(tmp_path), "failures", failures(*range(20)))
    assert [len(table) for table in read(str(tmp_path), "failures")] == [7, 7, 6]
    append(str(tmp_path), "shards", shards(*((str(i), i) for i in range(5))))  # of three rows each
    assert [len(table) for table in read(str(tmp_path), "shards")] == [2, 2, 1]


def test_an_index_in_a_bucket_is_appended_read_and_compacted(s3: str):
    folder = f"{s3}/out/shards"
    assert ids(folder) == []
    for number in range(5):
        append(folder, "failures", failures(number))
    assert ids(folder) == list(range(5))
    compact(folder, "failures")
    assert ids(folder) == list(range(5))
    compact(folder, "failures", above=0, grace_s=0.0)
    assert len(pieces(folder, "failures")) == 1
    assert ids(folder) == list(range(5))
