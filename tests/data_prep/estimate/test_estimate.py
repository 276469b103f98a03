"""`sora prep --plan`: what it computes from headers, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.compare import NO_PROGRESS, SavedProgress
from data_prep.estimate.estimate import PrepEstimate, estimate
from data_prep.estimate.measure import Measurement
from data_prep.estimate.probe import ProbeResult, pick_evenly
from data_prep.estimate.table import check_estimate, format_estimate
from data_prep.resume import reconcile
from data_prep.sources import SourceRow, SourceRows, row_id
from data_prep.stats import PrepStats
from data_prep.stored import NO_CLIPS, StoredClips
from sora_train import index
from sora_train.codec.files import VaeFiles, find_text_encoder, find_vae
from sora_train.codec.text import load_text_encoder
from sora_train.data.shards import is_held_out
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import encode_row

VAE = find_vae("builtin")
TEXT = find_text_encoder("builtin")


def rows(number: int, prefix: str = "clip") -> list[SourceRow]:
    return [SourceRow("", f"{prefix}{i}.mp4", (f"a thing number {i}",), f"/{prefix}{i}.mp4") for i in range(number)]


def recipe(tmp_path: Path, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"fps": 8.0, "output": str(tmp_path / "shards")} | data})


def landscape(clips: int = 1) -> ProbeResult:
    return ProbeResult({"16x256x448": clips}, 12.0)


def estimated(
    wanted: Recipe,
    asked: list[SourceRow],
    probes: dict[str, ProbeResult],
    stored: StoredClips = NO_CLIPS,
    saved: SavedProgress = NO_PROGRESS,
    vae: VaeFiles = VAE,
) -> PrepEstimate:
    stats, rows = PrepStats(len(asked), 0.1, "", quiet=True), SourceRows.of(asked)
    return estimate(wanted, rows, reconcile(wanted.data, rows, stored, saved, stats), probes, vae, TEXT)


def test_tokens_bytes_and_steps_are_those_of_the_clips(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448", "16x256x256"])
    asked = rows(33)
    probes = {row.path: landscape(2) for row in asked[:20]} | {
        row.path: ProbeResult({"16x256x256": 1}, 3.0) for row in asked[20:]
    }
    found = estimated(wanted, asked, probes)
    wide, square = found.buckets
    assert (wide.clips, square.clips, found.clips) == (40, 13, 53)
    side = VAE.factor * wanted.model.patch
    assert wide.tokens == 16 * (256 // side) * (448 // side)
    assert (wide.steps, square.steps) == (3, 1)  # batches of 16, short ones counted
    latents = np.zeros((VAE.moments, 16, VAE.channels, 256 // VAE.factor, 448 // VAE.factor), np.float32)
    row = encode_row(
        sample_id="", source="", source_size=0, source_version="", content_hash="", start_s=0.0, end_s=2.0,
        captions=[""], latents=latents, text=[np.zeros((1, 1))],
    )  # fmt: skip
    assert wide.clip_bytes == len(row["latents"])
    assert found.latent_bytes == 40 * wide.clip_bytes + 13 * square.clip_bytes
    assert found.longest_s == 12.0


def test_a_vae_that_shrinks_time_gives_fewer_tokens_and_bytes(tmp_path: Path):
    wanted = recipe(tmp_path, frames=49, height=64, width=64)
    asked = rows(1)
    probes = {asked[0].path: ProbeResult({"49x64x64": 1}, 9.0)}
    still, causal = (estimated(wanted, asked, probes, vae=vae).buckets[0] for vae in (VAE, replace(VAE, time_factor=4)))
    assert (still.tokens * 13, still.clip_bytes * 13) == (causal.tokens * 49, causal.clip_bytes * 49)


def test_the_texts_bytes_are_those_of_the_encoder(tmp_path: Path):
    asked = [
        replace(row, captions=(f"a red circle moving left {'and up ' * i}", "a short one"))
        for i, row in enumerate(rows(9))
    ]
    found = estimated(recipe(tmp_path, buckets=["16x256x448"]), asked, {row.path: landscape(3) for row in asked})
    embeddings = load_text_encoder("builtin").encode([caption for row in asked for caption in row.captions])
    assert found.text_bytes == 3 * 2 * sum(embedding.numel() for embedding in embeddings)
    assert (found.captions, found.cut_share) == (10, 0)


def test_captions_that_are_too_long_are_counted_as_they_are_cut(tmp_path: Path):
    wanted = Recipe.model_validate({"data": {"output": str(tmp_path), "fps": 8.0}, "codec": {"max_tokens": 7}})
    asked = [replace(row, captions=("a red circle" + " and up" * i, "short")) for i, row in enumerate(rows(5))]
    found = estimated(wanted, asked, {row.path: ProbeResult({"16x256x256": 1}, 12.0) for row in asked})
    captions = [caption for row in asked for caption in row.captions]
    cut, whole = (load_text_encoder("builtin", most).encode(captions) for most in (7, 99))
    assert found.text_bytes == 2 * sum(embedding.numel() for embedding in cut)
    assert found.cut_share == sum(len(a) < len(b) for a, b in zip(cut, whole, strict=True)) / len(captions) == 0.4
    assert "WARNING: 0.4 of the captions have more than codec.max_tokens 7 tokens" in format_estimate(found, wanted)


def test_held_out_clips_are_no_steps(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"], holdout_fraction=0.5)
    asked = rows(200)
    found = estimated(wanted, asked, {row.path: landscape() for row in asked}).buckets[0]
    held_out = sum(is_held_out(row.source, 0.5) for row in asked)
    assert found.held_out == held_out
    assert found.steps == -(-(200 - held_out) // 16)


def test_encoded_clips_are_not_still_to_do(tmp_path: Path):
    """Two sources are finished, one was stopped after one of its two clips, one is new."""
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    asked = rows(4)
    shard = "bucket=16x256x448/part.parquet"
    keys = [row_id(row.source, row.captions) for row in asked]
    clips = [
        dict.fromkeys(index.CLIPS.names)
        | {"row_id": key, "sample_id": f"{key}-{i}", "source": row.source, "source_size": 0, "source_version": ""}
        | {"shard": shard, "place": 2 * number + i}
        for number, (row, key, count) in enumerate(zip(asked, keys, (2, 2, 1), strict=False))
        for i in range(count)
    ]
    table = pa.Table.from_pylist(clips, pa.schema([*index.CLIPS, pa.field("place", pa.int64())]))
    stored = StoredClips([shard], lambda columns: iter([table.select([*columns, "place"])]))
    record = {"source_size": 0, "source_version": "", "remarks": []}
    records = [
        record | {"row_id": key, "source": row.source, "sample_ids": [f"{key}-{i}" for i in (0, 1)]}
        for row, key in zip(asked[:2], keys, strict=False)
    ]
    done = pa.Table.from_pylist(records, index.SOURCES)
    saved = SavedProgress(lambda columns: iter([done.select(columns)]), NO_PROGRESS.failures)
    found = estimated(wanted, asked, {row.path: landscape(2) for row in asked[2:]}, stored, saved)
    assert (found.clips, found.encoded, found.files, found.todo, found.captions) == (8, 5, 2, 2, 2)
    assert "8 clips, 5 of them encoded already, 3 to encode" in format_estimate(found, wanted)
    measured = Measurement(1, "cpu", open_s=0.0, decode_s=3600.0, vae_s=0.0, text_s=0.0)
    assert found.hours(measured)[0] == 3.0


def test_dropped_rows_are_counted_by_reason_with_an_example(tmp_path: Path):
    asked = [
        *rows(3),
        *(replace(row, reason="no_caption", message="line 2 has none") for row in rows(2, "mute")),
        *rows(1, "short"),
    ]
    probes = {row.path: landscape() for row in asked[:3]}
    probes[asked[-1].path] = ProbeResult(reason="too_short", message="lasts 0.2 s")
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    found = estimated(wanted, asked, probes)
    assert found.dropped == {
        "no_caption": (2, "mute0.mp4: line 2 has none"),
        "too_short": (1, "short0.mp4: lasts 0.2 s"),
    }
    text = format_estimate(found, wanted)
    assert "too_short" in text
    assert "lasts 0.2 s" in text
    assert "WARNING: the bucket 16x256x448 has 3 training clips, fewer than the 16 of a step" in text


def test_an_empty_bucket_is_an_error_that_says_why(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["12x256x448", "49x256x448"], fps=1.0)
    asked = rows(2)
    found = estimated(wanted, asked, {row.path: ProbeResult({"12x256x448": 1}, 12.0) for row in asked})
    says = r"no clip fills 49x256x448 \(49.00 s at 1 fps\); the longest opened source lasts 12.0 s.*fewer frames"
    with pytest.raises(RecipeError, match=says):
        check_estimate(found, wanted.data)
    assert "12x256x448" in format_estimate(found, wanted)


def test_no_clips_and_too_many_bad_files_are_errors_with_reasons(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    asked = rows(4)
    short = ProbeResult(reason="too_short", message="lasts 0.2 s")
    with pytest.raises(UserError, match=r"no clip in 4 rows: 4 too_short \(clip0.mp4: lasts 0.2 s\)"):
        check_estimate(estimated(wanted, asked, {row.path: short for row in asked}), wanted.data)
    probes = {row.path: landscape() for row in asked} | {
        asked[3].path: ProbeResult(reason="unreadable", message="no container")
    }
    with pytest.raises(UserError, match=r"1 of 4 sources .*data.max_bad_fraction 0.1.*no container"):
        check_estimate(estimated(wanted, asked, probes), wanted.data)
    del probes[asked[3].path]
    check_estimate(estimated(wanted, asked[:3], probes), wanted.data)


def test_a_holdout_of_everything_is_an_error(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"], holdout_fraction=0.999999)
    asked = rows(2)
    with pytest.raises(RecipeError, match="data.holdout_fraction"):
        check_estimate(estimated(wanted, asked, {row.path: landscape() for row in asked}), wanted.data)


def test_a_disk_that_is_too_small_is_warned_of(tmp_path: Path):
    asked, wanted = rows(1), recipe(tmp_path, buckets=["16x256x448"])
    found = estimated(wanted, asked, {asked[0].path: landscape()})
    stored = found.latent_bytes + found.text_bytes
    assert "that disk lacks" not in format_estimate(found, wanted)
    assert "WARNING: that disk lacks" in format_estimate(replace(found, free_bytes=10), wanted)
    assert "that disk lacks" not in format_estimate(replace(found, free_bytes=10, stored_bytes=stored), wanted)


def test_hours_grow_with_pixels_and_distinct_captions(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    asked = [replace(row, captions=("the same",)) for row in rows(3600)]
    found = estimated(wanted, asked, {row.path: landscape() for row in asked})
    vae_s = 6e6 / (16 * 256 * 448)  # 6 s a clip
    measured = Measurement(8, "cpu", open_s=0.5, decode_s=1.5, vae_s=vae_s, text_s=3600.0)
    assert found.hours(measured) == pytest.approx((2.0, 6.0, 1.0))
    assert "decoding 2.0 h of one core; VAE 6.0 h and text 1.0 h of one core" in format_estimate(
        replace(found, measured=measured), wanted
    )
    on_gpu = format_estimate(replace(found, measured=replace(measured, device="NVIDIA H200")), wanted)
    assert "VAE 6.0 h and text 1.0 h of NVIDIA H200" in on_gpu


def test_counts_of_a_sample_are_scaled_up(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    missing = [replace(row, reason="missing_file", message="none", path="") for row in rows(2, "gone")]
    asked = [*rows(400), *missing]
    short = ProbeResult(reason="too_short", message="lasts 0.2 s")
    probes = {row.path: short if i % 4 == 0 else landscape(2) for i, row in enumerate(asked[:400:10])}
    whole = {row.path: short if i % 4 == 0 else landscape(2) for i, row in enumerate(asked[:400])}
    found, exact = (estimated(wanted, asked, probed) for probed in (probes, whole))
    assert found.buckets[0].clips == exact.buckets[0].clips == 600
    assert {reason: rows for reason, (rows, _) in found.dropped.items()} == {"too_short": 100, "missing_file": 2}
    assert found.latent_bytes == exact.latent_bytes
    assert found.text_bytes == pytest.approx(exact.text_bytes, rel=0.02)
    assert "(scaled up from 40 of 400 files to process)" in format_estimate(found, wanted)
    assert "scaled up" not in format_estimate(exact, wanted)


def test_few_items_are_all_picked_and_many_evenly():
    assert pick_evenly([1, 2], 3) == [1, 2]
    assert pick_evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
