"""The stages that only the quickstart has: clips, choice of captions, sheet, measurement."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.errors import UserError
from sora_train.quickstart import measure as measuring
from sora_train.quickstart import run as demo_run
from sora_train.quickstart.measure import SEEDS, VERDICTS, measure_samples, scenes, write_verdicts
from sora_train.quickstart.oracle import classify
from sora_train.quickstart.run import clips, find_recipe, is_sampled, summary, write_sheet
from sora_train.quickstart.shapes import draw, make_clips
from sora_train.recipe import Recipe
from sora_train.video import read_mp4, write_mp4


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder, 16)
    return folder


@pytest.fixture(scope="module")
def perfect(tmp_path_factory) -> Path:
    """What a model without a fault would leave in samples/final; tests take copies."""
    folder = tmp_path_factory.mktemp("perfect")
    files, listing, verdicts = [], [], []
    for scene in scenes():
        for seed in SEEDS:
            files.append(folder / f"{len(files):03d}.mp4")
            video = draw(scene, np.random.default_rng((5, len(files))))
            verdicts.append(classify(video))
            write_mp4(files[-1], video, fps=8)
            listing.append({"file": files[-1].name, "prompt": scene.caption, "seed": seed})
    (folder / "samples.json").write_text(json.dumps({"checkpoint": "step_00000007", "samples": listing}))
    write_verdicts(folder, verdicts)
    return folder


def copied(perfect: Path, to: Path) -> list[Path]:
    """The videos of a copy."""
    shutil.copytree(perfect, to, copy_function=shutil.copy)  # newer than the checkpoint, as samples are
    return sorted(to.glob("*.mp4"))


def recipe(folder: Path) -> Recipe:
    return Recipe.model_validate({"data": {"captions": str(folder / "captions.csv")}})


def test_clips_are_made_once_and_again_where_one_is_missing(tmp_path, capsys):
    clips(recipe(tmp_path), 6)
    made = read_mp4(tmp_path / "clip_00003.mp4")
    (tmp_path / "clip_00003.mp4").unlink()
    clips(recipe(tmp_path), 6)
    assert np.array_equal(read_mp4(tmp_path / "clip_00003.mp4"), made)
    capsys.readouterr()
    clips(recipe(tmp_path), 6)
    assert "already" in capsys.readouterr().out
    clips(recipe(tmp_path), 8)
    assert len(list(tmp_path.glob("*.mp4"))) == 8


def test_captions_of_somebody_else_are_not_overwritten(tmp_path):
    mine = Recipe.model_validate({"data": {"captions": str(tmp_path / "mine.csv")}})
    with pytest.raises(UserError, match=r"captions\.csv"):
        clips(mine, 6)


def test_half_of_the_captions_is_held_out_and_both_halves_are_balanced():
    seen, held_out = scenes()[:24], scenes()[24:]
    assert len(set(scenes())) == 48
    assert not any(scene.held_out for scene in seen)
    assert all(scene.held_out for scene in held_out)
    for half in (seen, held_out):
        assert set(Counter(scene.colour for scene in half).values()) == {4}
        assert set(Counter(scene.shape for scene in half).values()) == {8}
        assert set(Counter(scene.direction for scene in half).values()) == {6}


def test_obedience_counts_what_is_wrong_where_it_is_wrong(clips_folder, perfect, tmp_path, capsys):
    files = copied(perfect, tmp_path / "samples" / "final")
    videos = [draw(scene, np.random.default_rng((5, i))) for i, scene in enumerate(np.repeat(scenes(), len(SEEDS)), 1)]
    for i in range(48, 60):  # a quarter of the held-out ones, reversed in time: only the direction is wrong
        videos[i] = videos[i][::-1]
    write_verdicts(files[0].parent, [classify(video) for video in videos])
    for file in files:  # the files are only to look at
        file.write_bytes(b"damaged")
    shares = measure_samples(clips_folder, tmp_path, tmp_path / "samples" / "final")
    record = json.loads((tmp_path / "obedience.json").read_text())
    assert record["judge_accuracy"] >= 0.99
    assert "of 40 real clips" in capsys.readouterr().out
    assert (shares["clips"], shares["seen"]["clips"], shares["held_out"]["clips"]) == (96, 48, 48)
    assert shares["seen"]["all"] == shares["colour"] == shares["shape"] == 1
    assert shares["held_out"]["direction"] == shares["held_out"]["all"] == 0.75
    words = summary(tmp_path, shares, 312.4)
    assert "5 min 12 s" in words
    assert "75%" in words
    assert len(words.splitlines()) < 24


def test_a_judge_that_fails_on_real_clips_is_not_believed(clips_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "accuracy", lambda *of: 0.98)
    with pytest.raises(RuntimeError, match=r"98\.0%"):
        measure_samples(clips_folder, tmp_path, tmp_path)


def test_the_sheet_shows_every_colour_seen_and_held_out(perfect, tmp_path, monkeypatch):
    shown = {}
    draw_sheet = demo_run.contact_sheet
    monkeypatch.setattr(
        demo_run,
        "contact_sheet",
        lambda v, labels, badges: shown.update(zip(labels, badges, strict=True)) or draw_sheet(v, labels, badges),
    )
    write_sheet(copied(perfect, tmp_path / "final"), len(SEEDS), tmp_path / "sheet.png")
    truth = {scene.caption: "held out" if scene.held_out else "seen" for scene in scenes()}
    assert len(shown) == 12
    assert all(truth[caption] == badge for caption, badge in shown.items())
    assert set(Counter((caption.split()[1], badge) for caption, badge in shown.items()).values()) == {1}
    assert {caption.split()[2] for caption in shown} == {"circle", "square", "triangle"}
    assert {caption.split()[4] for caption in shown} == {"left", "right", "up", "down"}
    assert Image.open(tmp_path / "sheet.png").width > 1000


def test_samples_are_made_again_for_another_checkpoint_or_where_one_is_missing(perfect, tmp_path):
    old, new = tmp_path / "step_00000007", tmp_path / "step_00000008"
    for checkpoint in (old, new):
        checkpoint.mkdir()
        (checkpoint / "ema.safetensors").touch()
    files = copied(perfect, tmp_path / "final")
    wanted = [(scene.caption, seed) for scene in scenes() for seed in SEEDS]
    assert is_sampled(tmp_path / "final", old, wanted)
    assert not is_sampled(tmp_path / "final", old, wanted[1:])
    assert not is_sampled(tmp_path / "final", new, wanted)
    files[5].rename(tmp_path / "away")
    assert not is_sampled(tmp_path / "final", old, wanted)
    (tmp_path / "away").rename(files[5])
    (tmp_path / "final" / VERDICTS).unlink()
    assert not is_sampled(tmp_path / "final", old, wanted)
    assert not is_sampled(tmp_path / "none", old, wanted)


def test_the_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("jobs/quickstart.yaml").is_file()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "quickstart.yaml").touch()
    assert find_recipe("jobs/quickstart.yaml").resolve() == tmp_path / "jobs" / "quickstart.yaml"
    with pytest.raises(UserError, match="checkout"):
        find_recipe("jobs/none.yaml")
