"""The index agrees with the shards after every kill, deletion and damage, and drops clips without rewriting them."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import commits
from data_prep.inspect.check import check_shards
from data_prep.inspect.table import format_table, inspect
from data_prep.resume import SourceRecord
from data_prep.shard_index import drop_rows, stored_clips, sync_index
from data_prep.shards import write_shard
from data_prep.sources import row_id
from data_prep.stored import count_clips
from sora_train.errors import UserError
from sora_train.index import CLIPS, KINDS, SOURCES, append, compact, pieces, read
from sora_train.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, encode_row, shard_files
from sora_train.storage import resolve

A, B, C = (f"bucket=1x8x8/part-00000{i}-{name}.parquet" for i, name in enumerate("abc"))


def write(folder: str, name: str, start: int, stop: int, key: str = "key") -> None:
    rows = [
        encode_row(
            sample_id=f"{i:05d}", source=f"{i // 3}.mp4", source_size=i, source_version="v", content_hash=f"c{i}",
            start_s=0.5, end_s=1.0, captions=[f"clip {i}"], latents=np.full(4, i), text=[np.zeros((1, 4))],
        )
        for i in range(start, stop)
    ]  # fmt: skip
    system, path = resolve(folder)
    write_shard(system, f"{path}/{name}", key, [pa.Table.from_pylist(rows, SHARD_SCHEMA)])


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three shards of 40, 5 and 10 clips."""
    for name, start, stop in ((A, 0, 40), (B, 40, 45), (C, 45, 55)):
        write(str(tmp_path), name, start, stop)
    return str(tmp_path)


def clips(folder: str) -> pa.Table:
    table = pa.concat_tables([CLIPS.empty_table(), *stored_clips(folder, "key")])
    return table.set_column(12, "shard", table["shard"].cast(pa.string())).sort_by("sample_id").combine_chunks()


def indexed(folder: str) -> list[str]:
    """Sorted ids of all clips in the index."""
    return sorted(name for table in read(folder, "clips", ["sample_id"]) for name in table["sample_id"].to_pylist())


def one_row(schema: pa.Schema) -> pa.Table:
    return pa.table([pa.nulls(1, kind) for kind in schema.types], schema=schema)


def ids(*numbers: int) -> list[str]:
    return [f"{i:05d}" for i in numbers]


def test_clips_are_the_same_from_the_shards_and_from_the_index(folder: str):
    before = clips(folder)
    assert before["sample_id"].to_pylist() == ids(*range(55))
    assert before["row"].to_pylist() == [*range(40), *range(5), *range(10)]
    assert before["row_id"][41].as_py() == row_id("13.mp4", ("clip 41",))
    sync_index(folder, "key")
    assert clips(folder).equals(before)
    assert indexed(folder) == ids(*range(55))
    made = [piece.name for piece in pieces(folder, "clips")]
    sync_index(folder, "key")
    assert [piece.name for piece in pieces(folder, "clips")] == made, "nothing is to be added"


def test_the_index_follows_the_shards(folder: str):
    sync_index(folder, "key")
    Path(folder, B).unlink()
    write(folder, C, 60, 63)  # other clips under a name that is known
    write(folder, "bucket=2x8x8/part-000009-d.parquet", 70, 71)
    present = ids(*range(40), 60, 61, 62, 70)
    assert clips(folder)["sample_id"].to_pylist() == present
    sync_index(folder, "key")
    assert clips(folder)["sample_id"].to_pylist() == present
    assert sorted(indexed(folder)) == sorted([*present, *ids(*range(40, 45))]), "rows of a deleted shard are ignored"


@pytest.mark.parametrize("kept", ["clips", "shards"])
def test_a_kill_between_the_appends_of_a_commit_is_healed(folder: str, kept: str, tmp_path: Path):
    before = clips(folder)
    sync_index(folder, "key")
    for file in (tmp_path / "index" / ("shards" if kept == "clips" else "clips")).iterdir():
        file.unlink()
    assert clips(folder).equals(before)
    sync_index(folder, "key")
    assert clips(folder).equals(before)
    assert indexed(folder) == ids(*range(55)), "no clip is there twice"


def test_clips_that_are_indexed_twice_or_in_part_are_read_from_their_shard(folder: str):
    before = clips(folder)
    sync_index(folder, "key")
    (table,) = read(folder, "clips")
    append(folder, "clips", table.slice(40, 3))
    append(folder, "clips", table.slice(2, 1))
    assert clips(folder).equals(before)
    sync_index(folder, "key")
    assert indexed(folder) == ids(*range(55))


@pytest.mark.parametrize("kind", ["clips", "shards"])
def test_a_damaged_piece_is_replaced(folder: str, kind, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = clips(folder)
    sync_index(folder, "key")
    write(folder, "bucket=1x8x8/part-000009-d.parquet", 70, 75)
    sync_index(folder, "key")
    first = sorted((tmp_path / "index" / kind).iterdir())[0]
    first.write_bytes(first.read_bytes()[:-10])
    assert clips(folder)["sample_id"].to_pylist() == before["sample_id"].to_pylist() + ids(*range(70, 75))
    sync_index(folder, "key")
    caplog.clear()
    assert clips(folder)["sample_id"].to_pylist() == before["sample_id"].to_pylist() + ids(*range(70, 75))
    assert not caplog.text
    assert not first.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "flipped byte"])
def test_check_names_a_damaged_piece_and_prep_replaces_it(folder: str, kind, cut: bool, tmp_path: Path):
    sync_index(folder, "key")
    append(folder, "sources", one_row(SOURCES))
    append(folder, "failures", one_row(QUARANTINE_SCHEMA))
    check_shards(folder)
    (piece,) = (tmp_path / "index" / kind).iterdir()
    content = bytearray(piece.read_bytes())
    column = pq.read_metadata(piece).row_group(0).column(0)
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    piece.write_bytes(content[:-9] if cut else content)
    with pytest.raises(UserError, match=f"damaged: {piece}. Run `sora prep` again"):
        check_shards(folder)
    sync_index(folder, "key")
    assert not piece.exists()
    check_shards(folder)
    assert indexed(folder) == clips(folder)["sample_id"].to_pylist() == ids(*range(55))


def test_check_names_shards_that_the_index_describes_otherwise(folder: str, tmp_path: Path, capsys):
    sync_index(folder, "key")
    drop_rows(folder, {A: [0]})
    write(folder, "bucket=1x8x8/part-000009-d.parquet", 70, 75)
    check_shards(folder)
    assert "the index does not describe bucket=1x8x8/part-000009-d.parquet;" in capsys.readouterr().out
    size = (tmp_path / B).stat().st_size
    write(folder, B, 46, 51)
    assert (tmp_path / B).stat().st_size == size
    with pytest.raises(UserError, match=f"describes {B} otherwise than they are. Delete {tmp_path}/index and run"):
        check_shards(folder)
    shutil.rmtree(tmp_path / "index")
    sync_index(folder, "key")
    check_shards(folder)


def test_a_dropped_clip_is_gone_while_its_shard_stays(folder: str):
    sync_index(folder, "key")
    files = {file: Path(file).read_bytes() for file in shard_files(folder)}
    drop_rows(folder, {A: [3, 39], C: [0]})
    drop_rows(folder, {A: [0]})
    left = ids(*(i for i in range(55) if i not in (0, 3, 39, 45)))
    assert clips(folder)["sample_id"].to_pylist() == left
    assert count_clips(folder).total() == len(left)
    sync_index(folder, "key")
    compact(folder, "shards", grace_s=0.0)
    assert clips(folder)["sample_id"].to_pylist() == left
    assert {file: Path(file).read_bytes() for file in shard_files(folder)} == files


def test_dropped_rows_survive_the_repair_of_their_shards_clips(folder: str, tmp_path: Path):
    sync_index(folder, "key")
    drop_rows(folder, {A: [1]})
    for file in (tmp_path / "index" / "clips").iterdir():
        file.unlink()
    sync_index(folder, "key")
    assert clips(folder)["sample_id"].to_pylist() == ids(0, *range(2, 55))


def test_a_shard_without_a_clip_left_is_deleted(folder: str):
    sync_index(folder, "key")
    drop_rows(folder, {B: [0, 1, 2], A: [7]})
    assert len(shard_files(folder)) == 3
    drop_rows(folder, {B: [3, 4]})
    assert [file[len(folder) + 1 :] for file in shard_files(folder)] == [A, C]
    assert clips(folder)["sample_id"].to_pylist() == ids(*range(7), *range(8, 40), *range(45, 55))


def test_a_long_run_merges_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commits, "MAX_PIECES", 4)
    run = commits.Commits(str(tmp_path), "key", "settings")
    for i in range(18):
        run.records[str(i)] = SourceRecord("a.mp4", 1, "v", [f"{i:05d}"])
        run.save_sources(QUARANTINE_SCHEMA.empty_table(), ())
    assert len(pieces(str(tmp_path), "sources")) == 3
    assert [row for table in read(str(tmp_path), "sources") for row in table["row_id"].to_pylist()] == [
        *map(str, range(18))
    ]


def test_indexed_shards_of_another_encoding_are_refused_by_name(folder: str):
    sync_index(folder, "key")
    with pytest.raises(UserError, match=r"shards of another encoding \(part-000000-a.*: the VAE\. .*another folder"):
        list(stored_clips(folder, "other", "the VAE"))


def test_an_index_in_a_bucket_follows_its_shards(s3: str):
    folder = f"{s3}/shards"
    for name, start, stop in ((A, 0, 40), (B, 40, 45)):
        write(folder, name, start, stop)
    sync_index(folder, "key")
    drop_rows(folder, {A: [3], B: [0, 1, 2, 3, 4]})
    assert clips(folder)["sample_id"].to_pylist() == ids(0, 1, 2, *range(4, 40))
    assert len(shard_files(folder)) == 1


def test_a_parquet_file_that_is_no_shard_is_to_be_moved_away(folder: str):
    pq.write_table(pa.table({"a": [1]}), f"{folder}/{Path(A).parent}/mine.parquet")
    with pytest.raises(UserError, match=r"mine\.parquet is not a shard: .* Move it out of the folder"):
        sync_index(folder, "key")


def test_inspect_counts_dropped_clips_apart(folder: str):
    sync_index(folder, "key")
    drop_rows(folder, {A: [0, 3]})
    counts = inspect(folder)
    assert (counts["written"], counts["dropped"]) == (53, 2)
    assert "2 clips more are in the shards and no longer count" in format_table(counts)
