"""Which frames and which part of them a bucket takes."""

import numpy as np
import pytest

from data_prep.buckets import Bucket, nearest_frames


def test_the_crop_of_a_wide_frame_is_its_centre_in_the_buckets_shape():
    assert Bucket(1, 100, 100, 8).crop_box(400, 200) == (100, 0, 300, 200)
    assert Bucket(1, 100, 100, 8).crop_box(200, 400) == (0, 100, 200, 300)
    assert Bucket(1, 90, 160, 8).crop_box(1920, 1080) == (0, 0, 1920, 1080)


def test_pixels_that_are_not_square_are_cropped_by_how_they_look():
    left, top, right, bottom = Bucket(1, 100, 100, 8).crop_box(240, 240, pixel_aspect=16 / 9)
    assert (right - left) * 16 / 9 == pytest.approx(bottom - top)
    assert (left + right, top, bottom) == (240, 0, 240)


def test_the_nearest_frame_is_taken_and_of_two_the_earlier():
    starts = np.array([0.0, 0.1, 0.2, 1.0])
    due = np.array([0.0, 0.04, 0.05, 0.06, 0.59, 0.61, 5.0])
    assert nearest_frames(starts, due).tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert nearest_frames(np.array([0.0]), due).tolist() == [0] * 7


def test_nearest_agrees_with_looking_at_every_frame():
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(0, 10, 50))
    due = rng.uniform(0, 11, 200)
    assert nearest_frames(starts, due).tolist() == np.abs(starts - due[:, None]).argmin(1).tolist()


def test_a_clip_is_filled_by_its_own_length_and_by_what_containers_round_it_to():
    bucket = Bucket(8, 64, 64, 8)
    assert bucket.is_filled_by(1.0)
    assert bucket.is_filled_by(0.999)
    assert not bucket.is_filled_by(0.96)
