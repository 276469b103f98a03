"""Pictures beside videos: their share of the steps, and each kind exactly once in epochs of its own."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.order import Batch, Bucket, SampleOrder, batch
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError

shapes = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 40)), min_size=1, max_size=2)
mixes = st.tuples(  # rows and group_rows of each bucket of images and of videos, batch_size, seed, image_ratio
    shapes,
    shapes,
    st.integers(4, 40),
    st.integers(0, 2**63),
    st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=20),
)
Mix = tuple[list[tuple[int, int]], list[tuple[int, int]], int, int, Fraction]
quick = settings(max_examples=15)


def mixed_plan_of(mix: Mix) -> SampleOrder:
    images, videos, batch_size, seed, ratio = mix
    buckets = [Bucket(f"images {i}", *shape, images=True, batch_size=3 * batch_size) for i, shape in enumerate(images)]
    buckets += [Bucket(f"videos {i}", *shape) for i, shape in enumerate(videos)]
    return SampleOrder(tuple(buckets), batch_size, seed, window=3, image_ratio=ratio)


def is_of_pictures(taken: Batch) -> bool:
    return taken.bucket.startswith("images")


@quick
@given(mixes)
def test_with_a_ratio_images_and_videos_are_two_separate_orders(mix: Mix):
    order = mixed_plan_of(mix)
    taken = [batch(order, k) for k in range(100)]
    for kind in (True, False):
        mine = [found for found in taken if is_of_pictures(found) == kind]
        for j, found in enumerate(mine):
            assert found == batch(order.stream(images=kind), j)


@quick
@given(mixes)
def test_with_a_ratio_every_row_comes_once_an_epoch_of_its_stream(mix: Mix):
    order = mixed_plan_of(mix)
    found: dict[tuple[str, int], list[int]] = {}
    ended = dict.fromkeys((True, False), 0)
    for k in count():
        taken = batch(order, k)
        ended[is_of_pictures(taken)] = taken.epoch
        if min(ended.values()) >= 2:
            break
        found.setdefault((taken.bucket, taken.epoch), []).extend(taken.rows)
    for bucket in order.buckets:
        for epoch in range(2):
            assert sorted(found[bucket.name, epoch]) == list(range(bucket.rows))


@quick
@given(mixes, st.integers(0, 10**12), st.integers(1, 60))
def test_any_stretch_of_steps_holds_the_ratios_share_of_pictures(mix: Mix, start: int, length: int):
    order = mixed_plan_of(mix)
    images = sum(is_of_pictures(batch(order, k)) for k in range(start, start + length))
    assert order.image_ratio is not None
    assert images in (math.floor(order.image_ratio * length), math.ceil(order.image_ratio * length))


@quick
@given(mixes)
def test_the_epoch_of_a_run_is_that_of_the_next_batch_of_videos(mix: Mix):
    order = mixed_plan_of(mix)
    taken = [batch(order, k) for k in range(60)]
    videos = [k for k in range(60) if not is_of_pictures(taken[k])]
    for k in range(videos[-1] + 1):
        assert order.epoch(k) == taken[next(video for video in videos if video >= k)].epoch
    turns = replace(order, image_ratio=None)
    assert all(turns.epoch(k) == batch(turns, k).epoch for k in range(60))


@quick
@given(mixes)
def test_a_ratio_of_zero_leaves_out_pictures(mix: Mix):
    order = replace(mixed_plan_of(mix), image_ratio=Fraction(0))
    videos = order.stream(images=False)
    alone = replace(videos, image_ratio=Fraction(0))
    assert all(batch(order, k) == batch(videos, k) == batch(alone, k) for k in range(20))


def test_shards_follow_the_image_ratio_exactly_as_written(make_shards):
    make_shards(30)
    shards = ShardSet(make_shards(20, start=30, bucket=(1, 16, 24)))
    assert shards.sample_order(4, 0).image_ratio is None
    order = shards.sample_order(4, 0, image_ratio=0.1)
    assert order.image_ratio == Fraction(1, 10)
    assert [batch(order, k).bucket for k in range(100)].count("1x16x24") == 10
    assert {batch(shards.sample_order(4, 0, image_ratio=0.0), k).bucket for k in range(20)} == {"3x16x24"}


def test_a_ratio_without_images_or_without_videos_is_refused(make_shards):
    videos = ShardSet(make_shards(30))
    with pytest.raises(UserError, match=r"data\.image_ratio 0\.2 needs .*of images .*there is only 3x16x24"):
        videos.sample_order(4, 0, image_ratio=0.2)
    assert videos.sample_order(4, 0, image_ratio=0.0).steps_per_epoch == 8
    images = ShardSet(make_shards(30, bucket=(1, 16, 24), folder="images"))
    for ratio in (0.0, 0.2):
        with pytest.raises(UserError, match=rf"data\.image_ratio {ratio:g} needs buckets of videos.* only 1x16x24"):
            images.sample_order(4, 0, image_ratio=ratio)
