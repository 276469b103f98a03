"""`sora prep --plan`: what it reckons from headers, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.buckets import buckets_of
from data_prep.estimate.estimate import Plan, cost, reckon
from data_prep.estimate.measure import Measured, spread, tokens_of
from data_prep.estimate.probe import Look
from data_prep.estimate.text import empty_buckets, format_plan, judge
from data_prep.sources import SourceRow
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.codec.text import load_text_encoder
from sora_train.data.config import SelectionConfig
from sora_train.data.shards import is_held_out
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import encode_row

VAE = find_vae("builtin")
TEXT = find_text_encoder("builtin")
COUNT = tokens_of(TEXT, 120)


def rows(number: int, prefix: str = "clip") -> list[SourceRow]:
    return [
        SourceRow(f"{prefix}{i}", f"{prefix}{i}.mp4", (f"a thing number {i}",), f"/{prefix}{i}.mp4")
        for i in range(number)
    ]


def recipe(tmp_path: Path, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"fps": 8.0, "output": str(tmp_path / "shards")} | data})


def landscape(clips: int = 1) -> Look:
    return Look({"16x256x448": clips}, 640, 360, 12.0)


def reckoned(wanted: Recipe, asked: list[SourceRow], looks: dict[str, Look]) -> Plan:
    return reckon(wanted, asked, looks, VAE, TEXT.width, COUNT)


def test_tokens_bytes_and_steps_are_those_of_the_clips(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448", "16x256x256"])
    asked = rows(33)
    looks = {row.path: landscape(2) for row in asked[:20]} | {
        row.path: Look({"16x256x256": 1}, 300, 300, 3.0) for row in asked[20:]
    }
    found = reckoned(wanted, asked, looks)
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
    looks = {asked[0].path: Look({"49x64x64": 1}, 64, 64, 9.0)}
    still, causal = (
        reckon(wanted, asked, looks, vae, TEXT.width, COUNT).buckets[0] for vae in (VAE, replace(VAE, time_factor=4))
    )
    assert (still.tokens * 13, still.clip_bytes * 13) == (causal.tokens * 49, causal.clip_bytes * 49)


def test_the_texts_bytes_are_those_of_the_encoder(tmp_path: Path):
    asked = [
        replace(row, captions=(f"a red circle moving left {'and up ' * i}", "a short one"))
        for i, row in enumerate(rows(9))
    ]
    found = reckoned(recipe(tmp_path, buckets=["16x256x448"]), asked, {row.path: landscape(3) for row in asked})
    embeddings = load_text_encoder("builtin").encode([caption for row in asked for caption in row.captions])
    assert found.text_bytes == 3 * 2 * sum(embedding.numel() for embedding in embeddings)
    assert found.captions == 10


def test_many_captions_are_reckoned_from_2000_of_them(tmp_path: Path):
    asked = [replace(row, captions=("all the same",)) for row in rows(5000)]
    seen: list[int] = []

    def count(captions: list[str]) -> list[int]:
        seen.append(len(captions))
        return [7] * len(captions)

    looks = {row.path: landscape() for row in asked}
    found = reckon(recipe(tmp_path, buckets=["16x256x448"]), asked, looks, VAE, 64, count)
    assert (seen, found.text_bytes) == ([2000], 5000 * 7 * 64 * 2)


def test_held_out_clips_are_no_steps(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"], holdout_fraction=0.5)
    asked = rows(200)
    found = reckoned(wanted, asked, {row.path: landscape() for row in asked}).buckets[0]
    held_out = sum(is_held_out(row.source, 0.5) for row in asked)
    assert found.held_out == held_out
    assert found.steps == -(-(200 - held_out) // 16)


def test_pictures_and_videos_of_a_ratio_are_reckoned_in_epochs_of_their_own(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448", "1x256x256"], image_ratio=0.2)
    asked = rows(2000)
    looks = {row.path: Look({"1x256x256": 1}, 300, 300, 0.0, still=True) for row in asked[:400]}
    looks |= {row.path: landscape() for row in asked[400:]}
    text = format_plan(reckoned(wanted, asked, looks))
    assert "100 steps per epoch of videos at train.batch_size 16; 0.8 of train.steps 1,000 is 8.0 epochs" in text
    assert "25 steps per epoch of pictures at train.batch_size 16; 0.2 of train.steps 1,000 is 8.0 epochs" in text


def test_what_is_left_out_is_counted_by_reason_with_an_example(tmp_path: Path):
    asked = [
        *rows(3),
        *(replace(row, reason="no_caption", message="line 2 has none") for row in rows(2, "mute")),
        *rows(1, "short"),
    ]
    looks = {row.path: landscape() for row in asked[:3]}
    looks[asked[-1].path] = Look(reason="too_short", message="lasts 0.2 s")
    found = reckoned(recipe(tmp_path, buckets=["16x256x448"]), asked, looks)
    assert [(drop.reason, drop.rows, drop.example) for drop in found.dropped] == [
        ("no_caption", 2, "mute0.mp4: line 2 has none"),
        ("too_short", 1, "short0.mp4: lasts 0.2 s"),
    ]
    text = format_plan(found)
    assert "too_short" in text
    assert "lasts 0.2 s" in text
    assert "WARNING: the bucket 16x256x448 has 3 training clips, fewer than train.batch_size 16" in text
    json.dumps(asdict(found))


def test_filters_that_headers_can_not_apply_are_named(tmp_path: Path):
    selection = SelectionConfig(min_seconds=1.0, scene_cuts=True, near_duplicates=0)
    wanted = recipe(tmp_path, buckets=["16x256x448"]).model_copy(update={"selection": selection})
    asked = rows(1)
    found = reckoned(wanted, asked, {asked[0].path: landscape()})
    assert found.unknown == ("selection.scene_cuts", "selection.near_duplicates")
    assert "selection.scene_cuts" in format_plan(found)


@pytest.mark.parametrize(
    ("bucket", "bounds", "says"),
    [
        ("49x256x448", {}, r"49x256x448 .*longest 12.0 s; it takes 49.00 s.*fewer frames"),
        ("12x720x1280", {"max_enlarge": 1.0}, r"12x720x1280 .*640x360.*data.max_enlarge"),
        ("1x256x256", {}, r"1x256x256 .*no source is a picture"),
        ("12x448x256", {}, r"12x448x256 .*nearer to another bucket"),
    ],
)
def test_a_bucket_that_stays_empty_is_an_error_that_says_why(tmp_path: Path, bucket: str, bounds: dict, says: str):
    wanted = recipe(tmp_path, buckets=["12x256x448", bucket], fps=1.0, **bounds)
    asked = rows(2)
    found = reckoned(wanted, asked, {row.path: Look({"12x256x448": 1}, 640, 360, 12.0) for row in asked})
    with pytest.raises(RecipeError, match=says):
        judge(found, wanted.data)
    assert "12x256x448" in format_plan(found)


def test_no_clips_and_too_many_bad_files_are_errors_with_reasons(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    asked = rows(4)
    short = Look(reason="too_short", message="lasts 0.2 s")
    with pytest.raises(UserError, match=r"no clip in 4 rows: 4 too_short \(clip0.mp4: lasts 0.2 s\)"):
        judge(reckoned(wanted, asked, {row.path: short for row in asked}), wanted.data)
    looks = {row.path: landscape() for row in asked} | {
        asked[3].path: Look(reason="unreadable", message="no container")
    }
    with pytest.raises(UserError, match=r"1 of 4 sources .*data.max_bad_fraction 0.1.*no container"):
        judge(reckoned(wanted, asked, looks), wanted.data)
    judge(reckoned(wanted, asked[:3], looks), wanted.data)


def test_a_holdout_of_everything_is_an_error(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"], holdout_fraction=0.999999)
    asked = rows(2)
    with pytest.raises(RecipeError, match="data.holdout_fraction"):
        judge(reckoned(wanted, asked, {row.path: landscape() for row in asked}), wanted.data)


def test_a_disk_that_is_too_small_is_warned_of(tmp_path: Path):
    asked = rows(1)
    found = reckoned(recipe(tmp_path, buckets=["16x256x448"]), asked, {asked[0].path: landscape()})
    assert "that disk lacks" not in format_plan(found)
    assert "WARNING: that disk lacks" in format_plan(replace(found, free_bytes=10))
    assert "that disk lacks" not in format_plan(
        replace(found, free_bytes=10, held_bytes=found.latent_bytes + found.text_bytes)
    )


def test_hours_grow_with_a_clips_pixels_and_each_caption_is_embedded_once(tmp_path: Path):
    wanted = recipe(tmp_path, buckets=["16x256x448"])
    asked = [replace(row, captions=("the same",)) for row in rows(3600)]
    found = reckoned(wanted, asked, {row.path: landscape() for row in asked})
    measured = Measured(8, "cpu", 2, open_s=0.5, decode_s=1.5, vae_s=3.0, vae_pixels=8 * 256 * 448, text_s=3600.0)
    took = cost(found, buckets_of(wanted.data), measured)
    assert (took.decode, took.vae, took.text) == pytest.approx((2.0, 6.0, 1.0))
    assert "16.0 h of a core" in format_plan(replace(found, work=took))
    slow = cost(found, buckets_of(wanted.data), replace(measured, load_s=20.0), loads_per_core=1.5)
    assert slow.start_s == pytest.approx(took.start_s + 30)
    assert f"before the first clip about {slow.start_s:.0f} s more" in format_plan(replace(found, work=slow))
    on_gpu = format_plan(replace(found, work=replace(took, measured=replace(measured, device="NVIDIA H200"))))
    assert "7.0 h of a GPU (VAE 6.0 h, text 1.0 h) and 2.0 h of a core" in on_gpu


def test_buckets_without_clips_are_empty_ones():
    assert empty_buckets(((16, 64, 64), (1, 64, 64), (8, 8, 8)), {"16x64x64": 3, "1x64x64": 0}) == ["1x64x64", "8x8x8"]


def test_a_spread_keeps_few_items_and_thins_many():
    assert spread([1, 2], 3) == [1, 2]
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
