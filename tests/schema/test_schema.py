"""The contract of a shard: what goes in comes out, and what doesn't fit is refused by name."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train.errors import UserError
from sora_train.manifest import SCHEMA_VERSION, Manifest
from sora_train.schema import SHARD_SCHEMA, bucket_name, bucket_of, bucket_size, decode_rows, encode_row, shard_files

BUCKET = "2x32x32"  # what the fixture tiny_shards has: 1 moment, 2 frames, 4 channels, 4 x 4


def row(i: int, latents: np.ndarray, text: list[np.ndarray], captions: list[str]) -> dict:
    return encode_row(
        sample_id=f"{i:04x}", source=f"{i}.mp4", source_size=7, source_version="1", content_hash="c", start_s=0.0,
        end_s=0.25, captions=captions, latents=latents, text=text,
    )  # fmt: skip


def test_rows_come_back_from_a_file_as_they_went_in(tiny_shards: Path, tmp_path: Path):
    manifest, rng = Manifest.load(str(tiny_shards)), np.random.default_rng(0)
    latents = rng.standard_normal((3, 1, 2, 4, 4, 4)).astype(np.float16)
    text = [[rng.standard_normal((n, 64)).astype(np.float16) for n in range(1, 2 + i)] for i in range(3)]
    captions = [[f"caption {n}" for n in range(len(texts))] for texts in text]
    rows = [row(i, latents[i], text[i], captions[i]) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA), tmp_path / "shard.parquet")

    clips = decode_rows(pq.read_table(tmp_path / "shard.parquet"), manifest, BUCKET)

    np.testing.assert_array_equal(clips.latents, latents)
    assert clips.captions == captions
    assert clips.sample_ids == ["0000", "0001", "0002"]
    assert clips.sources == ["0.mp4", "1.mp4", "2.mp4"]
    for mine, given in zip(clips.text, text, strict=True):
        for a, b in zip(mine, given, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_row_that_is_not_finite_in_float16_is_refused_by_name(value: float):
    with pytest.raises(ValueError, match="7.mp4: latents are not finite"):
        row(7, np.full((1, 2, 4, 4, 4), value, np.float32), [np.zeros((1, 64))], ["x"])


def test_a_row_of_another_shape_is_named(tiny_shards: Path):
    table = pa.Table.from_pylist([row(9, np.zeros((1, 3, 4, 4, 4)), [np.zeros((1, 64))], ["x"])], SHARD_SCHEMA)
    with pytest.raises(ValueError, match="0009: 192 numbers"):
        decode_rows(table, Manifest.load(str(tiny_shards)), BUCKET)


def test_every_caption_has_its_embedding():
    with pytest.raises(ValueError, match="2 captions and 1 embeddings"):
        row(1, np.zeros((1, 2, 4, 4, 4)), [np.zeros((1, 64))], ["x", "y"])


def test_a_manifest_comes_back_as_it_was_saved(tiny_shards: Path, tmp_path: Path):
    manifest = Manifest.load(str(tiny_shards))
    manifest.save(str(tmp_path / "new folder"))
    assert Manifest.load(str(tmp_path / "new folder")) == manifest
    assert manifest.null_embedding("eos").shape == (1, 64)


def test_a_folder_without_a_manifest_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"no manifest.json in .*sora prep"):
        Manifest.load(str(tmp_path))


def test_a_manifest_of_another_schema_version_is_refused(tiny_shards: Path, tmp_path: Path):
    text = (tiny_shards / "manifest.json").read_text()
    changed = text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99').replace(
        '"frames"', '"clip_frames"'
    )
    (tmp_path / "manifest.json").write_text(changed)
    with pytest.raises(UserError, match=rf"schema version {SCHEMA_VERSION}.*another data.output"):
        Manifest.load(str(tmp_path))


def test_only_finished_shards_are_listed(tmp_path: Path):
    for name in ("bucket=2x8x8/b.parquet", "bucket=1x8x8/a.parquet", "bucket=2x8x8/.unfinished-c.parquet",
                 "quarantine.parquet", "bucket=2x8x8/notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = shard_files(str(tmp_path))
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == [
        "bucket=1x8x8/a.parquet",
        "bucket=2x8x8/b.parquet",
    ]
    assert [bucket_of(file) for file in files] == ["1x8x8", "2x8x8"]
    assert shard_files(str(tmp_path / "nowhere")) == []


def test_a_buckets_name_says_its_size():
    assert bucket_size(bucket_name(16, 256, 128)) == (16, 256, 128)
