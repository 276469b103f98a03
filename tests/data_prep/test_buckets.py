"""A bucket's frames and crop, and the choice of a clip's bucket."""

import itertools

import pytest

from data_prep.buckets import Bucket, buckets_of, choose_bucket
from data_prep.reasons import ClipError
from sora_train.data.config import DataConfig

WIDE, TALL, SQUARE = Bucket(16, 256, 448, 8), Bucket(16, 448, 256, 8), Bucket(16, 256, 256, 8)
SMALL, LARGE, LONG, STILL = (
    Bucket(16, 128, 224, 8),
    Bucket(16, 512, 896, 8),
    Bucket(48, 256, 256, 8),
    Bucket(1, 256, 256, 8),
)
ALL = (WIDE, TALL, SQUARE, SMALL, LARGE, LONG, STILL)


def test_the_crop_is_the_centre_in_the_buckets_shape():
    assert Bucket(1, 100, 100, 8).crop_box(400, 200) == (100, 0, 300, 200)
    assert Bucket(1, 100, 100, 8).crop_box(200, 400) == (0, 100, 200, 300)
    assert Bucket(1, 90, 160, 8).crop_box(1920, 1080) == (0, 0, 1920, 1080)


def test_the_offset_moves_the_crop():
    assert Bucket(1, 100, 100, 8).crop_box(400, 200, offset=(0.0, 0.7)) == (0, 0, 200, 200)
    assert Bucket(1, 100, 100, 8).crop_box(400, 200, offset=(1.0, 0.7)) == (200, 0, 400, 200)


def test_non_square_pixels_are_cropped_by_their_display_shape():
    left, top, right, bottom = Bucket(1, 100, 100, 8).crop_box(240, 240, pixel_aspect=16 / 9)
    assert (right - left) * 16 / 9 == pytest.approx(bottom - top)
    assert (left + right, top, bottom) == (240, 0, 240)


def test_a_rounded_duration_fills_a_clip():
    bucket = Bucket(8, 64, 64, 8)
    assert bucket.is_filled_by(1.0)
    assert bucket.is_filled_by(0.999)
    assert not bucket.is_filled_by(0.96)


def test_a_recipes_buckets_are_its_shapes_at_its_rate():
    assert buckets_of(DataConfig(buckets=("16x256x448", "1x64x64"), fps=12.0)) == (
        Bucket(16, 256, 448, 12.0),
        Bucket(1, 64, 64, 12.0),
    )
    assert buckets_of(DataConfig()) == (Bucket(16, 256, 256, 8.0),)


@pytest.mark.parametrize(
    ("size", "seconds", "bucket"),
    [
        ((1920, 1080), 3.0, LARGE),  # the largest of its shape that needs no enlarging
        ((640, 360), 3.0, WIDE),
        ((200, 110), 3.0, SMALL),  # all of its shape enlarge: the one that does so least
        ((1080, 1920), 3.0, TALL),
        ((500, 480), 3.0, SQUARE),
        ((1920, 1080), 7.0, LONG),  # the most frames come before the nearest shape
    ],
)
def test_length_comes_before_shape_and_shape_before_size(size, seconds, bucket):
    for buckets in (ALL, ALL[::-1]):
        assert choose_bucket(buckets, *size, seconds) == bucket


def test_an_image_goes_to_a_bucket_of_one_frame():
    assert choose_bucket(ALL, 1920, 1080, 0.0, still=True) == STILL
    assert choose_bucket((STILL,), 1920, 1080, 5.0) == STILL
    with pytest.raises(ClipError, match="has a single frame, and data.buckets no bucket of one") as error:
        choose_bucket((WIDE,), 1920, 1080, 0.0, still=True)
    assert error.value.reason == "too_short"
    with pytest.raises(ClipError, match=r"lasts 1\.00 s; a clip of 16 frames at 8 fps takes 2\.00 s") as error:
        choose_bucket(ALL, 1920, 1080, 1.0)
    assert error.value.reason == "too_short"


def test_a_clip_beyond_the_enlargement_bound_is_too_small():
    assert choose_bucket((WIDE, SQUARE), 300, 171, 3.0) == WIDE
    assert choose_bucket((WIDE, SQUARE), 320, 200, 3.0, max_enlarge=1.3) == SQUARE
    with pytest.raises(ClipError, match=r"is 300x171; 16x256x448 would enlarge it 1\.50 times") as error:
        choose_bucket((WIDE, SQUARE), 300, 171, 3.0, max_enlarge=1.2)
    assert error.value.reason == "too_small"


def test_the_order_of_buckets_does_not_matter():
    assert {choose_bucket(order, 300, 300, 3.0) for order in itertools.permutations((WIDE, TALL))} == {WIDE}
