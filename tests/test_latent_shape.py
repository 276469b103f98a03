"""Which clips a VAE and a model divide, and the nearest that they do."""

import re
from itertools import product

import pytest

from sora_train.data.config import DataConfig, undividable_shapes
from sora_train.latent_shape import latent_shape, shape_errors


@pytest.mark.parametrize(("factor", "time_factor"), [(8, 1), (8, 4), (16, 4), (1, 2)])
def test_the_nearest_shapes_divide_and_those_between_do_not(factor: int, time_factor: int):
    patch = 2
    for shape in product(range(1, 10), range(1, 100, 7), (factor * patch,)):
        wrong = shape_errors(shape, factor, time_factor, patch)
        divides = (shape[0] - 1) % time_factor == 0 and shape[1] % (factor * patch) == 0
        assert bool(wrong) != divides
        for sentence in wrong:
            axis = ("frames", "height", "width").index(sentence.split()[0])
            offered = [int(n) for n in re.findall(r"\d+", sentence.rpartition("use ")[2])]
            assert offered
            for n in range(min(offered) if len(offered) > 1 else 1, max(offered) + 1):
                other = list(shape)
                other[axis] = n
                left = shape_errors((other[0], other[1], other[2]), factor, time_factor, patch)
                assert (len(left) < len(wrong)) == (n in offered)


def test_a_message_names_the_key_the_value_and_the_remedy():
    assert undividable_shapes(DataConfig(height=100, width=8), 8, 1, 2) == [
        "data.height 100 does not divide by 16 (VAE 8 x model.patch 2); use 96 or 112",
        "data.width 8 does not divide by 16 (VAE 8 x model.patch 2); use 16",
    ]
    assert undividable_shapes(DataConfig(buckets=("81x480x832", "16x704x1280", "1x480x832")), 8, 4, 2) == [
        "data.buckets: 16x704x1280: frames 16 is not 4k+1, as the VAE needs; use 13 or 17"
    ]
    assert undividable_shapes(DataConfig(frames=121, height=720, width=1280), 16, 4, 2) == [
        "data.height 720 does not divide by 32 (VAE 16 x model.patch 2); use 704 or 736"
    ]
    assert shape_errors((5, 30, 32), 4, 1) == ["height 30 does not divide by 4, the VAE's factor; use 28 or 32"]


def test_latents_of_wans_published_shapes():
    assert latent_shape(16, 8, 4, 81, 480, 832) == (21, 16, 60, 104)
    assert latent_shape(48, 16, 4, 121, 704, 1280) == (31, 48, 44, 80)
