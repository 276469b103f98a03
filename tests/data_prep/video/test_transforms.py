"""Cropping and resizing, against closed forms and against Pillow."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.buckets import Bucket
from data_prep.video.transforms import random_crop_and_flip, resize_to_bucket
from sora_train.data.config import DataConfig


@pytest.mark.parametrize("times", [2.0, 2.13, 2.5, 3.0, 4.0])
def test_stripes_too_fine_for_the_bucket_become_grey(times: float):
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))[..., None].repeat(3, 2)  # one pixel dark, one bright
    side = round(256 / times)
    assert np.abs(resize_to_bucket(stripes, Bucket(1, side, side, 8)).astype(int) - 127).max() < 20


@pytest.mark.parametrize("size", [(180, 320), (300, 300), (512, 910), (1000, 700), (100, 100)])
def test_a_flat_frame_stays_flat_and_a_slope_stays_a_slope(size: tuple[int, int]):
    flat = np.full((*size, 3), 77, np.uint8)
    assert (resize_to_bucket(flat, Bucket(1, 256, 256, 8)) == 77).all()
    slope = np.broadcast_to(np.linspace(20, 220, size[1])[None, :, None], (*size, 3)).round().astype(np.uint8)
    left, _, right, _ = Bucket(1, 256, 256, 8).crop_box(size[1], size[0])
    middles = left + (np.arange(256) + 0.5) * (right - left) / 256 - 0.5
    expected = np.interp(middles, np.arange(size[1]), np.linspace(20, 220, size[1]))
    assert np.abs(resize_to_bucket(slope, Bucket(1, 256, 256, 8))[100, 3:-3, 0] - expected[3:-3]).max() < 2.5


@pytest.mark.parametrize("times", [0.6, 1.1, 1.41, 1.88, 2.11, 2.81, 4.2])
def test_real_frames_are_near_pillows_antialiased_bicubic(shared: Path, times: float):
    with av.open(str(shared / "data" / "clips" / "flower.mp4")) as file:
        frame = next(file.decode(video=0)).to_ndarray(format="rgb24")[:, 210:750]
    side = round(540 / times)
    expected = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC))
    apart = resize_to_bucket(frame, Bucket(1, side, side, 8)).astype(float) - expected
    assert 10 * np.log10(255**2 / (apart**2).mean()) > 43


def test_frames_of_the_buckets_own_size_are_untouched():
    frame = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_to_bucket(frame, Bucket(8, 32, 64, 8)), frame)


def test_a_mirrored_frame_is_the_frame_mirrored():
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    bucket = Bucket(1, 64, 64, 8)
    np.testing.assert_array_equal(
        resize_to_bucket(frame, bucket, mirrored=True), resize_to_bucket(frame, bucket)[:, ::-1]
    )


def test_the_place_moves_the_crop():
    frame = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    for place, first in ((0.0, 0), (0.5, 50), (1.0, 100)):
        assert resize_to_bucket(frame, Bucket(1, 100, 100, 8), place=(place, 0.0))[0, 0, 0] == first


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 7), (4000, 30)])
def test_frames_of_any_size_fill_the_bucket(size: tuple[int, int]):
    for pixel_aspect in (1 / 8, 1.0, 8.0):
        assert resize_to_bucket(np.zeros((*size, 3), np.uint8), Bucket(1, 64, 96, 8), pixel_aspect).shape == (64, 96, 3)


def test_crop_and_flip_are_random_only_if_asked_for():
    asked = DataConfig(crop="random", flip=True)
    draws = [random_crop_and_flip(f"{i:04x}", asked) for i in range(2000)]
    assert draws == [random_crop_and_flip(f"{i:04x}", asked) for i in range(2000)]
    places = np.array([place for place, _ in draws])
    assert np.abs(places.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.quantile(places, [0.1, 0.9], axis=0) - [[0.1], [0.9]]).max() < 0.03
    assert abs(np.mean([mirrored for _, mirrored in draws]) - 0.5) < 0.04
    assert random_crop_and_flip("0001", asked) == (
        (0.5333725000337676, 0.7830899930860284),
        False,
    )  # on this machine and any other
    assert {random_crop_and_flip(f"{i}", DataConfig()) for i in range(50)} == {((0.5, 0.5), False)}
