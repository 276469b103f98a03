"""The oracle reads real clips rightly, soft and noisy ones too, and says None where a person would shrug."""

import numpy as np
import pytest
from scipy import ndimage

from sora_train.quickstart.oracle import Verdict, accuracy, classify, prompt_accuracy
from sora_train.quickstart.shapes import FPS, GROUND, Scene, all_scenes, coverage, draw
from sora_train.video import read_mp4, write_mp4

NOTHING = Verdict(None, None, None)
PATH = np.linspace(-12, 12, 8)


@pytest.fixture(scope="module")
def real_clips(tmp_path_factory) -> list[np.ndarray]:
    """Every scene, through H.264 and back."""
    path = tmp_path_factory.mktemp("oracle") / "clip.mp4"
    clips = []
    for i, scene in enumerate(all_scenes()):
        write_mp4(path, draw(scene, np.random.default_rng((11, i))), fps=FPS, crf=10)
        clips.append(read_mp4(path))
    return clips


def paint(*objects: tuple[str, tuple[int, int, int], np.ndarray, np.ndarray], radius: float = 11.0) -> np.ndarray:
    """A clip of objects (shape, colour, path of x, path of y), positions counted from the middle of 64 x 64 pixels."""
    y, x = np.mgrid[:64, :64] - 31.5
    video = np.tile(np.array(GROUND, float), (8, 64, 64, 1))
    for shape, colour, along_x, along_y in objects:
        for frame, to_x, to_y in zip(video, along_x, along_y, strict=True):
            alpha = coverage(shape, x - to_x, y - to_y, radius)[..., None]
            frame += alpha * (np.array(colour, float) - frame)
    return np.rint(video).astype(np.uint8)


@pytest.mark.parametrize(("blur", "noise"), [(0, 0), (1, 20), (2, 10)])
def test_the_judge_is_right_on_real_clips_soft_and_noisy_ones_too(real_clips, blur, noise):
    rng = np.random.default_rng(0)
    clips = [ndimage.gaussian_filter(clip.astype(float), (0, blur, blur, 0)) for clip in real_clips]
    clips = [np.clip(np.rint(clip + rng.normal(0, noise, clip.shape)), 0, 255).astype(np.uint8) for clip in clips]
    assert accuracy(clips, all_scenes()) >= 0.99


def test_a_clip_against_another_caption_is_wrong_in_what_differs(real_clips):
    verdict = classify(real_clips[0])
    assert verdict == Verdict("red", "circle", "left")
    shares = prompt_accuracy([verdict], [Scene("red", "square", "left")])
    assert (shares["colour"], shares["shape"], shares["direction"], shares["all"]) == (1, 0, 1, 0)


@pytest.mark.parametrize("level", [0, 18, 128, 255])
def test_a_uniform_clip_shows_nothing(level):
    assert classify(np.full((8, 64, 64, 3), level, np.uint8)) == NOTHING


def test_noise_shows_nothing():
    rng = np.random.default_rng(0)
    assert classify(rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)) == NOTHING
    for scale in (20, 60):  # noise with structure, as an untrained model draws it
        smooth = ndimage.gaussian_filter(rng.normal(0, 1, (8, 64, 64, 3)), (0, 4, 4, 0))
        assert classify(np.clip(128 + scale * smooth / smooth.std(), 0, 255).astype(np.uint8)) == NOTHING


def test_two_shapes_show_nothing():
    still = np.zeros(8)
    red, blue = ("circle", (230, 50, 50), PATH, still - 15), ("circle", (60, 100, 240), PATH, still + 15)
    assert classify(paint(red)) == Verdict("red", "circle", "right")
    assert classify(paint(red, blue)) == NOTHING


def test_a_shape_that_stands_still_or_trembles_goes_nowhere():
    still, tremble = np.zeros(8), np.array([0, 1, -1, 1, 0, -1, 1, 0])
    for path in (still, tremble, PATH / 4):
        assert classify(paint(("square", (60, 200, 80), path, still))) == Verdict("green", "square", None)


def test_a_diagonal_is_no_direction():
    assert classify(paint(("square", (60, 200, 80), PATH, PATH))) == Verdict("green", "square", None)
    assert classify(paint(("square", (60, 200, 80), PATH, PATH / 2))).direction is None


def test_a_shape_that_turns_back_or_jumps_goes_nowhere():
    still, back = np.zeros(8), np.array([-12, 0, 12, 4, 0, -4, 0, 6])
    jump = np.repeat([-12, 12], 4)
    for path in (back, jump):
        assert classify(paint(("circle", (235, 235, 235), path, still))).direction is None


@pytest.mark.parametrize("colour", [(250, 140, 30), (30, 220, 220), (120, 120, 120), (90, 20, 20)])
def test_a_colour_without_a_name_here_is_none(colour):
    assert classify(paint(("circle", colour, PATH, np.zeros(8)))).colour is None


def test_a_clip_that_changes_colour_or_shape_half_way_has_none():
    still = np.zeros(8)
    red, blue = paint(("circle", (230, 50, 50), PATH, still)), paint(("square", (60, 100, 240), PATH, still))
    assert classify(np.concatenate([red[:4], blue[4:]])) == Verdict(None, None, "right")


def test_other_shapes_are_none():
    rings = paint(("circle", (230, 50, 50), PATH, np.zeros(8)))
    rings[paint(("circle", (255, 255, 255), PATH, np.zeros(8)), radius=7.0)[..., 0] > 128] = GROUND
    assert classify(rings) == NOTHING
    assert classify(paint(("triangle", (230, 50, 50), PATH, np.zeros(8)))[:, ::-1]).shape is None
    bar = paint(("square", (230, 50, 50), PATH, np.zeros(8)), radius=14.0)
    bar[:, :26], bar[:, 38:] = GROUND, GROUND
    assert classify(bar).shape is None


def test_a_shape_that_is_gone_in_half_of_the_frames_shows_nothing():
    clip = paint(("circle", (230, 50, 50), PATH, np.zeros(8)))
    clip[2:6] = GROUND
    assert classify(clip) == NOTHING
    assert classify(clip[:1]) == NOTHING


def test_obedience_counts_seen_and_held_out_captions_apart():
    scenes = all_scenes()
    verdicts = [Verdict(s.colour, s.shape, None if s.held_out else s.direction) for s in scenes]
    shares = prompt_accuracy(verdicts, scenes)
    assert shares["clips"] == 72
    assert shares["seen"]["clips"] == 48
    assert shares["held_out"]["clips"] == 24
    assert shares["seen"]["all"] == 1
    assert shares["held_out"] == {
        "colour": 1,
        "direction": 0,
        "shape": 1,
        "all": 0,
        "clips": 24,
    }
    assert shares["direction"] == round(48 / 72, 4)
    assert prompt_accuracy([], [])["clips"] == 0
