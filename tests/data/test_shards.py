"""Reading shards: every clip by its number, held-out ones taken out first, and what is broken is named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train.data.order import Bucket, batch
from sora_train.data.shards import ShardSet, is_held_out
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import decode_rows

BUCKET = "3x16x24"


def test_a_clip_is_what_was_written_whichever_others_are_read_with_it(make_shards):
    folder = make_shards(70, 33, 5)
    shards = ShardSet(folder)
    numbers = [107, 0, 69, 70, 31, 32, 0, 103]
    clips = shards.read(BUCKET, numbers)
    assert clips.sample_ids == [f"{number:08x}" for number in numbers]
    whole = decode_rows(pq.read_table(Path(folder) / f"bucket={BUCKET}"), shards.manifest, BUCKET)
    assert np.array_equal(clips.latents, whole.latents[numbers])
    assert clips.captions == [whole.captions[number] for number in numbers]
    for read, written in zip(clips.text, (whole.text[number] for number in numbers), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(read, written, strict=True))


def test_only_the_row_groups_that_are_needed_are_read(make_shards):
    shards = ShardSet(make_shards(128, 128))
    shards.read(BUCKET, [1, 30, 130])
    assert [(Path(path).name, group) for path, group in shards._cache] == [("0000.parquet", 0), ("0001.parquet", 0)]


def test_ids_are_read_once_a_row_group_in_the_order_asked_for(make_shards, monkeypatch: pytest.MonkeyPatch):
    shards = ShardSet(make_shards(80, 80, row_group=4))
    rows, read, read_group = [*range(159, -1, -3), 0, 159, 0], [], pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **how) -> pa.Table:
        read.append(group)
        return read_group(file, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert shards.sample_ids(BUCKET, rows) == [f"{row:08x}" for row in rows]
    assert sorted(read) == sorted([*range(20)] * 2)


def test_the_cache_keeps_what_was_read_last_and_no_more_than_it_may(make_shards):
    folder = make_shards(128)
    shards = ShardSet(folder)
    shards.read(BUCKET, [0])
    (one,) = shards._cache.values()
    shards = ShardSet(folder, cache_bytes=int(2.5 * one.nbytes))
    for row in (0, 32, 0, 64):
        assert shards.read(BUCKET, [row]).sample_ids == [f"{row:08x}"]
    assert [group for _, group in shards._cache] == [0, 2]
    assert shards._cached_bytes == sum(table.nbytes for table in shards._cache.values())
    assert ShardSet(folder, cache_bytes=0).read(BUCKET, [0, 64, 127]).sample_ids == ["00000000", "00000040", "0000007f"]


def test_an_epoch_reads_a_row_group_once_and_caches_one_window(make_shards):
    shards = ShardSet(make_shards(*[80] * 16, row_group=4))  # 320 groups, five windows
    order, read = shards.sample_order(batch_size=8, seed=1), []
    open_file = shards._open_file

    def opened(path: str) -> pq.ParquetFile:
        read.append(path)
        return open_file(path)

    shards._open_file = opened
    for number in range(order.steps_per_epoch):
        shards.read(BUCKET, batch(order, number).rows)
        assert len(shards._cache) <= 80
    assert 320 <= len(read) < 352


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_splits_partition_clips_and_keep_sources_together(make_shards, fraction: float):
    folder = make_shards(70, 33, 47)
    sides = [ShardSet(folder, fraction, split) for split in ("train", "holdout")]
    found = [side.read(BUCKET, range(side.rows[BUCKET])) for side in sides]
    assert sorted(found[0].sample_ids + found[1].sample_ids) == [f"{number:08x}" for number in range(150)]
    assert not set(found[0].sources) & set(found[1].sources)
    assert all(is_held_out(source, fraction) for source in found[1].sources)
    shuffled = np.random.default_rng(0).permutation(sides[0].rows[BUCKET]).tolist()
    assert sides[0].read(BUCKET, shuffled).sample_ids == [found[0].sample_ids[row] for row in shuffled]


def test_the_share_of_sources_held_out_is_what_was_asked_for():
    held_out = sum(is_held_out(f"clip_{i}.mp4", 0.1) for i in range(10_000))
    assert abs(held_out - 1000) < 3 * np.sqrt(900)


def test_a_plan_orders_the_clips_of_the_split_alone(make_shards):
    make_shards(70, 33)
    folder = make_shards(40, start=103, bucket=(1, 16, 24))
    assert ShardSet(folder).sample_order(8, seed=5).buckets == (
        Bucket("1x16x24", 40, 32, images=True),
        Bucket(BUCKET, 103, 32),
    )
    shards = ShardSet(folder, 0.3)
    order = shards.sample_order(8, seed=5)
    seen = [
        sample
        for taken in (batch(order, k) for k in range(order.steps_per_epoch))
        for sample in shards.read(taken.bucket, taken.rows).sample_ids
    ]
    kept = [f"{number:08x}" for number in range(143) if not is_held_out(f"video_{number // 3}.mp4", 0.3)]
    assert sorted(seen) == kept


def test_a_folder_without_clips_for_the_split_is_refused(make_shards):
    folder = make_shards(6)
    with pytest.raises(UserError, match=r"0 clips: data.holdout_fraction 0.0 holds out none of the 6 clips"):
        ShardSet(folder, split="holdout")
    with pytest.raises(UserError, match=r"holds out all of the 6 clips.* Lower it"):
        ShardSet(folder, 0.999999)
    with pytest.raises(UserError, match=r"0 clips: the shards in .* are empty"):
        ShardSet(make_shards(0, folder="empty"))


def test_a_folder_without_manifest_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="sora prep"):
        ShardSet(str(tmp_path))


def test_shards_of_another_encoding_are_refused_by_name(make_shards):
    folder = make_shards(6)
    other = make_shards(6, folder="other", encoding_hash="e2")
    Manifest.load(other).save(folder)
    with pytest.raises(UserError, match=r"0000.parquet has the encoding e1, .* e2"):
        ShardSet(folder)


def test_clips_of_another_shape_than_the_manifest_says_are_refused(make_shards):
    folder = make_shards(6, moments=1)
    Manifest.load(make_shards(1, folder="other", moments=2)).save(folder)
    with pytest.raises(UserError, match=r"00000002: .* numbers in latents"):
        ShardSet(folder).read(BUCKET, [2])


@pytest.mark.parametrize("size", [0, 3, 1000, -1000])
def test_a_truncated_shard_is_named_with_the_remedy(make_shards, size: int):
    folder = make_shards(70, 33)
    file = Path(folder) / f"bucket={BUCKET}" / "0001.parquet"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"0001.parquet can't be read as a shard .* delete this file and run `sora prep`"
    ):
        ShardSet(folder)


def test_a_flipped_byte_never_gives_another_clip(make_shards):
    """Anywhere in the file: the clips are what they were, or the file is named."""
    folder = make_shards(4)
    file = Path(folder) / f"bucket={BUCKET}" / "0000.parquet"
    whole, content = ShardSet(folder).read(BUCKET, range(4)), file.read_bytes()
    errors: list[UserError] = []
    for place in range(4, len(content), 101):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            clips = ShardSet(folder).read(BUCKET, range(4))
            assert np.array_equal(clips.latents, whole.latents)
            assert clips.sample_ids == whole.sample_ids
        except UserError as error:
            errors.append(error)
    assert len(errors) > 20
    assert all("0000.parquet" in str(error) for error in errors)
