"""The quickstart with a given first frame: what only it has, on samples that are real clips and on wrong ones."""

import json
from dataclasses import asdict

import numpy as np
from PIL import Image

from sora_train.quickstart.image import first_frame, measure, samples, write_sheet
from sora_train.quickstart.measure import VERDICTS
from sora_train.quickstart.oracle import Verdict, accuracy, classify
from sora_train.quickstart.shapes import COLOURS, DIRECTIONS, SHAPES, Scene, all_scenes, draw, make_clips

SOME = [(scene, 0) for scene in all_scenes()]


def clip(scene: Scene, seed: int = 0) -> np.ndarray:
    return draw(scene, np.random.default_rng((5, seed)), from_middle=True)


def test_the_oracle_is_right_on_clips_from_the_middle():
    assert accuracy([clip(scene, i) for i, scene in enumerate(all_scenes())], all_scenes()) >= 0.99


def test_the_first_frame_shows_all_but_the_direction(tmp_path):
    for colour in COLOURS:
        for shape in SHAPES:
            frames = [first_frame(Scene(colour, shape, direction), 0) for direction in DIRECTIONS]
            assert all(np.array_equal(frame, frames[0]) for frame in frames)
            assert not np.array_equal(frames[0], first_frame(Scene(colour, shape, "left"), 1))
    captions = make_clips(tmp_path, 48, image=True).read_text().splitlines()[1:]
    assert {line.split(",")[1] for line in captions} == {f"moving {direction}" for direction in DIRECTIONS}


def test_samples_count_if_they_keep_the_frame_and_follow_the_caption(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps({"checkpoint": "step_1"}))

    def measured(verdicts: list[Verdict], kept: float) -> dict:
        entries = [{**asdict(verdict), "psnr": kept} for verdict in verdicts]
        (tmp_path / VERDICTS).write_text(json.dumps(entries))
        return measure(tmp_path, tmp_path, SOME)

    right = measured([classify(clip(scene)) for scene, _ in SOME], 31.0)
    assert (right["all"], right["first_frame"], right["psnr"], right["clips"]) == (1, 1, 31, 72)
    # a model that does not see the frame guesses colour and shape; one that does not read the caption, the direction
    blind = measured([classify(clip(Scene("red", "circle", scene.direction))) for scene, _ in SOME], 12.0)
    assert (blind["direction"], blind["all"], blind["first_frame"]) == (1, round(4 / 72, 4), 0)
    deaf = measured([classify(clip(Scene(scene.colour, scene.shape, "up"))) for scene, _ in SOME], 31.0)
    assert (deaf["colour"], deaf["shape"], deaf["direction"]) == (1, 1, 0.25)
    assert json.loads((tmp_path / "obedience.json").read_text())["checkpoint"] == "step_1"


def test_the_sheet_shows_a_frame_of_every_colour_in_four_directions(tmp_path):
    pairs = samples()
    assert len(pairs) == len({(scene, seed) for scene, seed in pairs}) == 144
    write_sheet([clip(scene, seed) for scene, seed in pairs], pairs, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 1000
