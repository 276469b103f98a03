"""The order of samples: exactly once, another each epoch, in proportion, and the same whoever asks."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.order import (
    Batch,
    Bucket,
    SampleOrder,
    batch,
    batch_number,
    ordered_rows,
    permute,
    share,
    stable_hash,
)

COST = """
import time, tracemalloc
from fractions import Fraction
import numpy as np
from sora_train.data.order import Bucket, SampleOrder, batch
steps = np.random.default_rng(0).integers(0, 10**8, 500).tolist()
for ratio in (None, Fraction("0.2")):
    tracemalloc.start()
    buckets = Bucket("16x256x256", 10**9 - 70_001), Bucket("1x256x256", 70_001, images=True)
    plan = SampleOrder(buckets, 256, 0, image_ratio=ratio)
    batch(plan, steps[0])
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for k in steps:
        start = time.thread_time()
        batch(plan, k)
        times.append(time.thread_time() - start)
    print(memory, np.median(times))
"""

Spec = tuple[list[tuple[int, int, int | None]], int, int, int]
seeds = st.integers(0, 2**63)
own = st.none() | st.integers(4, 90)
specs = st.tuples(  # rows, group_rows and own batch_size of each bucket, batch_size, seed, window
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40), own), min_size=1, max_size=3),
    st.integers(4, 40),
    seeds,
    st.integers(1, 6),
)
quick = settings(max_examples=40)


def plan_of(spec: Spec) -> SampleOrder:
    shapes, batch_size, seed, window = spec
    buckets = [Bucket(f"bucket {i}", rows, group, False, size) for i, (rows, group, size) in enumerate(shapes)]
    return SampleOrder(tuple(buckets), batch_size, seed, window)


def epoch_of(plan: SampleOrder, epoch: int) -> list[Batch]:
    return [batch(plan, k) for k in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]


def order_of(plan: SampleOrder, epoch: int) -> np.ndarray:
    """A whole epoch's order of the plan's first bucket, before it is cut into batches."""
    return ordered_rows(plan, plan.buckets[0], epoch, 0, plan.buckets[0].rows)


def rows_of(batches: list[Batch], bucket: Bucket) -> list[int]:
    return [row for taken in batches if taken.bucket == bucket.name for row in taken.rows]


def digest(plan: SampleOrder) -> str:
    batches = [(taken.epoch, taken.bucket, taken.rows) for taken in (batch(plan, k) for k in range(600))]
    return hashlib.sha256(repr(batches).encode()).hexdigest()[:16]


@quick
@given(st.integers(1, 5000), seeds)
def test_permute_is_a_permutation(size: int, seed: int):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@quick
@given(st.integers(1, 10**9), seeds, st.data())
def test_permute_keeps_indices_of_any_size_apart_and_within_range(size: int, seed: int, data: st.DataObject):
    index = np.unique(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50)))
    image = permute(index, size, seed)
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < size


def test_every_permutation_of_four_comes_equally_often():
    draws = 4800
    found = Counter(tuple(permute(np.arange(4), 4, seed).tolist()) for seed in range(draws))
    expected = draws / 24
    chi_squared = sum((found[order] - expected) ** 2 / expected for order in permutations(range(4)))
    assert chi_squared < 50  # 23 degrees of freedom: exceeded by chance once in 1,100


def test_neighbours_lie_as_far_apart_as_in_a_random_permutation():
    size = 100_000
    image = permute(np.arange(size), size, 7)
    assert np.abs(np.diff(image)).mean() == pytest.approx(size / 3, rel=0.01)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / np.sqrt(size)


def test_the_order_is_this_one_on_every_machine():
    assert stable_hash(0, "a", 2**40) == 17828279784844153212
    assert permute(np.arange(4), 10**9, 3, "rows").tolist() == [235601559, 708305418, 80013052, 932102604]
    assert batch(SampleOrder((Bucket("8x64x64", 1000),), 8, 5), 200) == Batch(
        1, "8x64x64", (23, 106, 162, 342, 459, 704, 958, 975)
    )
    buckets = Bucket("16x64x64", 1000), Bucket("1x64x64", 77, 16, images=True), Bucket("8x64x64", 5)
    plan = SampleOrder(buckets, 8, 5, window=3)
    assert digest(plan) == "0bc76c2b6fa4426d"
    assert digest(replace(plan, image_ratio=Fraction("0.3"))) == "63d7e5434c2eda03"


@quick
@given(st.integers(1, 10**9), st.integers(1, 5000), st.integers(1, 100), seeds, st.data())
def test_rows_are_within_their_bucket_and_none_comes_twice(
    rows: int, group_rows: int, window: int, seed: int, data: st.DataObject
):
    plan = SampleOrder((Bucket("any", rows, group_rows),), 64, seed, window)
    steps = data.draw(st.sets(st.integers(0, plan.steps_per_epoch - 1), min_size=1, max_size=8))
    found = [row for step in steps for row in batch(plan, step).rows]
    assert len(set(found)) == len(found)
    assert min(found) >= 0
    assert max(found) < rows


@quick
@given(st.integers(30, 2000), st.integers(1, 40), st.integers(1, 6), seeds, st.integers(0, 10**6))
def test_no_two_epochs_have_the_same_order(rows: int, group_rows: int, window: int, seed: int, epoch: int):
    plan = SampleOrder((Bucket("any", rows, group_rows),), 8, seed, window)
    assert order_of(plan, epoch).tolist() != order_of(plan, epoch + 1).tolist()


@quick
@given(specs, st.integers(0, 5))
def test_an_epoch_has_every_row_once_in_batches_of_one_bucket(spec: Spec, epoch: int):
    plan = plan_of(spec)
    batches = epoch_of(plan, epoch)
    for bucket in plan.buckets:
        assert sorted(rows_of(batches, bucket)) == list(range(bucket.rows))
    first = order_of(plan, epoch)
    size = plan.buckets[0].batch_size or plan.batch_size
    cuts = [np.sort(first[i : i + size]) for i in range(0, len(first), size)]
    assert rows_of(batches, plan.buckets[0]) == np.concatenate(cuts).tolist()
    assert sum(len(taken.rows) for taken in batches) == sum(bucket.rows for bucket in plan.buckets)
    assert all(taken.epoch == epoch for taken in batches)


@quick
@given(specs)
def test_only_the_last_batch_of_a_bucket_is_short(spec: Spec):
    plan = plan_of(spec)
    batches = epoch_of(plan, 0)
    for bucket in plan.buckets:
        *others, last = [len(taken.rows) for taken in batches if taken.bucket == bucket.name]
        size = bucket.batch_size or plan.batch_size
        assert all(length == size for length in others)
        assert last == (bucket.rows - 1) % size + 1


@quick
@given(specs, st.integers(1, 40), st.integers(1, 9))
def test_all_ranks_get_equally_many_micro_batches_of_a_batch(spec: Spec, world: int, micro: int):
    plan = plan_of(spec)
    for taken in epoch_of(plan, 0):
        ranks = [share(taken, rank, world, micro) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {-(-len(taken.rows) // (world * micro))}
        assert {len(rows) for rank in ranks for rows in rank} == {micro}
        assert tuple(row for rank in ranks for rows in rank for row in rows if row is not None) == taken.rows
        sizes = [sum(row is not None for rows in rank for row in rows) for rank in ranks]
        assert max(sizes) - min(sizes) <= 1


@quick
@given(specs)
def test_any_stretch_of_steps_keeps_the_proportions_of_the_buckets(spec: Spec):
    plan = plan_of(spec)
    names = [taken.bucket for taken in epoch_of(plan, 0)]
    for bucket in plan.buckets:
        share_of_steps = -(-bucket.rows // (bucket.batch_size or plan.batch_size)) / len(names)
        excess = np.cumsum([0, *(float(name == bucket.name) - share_of_steps for name in names)])
        assert excess.max() - excess.min() < 1 + len(plan.buckets)


@given(st.integers(0, 300), st.lists(st.integers(0, 300)))
def test_steps_take_the_batches_that_are_not_skipped_in_order(step: int, skipped: list[int]):
    left = [number for number in range(step + len(skipped) + 1) if number not in skipped]
    assert batch_number(step, skipped) == left[step]


def test_two_epochs_and_two_seeds_order_the_same_rows_otherwise():
    plans = [SampleOrder((Bucket("16x256x256", 1500),), 16, seed) for seed in (0, 1)]
    orders = [order_of(plan, epoch) for plan in plans for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # by chance one row keeps its place


def test_a_data_set_of_one_window_is_shuffled_through_and_through():
    order = order_of(SampleOrder((Bucket("16x256x256", 1500),), 16, 0), 0)
    assert np.abs(np.diff(order)).mean() == pytest.approx(500, rel=0.05)
    assert abs(np.corrcoef(np.arange(1500), order)[0, 1]) < 4 / np.sqrt(1500)


def test_a_row_comes_at_any_time_of_an_epoch():
    """Also the last rows, whose group is short: their times over many epochs are spread as evenly as chance has it."""
    plan = SampleOrder((Bucket("short", 15, 4),), 1, 3, window=2)
    times = [order_of(plan, epoch).tolist().index(14) for epoch in range(300)]
    assert np.mean(times) == pytest.approx(7, abs=1)
    assert min(times) == 0
    assert max(times) == 14


def test_a_batch_touches_at_most_a_windows_groups():
    plan = SampleOrder((Bucket("large", 10**7),), 256, 0)
    for k in (0, 7, 12345):
        groups = [row // 32 for row in batch(plan, k).rows]
        assert len(set(groups)) <= 2 * plan.window  # two where the batch lies on the border of two windows
        (mine,) = share(batch(plan, k), 3, 16, 16)
        assert len({row // 32 for row in mine if row is not None}) <= 10


def test_a_batch_of_a_billion_rows_is_fast_and_takes_little_memory():
    """In a process of its own, where no annotation is checked."""
    found = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert len(lines) == 2  # without and with an image_ratio
    for line in lines:
        memory, seconds = map(float, line.split())
        assert memory < 2**20  # bytes
        assert seconds < 1e-3


@quick
@given(specs, st.integers(1, 500), st.integers(0, 9))
def test_with_new_data_every_epoch_takes_every_clip_once(spec: Spec, origin: int, epochs: int):
    plan = replace(plan_of(spec), origin=origin, epochs=epochs)
    steps = plan.steps_per_epoch
    for passed in range(2):
        taken = [batch(plan, origin + passed * steps + k) for k in range(steps)]
        assert {one.epoch for one in taken} == {plan.epoch(origin + passed * steps)} == {epochs + passed}
        for bucket in plan.buckets:
            assert sorted(rows_of(taken, bucket)) == list(range(bucket.rows))
    with pytest.raises(ValueError, match=f"batch {origin - 1} is before batch {origin}"):
        batch(plan, origin - 1)
