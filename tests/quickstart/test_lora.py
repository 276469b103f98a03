"""The LoRA quickstart: its clips, its oracle of seven colours, its table and its sheet."""

import csv
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.errors import UserError
from sora_train.quickstart import measure as measuring
from sora_train.quickstart.lora import GROUPS, check_base_run, clips, measure, seven_colours, summary, write_sheet
from sora_train.quickstart.measure import SEEDS
from sora_train.quickstart.oracle import Verdict, accuracy, classify
from sora_train.quickstart.run import find_recipe
from sora_train.quickstart.shapes import ALL_COLOURS, FPS, Scene, all_scenes, draw
from sora_train.recipe import Recipe, load_recipe
from sora_train.video import read_mp4, write_mp4


def recipe(folder: Path) -> Recipe:
    return load_recipe(find_recipe("jobs/quickstart_lora.yaml"), {"data.captions": str(folder / "captions.csv")})


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory) -> Path:
    return clips(recipe(tmp_path_factory.mktemp("clips")))


def test_sixty_clips_show_the_new_colour_and_sixty_the_old_ones(clips_folder):
    with (clips_folder / "captions.csv").open(newline="") as file:
        captions = [row["prompt"] for row in csv.DictReader(file)]
    by_caption = {scene.caption: scene for scene in all_scenes(ALL_COLOURS)}
    shown = [by_caption[caption] for caption in captions]
    colours = Counter(scene.colour for scene in shown)
    assert colours.pop("orange") == 60
    assert sum(colours.values()) == 60
    assert max(colours.values()) - min(colours.values()) <= 4
    assert not any(scene.held_out for scene in shown)
    assert len({scene for scene in shown if scene.colour == "orange"}) == 8


def test_the_new_colours_scenes_are_held_out_as_those_of_the_others():
    orange = all_scenes(["orange"])
    held_out = [scene for scene in orange if scene.held_out]
    assert len(orange) == 12
    assert len(held_out) == 4
    assert {scene.direction for scene in held_out} == {"left", "right", "up", "down"}
    assert Scene("orange", "circle", "up").caption == "an orange circle moving up"
    assert Counter(scene.colour for scene in seven_colours())["orange"] == 12


def test_the_oracle_reads_seven_colours_through_h264(tmp_path):
    videos = []
    for i, scene in enumerate(all_scenes(ALL_COLOURS)):
        write_mp4(tmp_path / "clip.mp4", draw(scene, np.random.default_rng((12, i))), fps=FPS, crf=10)
        videos.append(read_mp4(tmp_path / "clip.mp4"))
    assert accuracy(videos, all_scenes(ALL_COLOURS), ALL_COLOURS) >= 0.99
    six = [classify(video).colour for video, scene in zip(videos, all_scenes(ALL_COLOURS), strict=True)]
    assert six[:72] == [scene.colour for scene in all_scenes()]


def perfect(folder: Path, wrong: tuple[str, ...] = ()) -> Path:
    """Samples that show their captions, but those of the colours `wrong` are magenta."""
    folder.mkdir()
    listing, verdicts = [], []
    for i, scene in enumerate(scene for scene in seven_colours() for _ in SEEDS):
        shown = Scene("magenta", scene.shape, scene.direction) if scene.colour in wrong else scene
        video = draw(shown, np.random.default_rng((5, i)))
        write_mp4(folder / f"{i:03d}.mp4", video, fps=FPS)
        verdicts.append(asdict(classify(video, ALL_COLOURS)))
        listing.append({"file": f"{i:03d}.mp4", "prompt": scene.caption, "seed": SEEDS[i % len(SEEDS)]})
    (folder / "samples.json").write_text(json.dumps({"samples": listing}))
    (folder / "verdicts.json").write_text(json.dumps({"of": {}, "verdicts": verdicts}))
    return folder


def test_the_table_tells_new_from_old_and_before_from_after(clips_folder, tmp_path):
    places = {"before": perfect(tmp_path / "before", ("orange",)), "after": perfect(tmp_path / "after", ("red",))}
    record = measure(clips_folder, places)
    assert (record["oracle_accuracy"], record["oracle_clips"]) == (1.0, 204)
    before, after = ([record[when][group]["all"] for group in GROUPS] for when in places)
    assert before == [1, 1, 0, 0]
    assert after == pytest.approx([5 / 6, 5 / 6, 1, 1], abs=1e-4)
    assert [record["after"][group]["clips"] for group in GROUPS] == [48, 48, 16, 8]
    assert [record["before"][group]["shape"] for group in GROUPS] == [1, 1, 1, 1]
    text = summary(tmp_path, record | {"full_checkpoint_bytes": 20_000_000, "lora_checkpoint_bytes": 1_000_000}, 200.0)
    assert "0% → 100%" in text
    assert "1.00 MB, 5.0% of the 20.0 MB" in text
    write_sheet(places, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 7 * 96


def test_an_oracle_that_fails_is_not_believed(clips_folder, monkeypatch):
    monkeypatch.setattr(measuring, "accuracy", lambda *of: 0.98)
    with pytest.raises(RuntimeError, match=r"98\.0%"):
        measure(clips_folder, {})


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(UserError, match="Run `make quickstart` first"):
        check_base_run(load_recipe(find_recipe("jobs/quickstart_lora.yaml"), {"model.init_from": str(tmp_path)}))


def test_the_base_of_the_recipe_is_the_quickstarts_model():
    base, ours = load_recipe(find_recipe("jobs/quickstart.yaml")), load_recipe(find_recipe("jobs/quickstart_lora.yaml"))
    assert ours.model.init_from == f"{base.train.output}/{base.name}"
    assert {**vars(ours.model), "init_from": ""} == vars(base.model)
    assert (ours.codec, ours.diffusion) == (base.codec, base.diffusion)
    assert ours.lora.rank == 8


def test_nothing_is_orange_without_the_new_colour():
    video = draw(Scene("orange", "circle", "left"), np.random.default_rng(1))
    assert classify(video, ALL_COLOURS) == Verdict("orange", "circle", "left")
    assert classify(video).colour is None


def test_of_two_close_hues_the_nearest_to_the_median_counts():
    """The embedded VAE makes orange mottled, between red and yellow."""
    rng, colours = np.random.default_rng(2), {"red": 0.0, "orange": 22.1, "yellow": 50.0}
    for name, middle in colours.items():
        video = draw(Scene(name, "square", "up"), rng).astype(float)
        hues = np.deg2rad(middle + rng.uniform(-9, 9, video.shape[:3]))
        mottled = 130 + 100 * np.stack([np.cos(hues - np.deg2rad(k)) for k in (0, 120, 240)], axis=-1)
        shown = np.where((video.max(-1) > 100)[..., None], mottled, video).clip(0, 255).astype(np.uint8)
        assert classify(shown, ALL_COLOURS) == Verdict(name, "square", "up")
