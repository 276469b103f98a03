"""`sora inspect` counts what is there, of the few columns that say so, and says what is broken."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.inspect.check import check_shards
from data_prep.inspect.previews import read_rows_at
from data_prep.inspect.table import format_table, inspect, min_median_max, read_inventory
from data_prep.shard_index import drop_rows, sync_index
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import QUARANTINE_SCHEMA, shard_files

LOST = {"source": "a.mp4", "stage": "open", "message": "no moov atom"}


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the tiny shards that a test may change."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def write_quarantine(folder: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, QUARANTINE_SCHEMA), folder / "quarantine.parquet")


def test_counts_and_lengths_are_those_of_the_rows(shards: Path):
    rows = pq.read_table(shards / "bucket=2x32x32" / "part.parquet").to_pylist()
    tokens = [count for row in rows for count in row["tokens"]]
    counts = inspect(str(shards))
    assert (counts["asked"], counts["written"], counts["quarantined"], counts["filtered"]) == (21, 21, 0, 0)
    assert counts["buckets"] == {"2x32x32": 21}
    assert counts["seconds"] == 21 * 0.25
    assert counts["clip_seconds"] == {"min": 0.25, "median": 0.25, "max": 0.25}
    assert counts["captions_of_a_clip"] == {"min": 1, "median": 1, "max": 1}
    assert counts["caption_words"] == {"min": 2, "median": 2, "max": 2}
    assert counts["caption_tokens"] == {"min": 1, "median": statistics.median(tokens), "max": 4}
    assert counts["captions_at_limit"] == round(tokens.count(4) / 21, 6)
    assert counts["bytes"] == (shards / "bucket=2x32x32" / "part.parquet").stat().st_size
    assert counts["settled"]
    assert json.loads(json.dumps(counts)) == counts


@given(st.lists(st.integers(-50, 50), min_size=1))
def test_the_median_is_that_of_the_standard_library(values: list[int]):
    assert min_median_max(np.array(values)) == {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def test_no_latent_is_read(shards: Path):
    file = shards / "bucket=2x32x32" / "part.parquet"
    counts, content, metadata = inspect(str(shards)), bytearray(file.read_bytes()), pq.read_metadata(file)
    for group in range(metadata.num_row_groups):
        for column in (metadata.row_group(group).column(i) for i in range(metadata.num_columns)):
            if column.path_in_schema.split(".")[0] in ("latents", "text"):
                start = column.dictionary_page_offset or column.data_page_offset
                content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    with pytest.raises(OSError, match="."):
        pq.read_table(file)
    assert inspect(str(shards)) == counts


def test_dropped_clips_are_not_counted_and_not_shown(shards: Path):
    sync_index(str(shards), "")  # they name no encoding
    drop_rows(str(shards), {"bucket=2x32x32/part.parquet": [0, 9, 20]})
    counts, inventory = inspect(str(shards)), read_inventory(str(shards))
    assert (counts["written"], counts["buckets"], counts["captions"]) == (18, {"2x32x32": 18}, 18)
    left = [f"{i:04x}" for i in range(21) if i not in (0, 9, 20)]
    for indices in (range(18), [0, 7, 8, 17]):
        shown = [row["sample_id"] for row in read_rows_at(inventory, "2x32x32", list(indices))]
        assert shown == [left[i] for i in indices]


def test_reasons_have_a_kind_a_count_and_an_example(shards: Path):
    bad = LOST | {"reason": "unreadable", "kind": "quarantined"}
    short = LOST | {"reason": "too_short", "kind": "filtered", "message": "lasts\n0.2 s \x1b[31m"}
    write_quarantine(shards, [bad, bad | {"source": "b.mp4"}, short])
    counts = inspect(str(shards))
    assert (counts["asked"], counts["quarantined"], counts["filtered"]) == (24, 2, 1)
    assert counts["reasons"] == {
        "quarantined": {"unreadable": {"clips": 2, "example": "a.mp4: no moov atom"}},
        "filtered": {"too_short": {"clips": 1, "example": "a.mp4: lasts 0.2 s [31m"}},
    }
    table = format_table(counts)
    assert "\x1b" not in table
    for words in ("asked", "unreadable", "too_short", "a.mp4: no moov atom"):
        assert words in table


def test_an_empty_bucket_that_the_recipe_asked_for_is_named(shards: Path):
    manifest = Manifest.load(str(shards))
    manifest.model_copy(update={"buckets": {"2x32x32": 21, "16x32x32": 0}}).save(str(shards))
    counts = inspect(str(shards))
    assert list(counts["buckets"].items()) == [("2x32x32", 21), ("16x32x32", 0)]
    assert "empty" in format_table(counts)


def test_what_else_stands_in_the_folder_is_no_shard(shards: Path):
    counts = inspect(str(shards))
    for name in ("sources.parquet", "bucket=2x32x32/.unfinished-part.parquet", "notes.parquet"):
        (shards / name).write_bytes(b"no parquet")
    assert inspect(str(shards)) == counts


def test_shards_of_an_unfinished_run_are_not_settled(shards: Path):
    (shards / "manifest.json").unlink()
    counts = inspect(str(shards))
    assert counts["written"] == 21
    assert not counts["settled"]
    assert counts["captions_at_limit"] is None
    assert "not the clips that manifest.json counts" in format_table(counts)


def test_a_folder_with_a_quarantine_alone_is_counted(tmp_path: Path):
    write_quarantine(tmp_path, [LOST | {"reason": "unreadable", "kind": "quarantined"}])
    counts = inspect(str(tmp_path))
    assert (counts["asked"], counts["written"]) == (1, 0)
    assert counts["clip_seconds"] is None
    assert "unreadable" in format_table(counts)


def test_what_can_not_be_read_is_named(shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no shards"):
        inspect(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="Its shards are in"):
        inspect(str(tmp_path))
    file = shards / "bucket=2x32x32" / "part.parquet"
    with pytest.raises(UserError, match="is a file"):
        inspect(str(file))
    pq.write_table(pa.table({"caption": ["of another tool"]}), file)
    with pytest.raises(UserError, match=r"part\.parquet is not a shard: .* Move it out of the folder"):
        inspect(str(shards))
    file.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"part\.parquet can't be read .* Delete it"):
        inspect(str(shards))
    file.unlink()
    (shards / "quarantine.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"quarantine\.parquet can't be read .* Delete it"):
        inspect(str(shards))


def test_a_folder_that_is_no_bucket_is_named(shards: Path):
    (shards / "bucket=2x32x32").rename(shards / "bucket=large")
    with pytest.raises(UserError, match="bucket=large is not a bucket FRAMESxHEIGHTxWIDTH"):
        inspect(str(shards))


def test_check_names_the_file_with_a_flipped_byte(shards: Path):
    file = Path(shard_files(str(shards))[0])
    pq.write_table(pq.read_table(file), file, write_page_checksum=True, compression="none", use_dictionary=False)
    check_shards(str(shards))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"damaged: .*{file.name}.*Delete"):
        check_shards(str(shards))
