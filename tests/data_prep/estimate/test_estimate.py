"""`sora prep --plan`: what it computes from headers, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.estimate.command import token_counter
from data_prep.estimate.estimate import PrepEstimate, estimate
from data_prep.estimate.measure import Measurement
from data_prep.estimate.probe import ProbeResult, pick_evenly
from data_prep.estimate.table import check_estimate, format_estimate
from data_prep.sources import SourceRow
from sora_train.codec import CodecConfig
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.codec.text import load_text_encoder
from sora_train.data.config import SelectionConfig
from sora_train.data.shards import is_held_out
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import encode_row

VAE = find_vae("builtin")
TEXT = find_text_encoder("builtin")
COUNT = token_counter(TEXT, CodecConfig(max_tokens=120))


def rows(number: int, prefix: str = "clip") -> list[SourceRow]:
    return [
        SourceRow(f"{prefix}{i}", f"{prefix}{i}.mp4", (f"a thing number {i}",), f"/{prefix}{i}.mp4")
        for i in range(number)
    ]


def recipe(tmp_path: Path, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"fps": 8.0, "output": str(tmp_path / "shards")} | data})


def landscape(clips: int = 1) -> ProbeResult:
    return ProbeResult({"16x256x448": clips}, 640, 360, 12.0)


def estimated(wanted: Recipe, asked: list[SourceRow], probes: dict[str, ProbeResult]) -> PrepEstimate:
    return estimate(wanted, asked, probes, VAE, TEXT.width, COUNT)


def test_tokens_bytes_and_steps_are_those_of_the_clips(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448", "16x256x256"])
    asked = rows(33)
    probes = {row.path: landscape(2) for row in asked[:20]} | {
        row.path: ProbeResult({"16x256x256": 1}, 300, 300, 3.0) for row in asked[20:]
    }
    found = estimated(wanted, asked, probes)
    wide, square = found.buckets
    assert (wide.clips, square.clips, found.clips) == (40, 13, 53)
    side = VAE.factor * wanted.model.patch
    assert wide.tokens == 16 * (256 // side) * (448 // side)
    assert (wide.steps, square.steps, found.steps) == (3, 1, 4)  # batches of 16, short ones counted
    latents = np.zeros((VAE.moments, 16, VAE.channels, 256 // VAE.factor, 448 // VAE.factor), np.float32)
    row = encode_row(
        sample_id="", source="", source_size=0, source_version="", content_hash="", start_s=0.0, end_s=2.0,
        captions=[""], latents=latents, text=[np.zeros((1, 1))],
    )  # fmt: skip
    assert wide.clip_bytes == len(row["latents"])
    assert found.latent_bytes == 40 * wide.clip_bytes + 13 * square.clip_bytes
    assert found.video_s == pytest.approx(20 * 12 + 13 * 3)


def test_a_vae_that_shrinks_time_gives_fewer_tokens_and_bytes(tmp_path: Path):
    wanted = recipe(tmp_path, frames=49, height=64, width=64)
    asked = rows(1)
    probes = {asked[0].path: ProbeResult({"49x64x64": 1}, 64, 64, 9.0)}
    still, causal = (
        estimate(wanted, asked, probes, vae, TEXT.width, COUNT).buckets[0] for vae in (VAE, replace(VAE, time_factor=4))
    )
    assert (still.tokens * 13, still.clip_bytes * 13) == (causal.tokens * 49, causal.clip_bytes * 49)


def test_the_texts_bytes_are_those_of_the_encoder(tmp_path: Path):
    asked = [
        replace(row, captions=(f"a red circle moving left {'and up ' * i}", "a short one"))
        for i, row in enumerate(rows(9))
    ]
    found = estimated(recipe(tmp_path, buckets=["16x256x448"]), asked, {row.path: landscape(3) for row in asked})
    embeddings = load_text_encoder("builtin").encode([caption for row in asked for caption in row.captions])
    assert found.text_bytes == 3 * 2 * sum(embedding.numel() for embedding in embeddings)
    assert found.captions == 10


def test_many_captions_are_estimated_from_2000_of_them(tmp_path: Path):
    asked = [replace(row, captions=("all the same",)) for row in rows(5000)]
    seen: list[int] = []

    def count(captions: list[str]) -> list[int]:
        seen.append(len(captions))
        return [7] * len(captions)

    probes = {row.path: landscape() for row in asked}
    found = estimate(recipe(tmp_path, buckets=["16x256x448"]), asked, probes, VAE, 64, count)
    assert (seen, found.text_bytes) == ([2000], 5000 * 7 * 64 * 2)


def test_held_out_clips_are_no_steps(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"], holdout_fraction=0.5)
    asked = rows(200)
    found = estimated(wanted, asked, {row.path: landscape() for row in asked}).buckets[0]
    held_out = sum(is_held_out(row.source, 0.5) for row in asked)
    assert found.held_out == held_out
    assert found.steps == -(-(200 - held_out) // 16)


def test_with_an_image_ratio_images_have_epochs_of_their_own(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448", "1x256x256"], image_ratio=0.2)
    asked = rows(2000)
    probes = {row.path: ProbeResult({"1x256x256": 1}, 300, 300, 0.0, is_image=True) for row in asked[:400]}
    probes |= {row.path: landscape() for row in asked[400:]}
    text = format_estimate(estimated(wanted, asked, probes), wanted)
    assert "100 steps per epoch of videos at train.batch_size 16; 0.8 of train.steps 1,000 is 8.0 epochs" in text
    assert "25 steps per epoch of images at train.batch_size 16; 0.2 of train.steps 1,000 is 8.0 epochs" in text


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
    assert [(drop.reason, drop.rows, drop.example) for drop in found.dropped] == [
        ("no_caption", 2, "mute0.mp4: line 2 has none"),
        ("too_short", 1, "short0.mp4: lasts 0.2 s"),
    ]
    text = format_estimate(found, wanted)
    assert "too_short" in text
    assert "lasts 0.2 s" in text
    assert "WARNING: the bucket 16x256x448 has 3 training clips, fewer than train.batch_size 16" in text
    json.dumps(asdict(found))


def test_filters_that_need_pixels_are_named(tmp_path: Path):
    selection = SelectionConfig(min_seconds=1.0, scene_cuts=True, near_duplicates=0)
    wanted = recipe(tmp_path, buckets=["16x256x448"]).model_copy(update={"selection": selection})
    asked = rows(1)
    found = estimated(wanted, asked, {asked[0].path: landscape()})
    assert "damaged frames, selection.scene_cuts, selection.near_duplicates\n" in format_estimate(found, wanted)


@pytest.mark.parametrize(
    ("bucket", "bounds", "says"),
    [
        ("49x256x448", {}, r"49x256x448 .*longest 12.0 s; it takes 49.00 s.*fewer frames"),
        ("12x720x1280", {"max_enlarge": 1.0}, r"12x720x1280 .*640x360.*data.max_enlarge"),
        ("1x256x256", {}, r"1x256x256 .*no source is an image"),
        ("12x448x256", {}, r"12x448x256 .*nearer to another bucket"),
    ],
)
def test_an_empty_bucket_is_an_error_that_says_why(tmp_path: Path, bucket: str, bounds: dict, says: str):
    wanted = recipe(tmp_path, buckets=["12x256x448", bucket], fps=1.0, **bounds)
    asked = rows(2)
    found = estimated(wanted, asked, {row.path: ProbeResult({"12x256x448": 1}, 640, 360, 12.0) for row in asked})
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
    assert "9.0 h of a core" in format_estimate(replace(found, measured=measured), wanted)
    on_gpu = format_estimate(replace(found, measured=replace(measured, device="NVIDIA H200")), wanted)
    assert "7.0 h of a GPU (VAE 6.0 h, text 1.0 h) and 2.0 h of a core" in on_gpu


def test_counts_of_a_sample_are_scaled_up(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    missing = [replace(row, reason="missing_file", message="none", path="") for row in rows(2, "gone")]
    asked = [*rows(400), *missing]
    short = ProbeResult(reason="too_short", message="lasts 0.2 s")
    probes = {row.path: short if i % 4 == 0 else landscape(2) for i, row in enumerate(asked[:400:10])}
    whole = {row.path: short if i % 4 == 0 else landscape(2) for i, row in enumerate(asked[:400])}
    found, exact = (estimated(wanted, asked, probed) for probed in (probes, whole))
    assert found.buckets[0].clips == exact.buckets[0].clips == 600
    assert {drop.reason: drop.rows for drop in found.dropped} == {"too_short": 100, "missing_file": 2}
    assert found.latent_bytes == exact.latent_bytes
    assert found.text_bytes == pytest.approx(exact.text_bytes, rel=0.02)
    assert found.video_s == exact.video_s
    assert "(scaled up from 40 of 400 files)" in format_estimate(found, wanted)
    assert "scaled up" not in format_estimate(exact, wanted)


def test_few_items_are_all_picked_and_many_evenly():
    assert pick_evenly([1, 2], 3) == [1, 2]
    assert pick_evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
