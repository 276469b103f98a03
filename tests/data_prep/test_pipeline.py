"""The whole pipeline on Ray with a few small clips; the networks' output is the oracle."""

import csv
import os
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_prep import ray_pipeline, sources, stages
from data_prep.estimate.estimate import estimate_prep
from data_prep.inspect.table import inspect
from data_prep.pipeline import prep
from data_prep.ray_pipeline import allocate_cpus
from data_prep.shards import read_shards
from sora_train.codec import CodecConfig
from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.data.config import DataConfig, PrepConfig, SelectionConfig
from sora_train.errors import RecipeError, UserError
from sora_train.locks import run_lock
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.schema import decode_rows, shard_files
from sora_train.workers import ClusterConfig
from tests.data_prep.clip_files import plan_clips, read_clip


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def left_out_by_ray() -> dict[str, float]:
    """Reasons and how many clips were left out for each, after the metrics of this Ray's one node."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_sora_prep_left_out{") and 'run="pipe"' in line]
    return {re.findall(r'reason="(\w+)"', line)[0]: float(line.split()[-1]) for line in lines}


def datasets_by_ray() -> list[str]:
    """What Ray's dashboard calls the datasets that it saw."""
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    return list(ray.get(get_or_create_stats_actor().get_datasets.remote()))


def make_source(folder: Path, write, names: dict[str, str], extra: list[tuple[str, str]]) -> Path:
    for name in names:
        write(folder / name, np.arange(36) / 30)
    save_captions(folder, [*names.items(), *extra])
    return folder / "captions.csv"


def save_captions(folder: Path, rows: list[tuple[str, str]]) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video_file_name", "prompt"), *rows])


def recipe(folder: Path, vae: Path, selection: SelectionConfig | None = None, **data: object) -> Recipe:
    settings = {"captions": str(folder / "captions.csv"), "output": str(folder / "shards"), "frames": 4, "fps": 4,
                "height": 16, "width": 32, "max_bad_fraction": 0.3}  # fmt: skip
    return Recipe(
        name="pipe",
        data=DataConfig.model_validate(settings | data),
        selection=selection or SelectionConfig(),
        codec=CodecConfig(vae=str(vae), precision="fp32", text_precision="fp32"),
        cluster=ClusterConfig(address="local"),
    )


def frames_of(path: Path, made: Recipe) -> np.ndarray:
    """Of a file's first clip."""
    span = plan_clips(str(path), made.data, made.selection).spans[0]
    return read_clip(str(path), span, made.data, made.selection, "").frames


def stamps(folder: Path) -> dict[str, int]:
    return {file: os.stat(file).st_mtime_ns for file in shard_files(str(folder / "shards"))}


def rows_in(shards: str) -> list[dict]:
    return [row for _, table in read_shards(shards) for row in table.to_pylist()]


def clips_of(folder: Path) -> dict[str, dict]:
    rows = rows_in(str(folder / "shards"))
    assert len({row["sample_id"] for row in rows}) == len(rows)
    return {row["source"]: row for row in rows}


@pytest.mark.ray
@pytest.mark.slow
def test_the_vae_gets_batches_of_its_size_from_a_long_video(
    tmp_path: Path, write, vae_folder: Path, local_ray, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "batches"

    class Counted(stages.EncodeVideo):
        def encode(self, clips: list[np.ndarray]) -> list[np.ndarray]:
            with log.open("a") as file:
                file.write(f"{len(clips)} ")
            return super().encode(clips)

    monkeypatch.setattr(stages, "EncodeVideo", Counted)
    write(tmp_path / "long.mp4", np.arange(360) / 30)
    save_captions(tmp_path, [("long.mp4", "one"), ("lost.mp4", "two")])
    written: list[list[bytes]] = []
    for batch, expected in ((3, [3] * 7 + [2]), (100, [23])):
        made = recipe(tmp_path, vae_folder, stride_s=0.5, max_bad_fraction=1.0, output=str(tmp_path / str(batch)))
        prep(made.model_copy(update={"prep": PrepConfig(vae_batch=batch, vae_workers=1)}))
        assert list(map(int, log.read_text().split())) == expected
        log.unlink()
        written.append([Path(file).read_bytes() for file in shard_files(made.data.output)])
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.ray
def test_rounds_give_the_shards_of_one_round(
    tmp_path: Path, write, vae_folder: Path, local_ray, monkeypatch: pytest.MonkeyPatch
):
    make_source(tmp_path, write, {f"{i}.mp4": f"clip {i}" for i in range(5)}, [])
    written: list[list[bytes]] = []
    for name, rows in (("one", 100), ("rounds", 2)):
        monkeypatch.setattr(sources, "TABLE_ROWS", rows)
        monkeypatch.setattr(ray_pipeline, "ROUND_BLOCKS", 1)
        made = recipe(tmp_path, vae_folder, output=str(tmp_path / name))
        prep(made.model_copy(update={"prep": PrepConfig(vae_batch=2)}))
        written.append([Path(file).read_bytes() for file in shard_files(made.data.output)])
    assert written[0] == written[1]


@pytest.mark.ray
def test_clips_become_shards_once_and_only_changes_again(
    tmp_path: Path, write, vae_folder: Path, local_ray, capsys: pytest.CaptureFixture[str]
):
    names = {f"{i}.mp4": f"a red thing {i % 2}" for i in range(6)}
    (tmp_path / "bad.mp4").write_text("this is no video")
    write(tmp_path / "short.mp4", np.arange(10) / 30)
    extra = [
        ("bad.mp4", "bad"),
        ("short.mp4", "short"),
        ("../out.mp4", "out"),
        ("0.mp4", ""),
        ("0.mp4", "a red thing 0"),
    ]
    make_source(tmp_path, write, names, extra)
    made = recipe(tmp_path, vae_folder)

    manifest = prep(made)

    counts = {"asked": 11, "written": 6, "quarantined": 2, "filtered": 3}
    reasons = {"duplicate_row": 1, "no_caption": 1, "outside_root": 1, "too_short": 1, "unreadable": 1}
    assert manifest.counts.model_dump() == counts
    assert manifest == Manifest.load(made.data.output)
    assert manifest.reasons == reasons
    until = time.monotonic() + 15
    while left_out_by_ray() != reasons and time.monotonic() < until:
        time.sleep(0.3)
    assert left_out_by_ray() == reasons
    assert "prep pipe" in [name.rpartition("_")[0].rpartition("_")[0] for name in datasets_by_ray()]
    seen = inspect(made.data.output)
    assert {name: seen[name] for name in counts} == counts
    assert seen["buckets"] == {"4x16x32": 6}
    lost = {row["source"]: row for row in pq.read_table(tmp_path / "shards" / "quarantine.parquet").to_pylist()}
    assert (lost["bad.mp4"]["stage"], lost["bad.mp4"]["reason"]) == ("open", "unreadable")

    # Every row holds what the networks make of the same frames and words.
    vae, text = load_vae(str(vae_folder)), load_text_encoder("builtin")
    clips = decode_rows(pq.read_table(shard_files(made.data.output)[0]), manifest, "4x16x32")
    assert clips.sources == sorted(names)
    for i, source in enumerate(clips.sources):
        expected = vae.encode(torch.from_numpy(frames_of(tmp_path / source, made))[None])[0].numpy()
        np.testing.assert_allclose(clips.latents[i], expected, atol=2e-3, rtol=2e-3)
        assert clips.captions[i] == [names[source]]
        np.testing.assert_allclose(clips.text[i][0], text.encode([names[source]])[0], atol=2e-3, rtol=2e-3)
    for null_prompt in ("eos", "padded"):
        expected = text.encode_null("", null_prompt)
        np.testing.assert_allclose(manifest.null_embedding(null_prompt), expected, atol=2e-3, rtol=2e-3)
    assert (manifest.latents.moments, manifest.vae.factor) == (2, 2)

    # Again: nothing is touched, what is known to be bad is not tried again, and the manifest is the same.
    before = stamps(tmp_path)
    capsys.readouterr()
    assert prep(made) == manifest
    assert "6 clips already encoded, 0 sources to process" in capsys.readouterr().out
    assert stamps(tmp_path) == before

    # A changed file, a changed caption, a new clip, a repaired one; one that left. Everything else stays. As after a
    # kill there is no manifest, and half a shard.
    old = clips_of(tmp_path)
    (tmp_path / "shards" / "manifest.json").unlink()
    unfinished = tmp_path / "shards" / "bucket=4x16x32" / ".unfinished-part-000009.parquet"
    unfinished.write_bytes(b"half a shard")
    write(tmp_path / "1.mp4", np.arange(48) / 30)
    write(tmp_path / "bad.mp4", np.arange(36) / 30)
    write(tmp_path / "new.mp4", np.arange(36) / 30)
    changed = {name: caption for name, caption in names.items() if name != "5.mp4"} | {"2.mp4": "another caption"}
    save_captions(tmp_path, [*changed.items(), ("bad.mp4", "good now"), ("new.mp4", "new")])
    found = estimate_prep(made)
    assert (found.clips, found.encoded, found.probed) == (7, 3, 4)
    assert prep(made).counts.model_dump() == {"asked": 7, "written": 7, "quarantined": 0, "filtered": 0}
    assert not unfinished.exists()
    new = clips_of(tmp_path)
    assert sorted(new) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "bad.mp4", "new.mp4"]
    assert new["1.mp4"]["content_hash"] != old["1.mp4"]["content_hash"]
    assert new["2.mp4"]["captions"] == ["another caption"]
    assert [new[name] == old[name] for name in ("0.mp4", "3.mp4", "4.mp4")] == [True] * 3

    # Another encoding, or a stranger's captions, never touch these shards.
    with pytest.raises(UserError, match=r"another encoding .*: data.fps was 4.0, is 5.0. Encodings never mix"):
        prep(recipe(tmp_path, vae_folder, fps=5))
    make_source(tmp_path, write, {"stranger.mp4": "x"}, [])
    with pytest.raises(UserError, match="holds 7 clips of other sources"):
        prep(made)
    assert clips_of(tmp_path) == new


@pytest.mark.slow
@pytest.mark.ray
def test_other_settings_encode_only_the_missing_clips(tmp_path: Path, write, vae_folder: Path, local_ray):
    write(tmp_path / "long.mp4", np.arange(90) / 30)
    write(tmp_path / "short.mp4", np.arange(36) / 30)
    write(tmp_path / "copy.mp4", np.arange(36) / 30)
    write(tmp_path / "tall.mp4", np.arange(36) / 30, size=(64, 128))
    Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(tmp_path / "still.png")
    names = ("long.mp4", "short.mp4", "copy.mp4", "tall.mp4", "still.png")
    save_captions(tmp_path, [(name, f"caption of {name}") for name in names])
    buckets = ["4x16x32", "8x16x32", "4x32x16", "1x16x16"]
    made = recipe(tmp_path, vae_folder, SelectionConfig(duplicates=True), buckets=buckets, stride_s=1.0)

    manifest = prep(made)

    # 8 frames at 4 fps last 2 s: of 3 s, the clips from 0 and 1 s on fill that bucket, and the one from 2 s the other.
    assert manifest.buckets == {"4x16x32": 2, "8x16x32": 2, "4x32x16": 1, "1x16x16": 1}
    assert manifest.counts.model_dump() == {"asked": 7, "written": 6, "quarantined": 0, "filtered": 1}
    assert manifest.reasons == {"duplicate": 1}
    assert (manifest.frames, manifest.height, manifest.width) == (8, 16, 32)
    rows = rows_in(made.data.output)
    assert sorted((row["source"], row["start_s"], row["end_s"]) for row in rows) == [
        ("long.mp4", 0.0, 2.0), ("long.mp4", 1.0, 3.0), ("long.mp4", 2.0, 3.0),
        ("short.mp4", 0.0, 1.0), ("still.png", 0.0, 0.0), ("tall.mp4", 0.0, 1.0),
    ]  # fmt: skip
    before = stamps(tmp_path)
    assert prep(made) == manifest
    assert stamps(tmp_path) == before

    # A wider stride asks for fewer clips: what it no longer asks for goes, the rest is not made again.
    old = {row["sample_id"]: row for row in rows}
    wider = prep(recipe(tmp_path, vae_folder, SelectionConfig(duplicates=True), buckets=buckets, stride_s=2.0))
    assert wider.buckets == {"4x16x32": 2, "8x16x32": 1, "4x32x16": 1, "1x16x16": 1}
    new = rows_in(made.data.output)
    assert all(old[row["sample_id"]] == row for row in new)

    # Without one of the buckets and with another: clips that belong elsewhere now are encoded again, the rest stays.
    buckets = ["4x16x32", "8x16x32", "4x32x16", "4x64x32"]
    other = prep(recipe(tmp_path, vae_folder, SelectionConfig(duplicates=True), buckets=buckets, stride_s=2.0))
    assert other.buckets == {"4x16x32": 2, "8x16x32": 1, "4x32x16": 0, "4x64x32": 1}
    assert other.reasons == {"duplicate": 1, "too_short": 1}
    latest = {row["sample_id"]: row for row in rows_in(made.data.output)}
    assert [row["source"] for sample, row in latest.items() if old[sample] != row] == ["tall.mp4"]
    with pytest.raises(UserError, match="holds clips of 4x16x32, 4x64x32, 8x16x32; the recipe asks for 4x16x16"):
        prep(recipe(tmp_path, vae_folder, height=16, width=16))


def test_a_second_prep_is_refused_before_it_reads_anything(tmp_path: Path):
    made = recipe(tmp_path, tmp_path / "no_vae")
    with (
        run_lock(made.data.output, "sora prep"),
        pytest.raises(UserError, check=lambda error: error.code == "locked"),
    ):
        prep(made)


def test_a_plan_needs_no_lock(tmp_path: Path, vae_folder: Path):
    save_captions(tmp_path, [("lost.mp4", "x")])
    made = recipe(tmp_path, vae_folder)
    with run_lock(made.data.output, "sora prep"):
        assert estimate_prep(made).bad_sources == 1


def test_missing_files_are_found_out_before_ray_starts(tmp_path: Path, vae_folder: Path):
    save_captions(tmp_path, [(f"{i}.mp4", "x") for i in range(5)])
    with pytest.raises(
        UserError, match=r"5 of 5 sources can't be read, decoded or encoded.*5 missing_file .*data.root"
    ):
        prep(recipe(tmp_path, vae_folder))
    lost = pq.read_table(tmp_path / "shards" / "quarantine.parquet").to_pylist()
    assert [row["reason"] for row in lost] == ["missing_file"] * 5


def test_a_size_not_divisible_by_the_vaes_factor_is_refused(tmp_path: Path, vae_folder: Path):
    with pytest.raises(
        RecipeError, match=r"data.height 15 does not divide by 4 \(VAE 2 x model.patch 2\); use 12 or 16"
    ):
        prep(recipe(tmp_path, vae_folder, height=15))


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (3, 0), (8, 0), (64, 0), (4, 1), (128, 8), (8, 8)])
def test_the_stages_together_fit_into_the_cluster(cpus: int, gpus: int):
    found = allocate_cpus(cpus, gpus, PrepConfig())
    shares = (found.decode, found.vae, found.text)
    assert all(share.workers >= 1 for share in shares)
    assert sum(share.workers * share.cpus for share in shares) <= cpus
    assert sum(share.workers * share.gpus for share in shares) <= gpus
