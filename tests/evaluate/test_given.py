"""Figures of given first frames: what one computes by hand, and zero for a model that the frames do not reach."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.given import read_given
from sora_train import cli
from sora_train.diffusion import ConditioningConfig
from sora_train.errors import UserError
from sora_train.evaluate import evaluate
from sora_train.evaluate.given import given_figures, measure_given
from sora_train.evaluate.heldout import choose_clips
from sora_train.evaluate.metrics import captions_of, open_held_out, real_videos
from sora_train.launch.images import read_images, save_images
from sora_train.launch.validation import validate
from sora_train.options import EvalOptions
from sora_train.recipe import load_recipe, save_recipe
from sora_train.sample import Run, generate_each, load_run
from sora_train.sample.condition import encode_given
from sora_train.video import psnr

BUCKET = "16x16x24"


def conditioned(run: Run, probability: float = 0.5, frames: int = 1) -> Run:
    section = ConditioningConfig(frames=frames, probability=probability)
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"conditioning": section}))


def test_figures_of_a_hand_made_case():
    given = np.full((2, 1, 4, 6, 3), 100, np.uint8)
    kept, free = (np.full((2, 3, 4, 6, 3), 100, np.uint8) for _ in range(2))
    kept[0, 0] += 2  # an error of 2 in one clip's given frame, of 4 in the other's
    kept[1, 0] -= 4
    free[:, 0] = 0  # frames in place of the given ones do not count
    free[0, 1:] += 3
    free[1, 1] += 10
    found = given_figures(zip(given, kept, free, strict=True))
    assert found["given_psnr"] == pytest.approx(10 * math.log10(255**2 / ((4 + 16) / 2)))
    assert found["given_effect"] == pytest.approx(math.sqrt((9 + 50) / 2))
    assert found["given_clips"] == 2
    same = given_figures([(given[0], given.repeat(3, 1)[0], given.repeat(3, 1)[0])])
    assert same == {"given_psnr": 100.0, "given_effect": 0.0, "given_clips": 1}


def test_figures_are_those_of_samples_with_and_without_the_clips_frames(run: Run):
    taken, remarks = conditioned(run, frames=2), list[str]()
    found = measure_given(taken, run.recipe.validation, run.recipe.data.output, 3, lambda *_: None, remarks.append)
    assert remarks == []
    shards = open_held_out(run, run.recipe.data.output)
    places = choose_clips(run, shards, 3, (BUCKET,), f"given frames of {BUCKET}", remarks.append)
    starts = [video[:2] for video in real_videos(run, shards, places, lambda *_: None)]
    prompts, texts = captions_of(run, shards, places)
    with_frames, without = (
        np.stack(list(generate_each(run, prompts, range(3), embeddings=texts, given=given)))
        for given in ([encode_given(run, start) for start in starts], None)
    )
    assert found["given_psnr"] == pytest.approx(psnr(with_frames[:, :2], np.stack(starts)))
    later = with_frames[:, 2:].astype(float) - without[:, 2:]
    assert found["given_effect"] == pytest.approx(math.sqrt((later**2).mean()))
    assert found["given_effect"] > 0


def test_a_model_that_the_given_frames_do_not_reach_has_no_effect(run_folder: Path, run: Run):
    deaf = conditioned(load_run(run_folder, device="cpu"))
    torch.nn.init.zeros_(deaf.model.patch_out.weight)  # its output is the same whatever it is given
    ask, shards = run.recipe.validation, run.recipe.data.output
    hears, not_at_all = (
        measure_given(each, ask, shards, 2, lambda *_: None, print) for each in (conditioned(run), deaf)
    )
    assert not_at_all["given_effect"] == 0
    assert hears["given_effect"] > 0


def test_eval_measures_given_frames_of_a_run_that_was_trained_with_them(run_folder: Path, tmp_path: Path, capsys):
    assert "given_psnr" not in evaluate(run_folder, EvalOptions(holdout_clips=2, out=str(tmp_path / "a.json")))
    with pytest.raises(UserError, match=r"--given_clips: .* can't continue given frames"):
        evaluate(run_folder, EvalOptions(given_clips=2))
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    recipe = load_recipe(folder / "recipe.yaml", {"conditioning.probability": 0.5})
    save_recipe(recipe, folder / "recipe.yaml")
    capsys.readouterr()
    assert cli.main(["eval", str(folder), "--holdout_clips", "2", "--given_clips", "3"]) == 0
    record = json.loads((folder / "eval.json").read_text())
    assert record["given_clips"] == 3
    table = capsys.readouterr().out
    assert f"given frames    {record['given_psnr']:>10.1f}  dB, PSNR" in table
    assert f"  effect        {record['given_effect']:>10.1f}  of 255" in table
    assert evaluate(folder, EvalOptions(holdout_clips=2))["given_clips"] == 8
    assert "given_psnr" not in evaluate(folder, EvalOptions(holdout_clips=2, given_clips=0))


def test_a_validation_begins_with_the_images_of_the_run_folder(run_folder: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    images = {"validation.images": ["", str(tmp_path / "first.png")], "validation.every": 1000}
    recipe = load_recipe(folder / "recipe.yaml", {"conditioning.probability": 0.5, **images})
    save_recipe(recipe, folder / "recipe.yaml")
    run = load_run(folder)
    save_images(folder, read_images(recipe, run.manifest))
    (given,) = read_given([str(tmp_path / "first.png")], "--image", (1, 16, 24), run.fps)
    (tmp_path / "first.png").unlink()  # a validation may run where it is not
    validate(folder / "checkpoints" / "step_00000020", folder)
    samples = folder / "samples" / "step_00000020"
    listed = json.loads((samples / "samples.json").read_text())["samples"]
    assert [entry.get("given") for entry in listed] == [
        None, {"file": given.file_name, "sha256": given.sha256, "frames": 1},
    ]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(samples / given.file_name)), picture)
    assert 'alt="Given first frame"' in (folder / "report.html").read_text()
