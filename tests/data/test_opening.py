"""A folder opens from its index as it does from the footers, whatever the index lacks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train.data import opening
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.index import CLIPS, SHARDS, append, clip_rows, read, shard_row
from sora_train.schema import shard_files

BUCKET, IMAGES = "3x16x24", (1, 16, 24)


def index_of(folder: str, dropped: dict[str, list[int]] | None = None, skip: int = 0) -> None:
    """Indexes all shards but the first `skip`, with rows dropped by the shard's file name."""
    rows, tables = [], [CLIPS.empty_table()]
    for file in shard_files(folder)[skip:]:
        name, table, footer = file[len(folder) + 1 :], pq.read_table(file, partitioning=None), pq.read_metadata(file)
        groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        row = shard_row(name, Path(file).stat().st_size, "e1", groups, table["source"].to_pylist())
        rows.append(row | {"dropped": (dropped or {}).get(Path(file).name, [])})
        tables.append(clip_rows(table, name, ["r"] * len(table)))
    append(folder, "shards", pa.Table.from_pylist(rows, SHARDS))
    append(folder, "clips", pa.concat_tables(tables))


def described(shards: ShardSet) -> tuple:
    """All that training sees of a split."""
    order = shards.sample_order(7, seed=3)
    ids = {bucket: shards.sample_ids(bucket, range(rows)) for bucket, rows in shards.rows.items()}
    return shards.rows, order, shards.fingerprint, ids, {name: shards.all_sample_ids(name) for name in shards.rows}


@pytest.fixture
def folder(make_shards) -> str:
    """Two buckets, one with row groups of two sizes; an empty shard; sources across shards."""
    make_shards(40, 7, start=300, bucket=IMAGES)
    return make_shards(70, 33, 0, 5, 64, row_group=16)


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "train"), (0.3, "train"), (0.3, "holdout"), (0.9, "train")])
def test_the_index_changes_nothing_that_training_sees(folder: str, fraction: float, split, monkeypatch):
    before = described(ShardSet(folder, fraction, split))
    index_of(folder, skip=3)  # the first three shards are read from their footers
    assert described(ShardSet(folder, fraction, split)) == before
    index_of(folder)
    monkeypatch.setattr(opening, "_read_shard", None)  # no footer is read
    assert described(ShardSet(folder, fraction, split)) == before
    monkeypatch.setattr(opening, "BLOCK_ROWS", 20)
    shards = ShardSet(folder, fraction, split)
    assert described(shards) == before
    assert described(ShardSet(folder, fraction, split, listed=shards.listed)) == before, "another process has listed it"


def test_columns_do_not_depend_on_the_order_of_the_indexs_rows(folder: str):
    names = ["sample_id", "source", "start_s"]
    wanted = {split: ShardSet(folder, 0.3, split).columns(BUCKET, names) for split in ("train", "holdout")}
    index_of(folder)
    everything = pa.concat_tables(read(folder, "clips"))
    random = np.random.default_rng(0).permutation(len(everything))
    tables = {
        "none": everything.slice(0, 0),
        "other shards first": pa.concat_tables([everything.slice(100), everything.slice(0, 100)]),
        "scattered": everything.take(random),
        "without a clip": pa.concat_tables([everything.slice(0, 75), everything.slice(76)]),
        "a clip twice": pa.concat_tables([everything, everything.slice(75, 1)]),
    }
    for what, table in tables.items():
        for file in (Path(folder) / "index" / "clips").iterdir():
            file.unlink()
        append(folder, "clips", table)
        for split in ("train", "holdout"):
            assert ShardSet(folder, 0.3, split).columns(BUCKET, names).equals(wanted[split]), what


def test_a_shard_of_another_size_and_a_deleted_one_are_not_taken_from_the_index(folder: str, make_shards):
    index_of(folder)
    files = [Path(file) for file in shard_files(folder)]
    files[0].unlink()
    files[3].write_bytes(files[2].read_bytes())  # another content under the name of one in the index
    with_index = described(ShardSet(folder, 0.3))
    for file in (Path(folder) / "index").glob("*/*"):
        file.unlink()
    assert described(ShardSet(folder, 0.3)) == with_index


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "train"), (0.3, "train"), (0.3, "holdout")])
def test_dropped_rows_are_in_no_split(folder: str, fraction: float, split):
    dropped = {"0000.parquet": [0, 39, 5], "0001.parquet": [1], "0003.parquet": [0, 1, 2, 3, 4]}
    whole = ShardSet(folder, fraction, split)
    gone = {
        f"{start + row:08x}"
        for name, starts in (("0000.parquet", (0, 300)), ("0001.parquet", (70, 340)), ("0003.parquet", (103,)))
        for start in starts
        for row in dropped[name]
    }
    wanted = {bucket: [i for i in whole.all_sample_ids(bucket) if i not in gone] for bucket in whole.rows}
    index_of(folder, dropped)
    left = ShardSet(folder, fraction, split)
    assert described(left)[3] == described(left)[4] == wanted
    bucket = BUCKET
    assert left.read(bucket, range(left.rows[bucket])).sample_ids == wanted[bucket]
    assert left.fingerprint != whole.fingerprint


def test_a_folder_whose_clips_are_all_dropped_is_refused(make_shards):
    folder = make_shards(4)
    index_of(folder, {"0000.parquet": [0, 1, 2, 3]})
    with pytest.raises(UserError, match="0 clips"):
        ShardSet(folder)


def test_a_damaged_index_costs_time_and_nothing_else(folder: str, caplog: pytest.LogCaptureFixture):
    before = described(ShardSet(folder, 0.3))
    index_of(folder)
    for file in (Path(folder) / "index").glob("*/*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert described(ShardSet(folder, 0.3)) == before
    assert "this piece of the index is damaged and ignored" in caplog.text


def test_an_indexed_shard_of_another_encoding_is_refused_by_name(make_shards):
    folder = make_shards(3, encoding_hash="e2")
    index_of(folder)  # which says e1
    with pytest.raises(UserError, match=r"0000.parquet has the encoding e1, .* e2"):
        ShardSet(folder)


def test_a_hash_at_the_border_is_held_out_as_by_whole_numbers():
    for fraction in (0.1, 0.3, 1 / 3, 2**-60, 0.999999):
        border = int(fraction * 2**64)
        hashes = [max(0, border - 1), border, border + 1, 0, 2**64 - 1]
        found = opening.held_out_rows(np.array(hashes, np.uint64), fraction)
        assert found.tolist() == [value < fraction * 2**64 for value in hashes]


def test_a_bucket_opens_from_its_index(make_shards, s3: str):
    import pyarrow.fs as fs

    local = make_shards(40, 9)
    index_of(local)
    fs.copy_files(local, f"{s3}/shards")
    assert described(ShardSet(f"{s3}/shards", 0.3)) == described(ShardSet(local, 0.3))
