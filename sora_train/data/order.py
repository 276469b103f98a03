"""The order of samples: which clips make batch k, by arithmetic on (seed, k) alone, with no iterator and no state.

An epoch orders each bucket separately. Its rows form groups of `group_rows` neighbours, the size of a row group in the
shards. A keyed permutation orders the groups, and a second one the rows of each window of `window` groups. So a run
reads its shards one window of row groups after the other, and every epoch has another order. Buckets take turns in
proportion to their batches, one bucket per global step.

With an `image_ratio`, images and videos are two streams, each with its own epochs. A fixed share of the steps takes the
next batch of images, the other steps take the next batch of videos.

If a run continues with new data (`sora train --new-data`), batch numbers continue too, and an epoch of the new clips
begins at the number `origin`.

Every row comes exactly once in an epoch of its stream. The last batch of a bucket may be short; `share` pads it.

The permutation is a Feistel network over a grid that just covers the range, with cycle walking (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains", section 5): it is computed per index, so 10⁹ rows take as little memory as ten.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

WINDOW_GROUPS = 64


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape: `rows` >= 1 in the split, in groups of `group_rows` neighbours; the last may be short.

    `images`: they have one frame; it matters only with an `image_ratio`. `batch_size`: clips of its batches, if not the
    order's.
    """

    name: str
    rows: int
    group_rows: int = 32
    images: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples: equal orders give the same batches on any machine.

    `window` is a number of groups: it bounds how much is read at a time, and a batch has about batch_size / window
    clips of a group. `image_ratio` is the share of the steps that take images, 0 <= ratio < 1, which needs buckets of
    both (`image_ratio_error`); None: all buckets take turns.
    """

    buckets: tuple[Bucket, ...]
    batch_size: int
    seed: int
    window: int = WINDOW_GROUPS
    image_ratio: Fraction | None = None
    origin: int = 0
    """The batch number at which the first epoch of these clips begins; above 0 if a run continued with new data."""
    epochs: int = 0
    """The number of that epoch. Epochs of earlier clips are counted too, so no order comes twice."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, including short ones, without an `image_ratio`."""
        return sum(self._steps(bucket) for bucket in self.buckets)

    def stream(self, images: bool) -> "SampleOrder":
        """The order of the images alone, or of the videos alone. Raises ValueError if there are none."""
        mine = tuple(bucket for bucket in self.buckets if bucket.images == images)
        return replace(self, buckets=mine, image_ratio=None)

    def stream_at(self, k: int) -> tuple["SampleOrder", int]:
        """The stream of batch k, and its number in it, counted from `origin`; without an `image_ratio` this order."""
        k = self._since_origin(k)
        if self.image_ratio is None:
            return self, k
        before = self._images_before(k)
        images = self._images_before(k + 1) > before
        return self.stream(images), before if images else k - before

    def epoch(self, k: int) -> int:
        """The epoch at batch k; with an `image_ratio` always that of the videos.

        `Batch.epoch` is the epoch of the batch's own stream.
        """
        k = self._since_origin(k)
        if self.image_ratio is None:
            return self.epochs + k // self.steps_per_epoch
        return self.epochs + (k - self._images_before(k)) // self.stream(images=False).steps_per_epoch

    def _since_origin(self, k: int) -> int:
        if k < self.origin:
            raise ValueError(f"batch {k} is before batch {self.origin}, at which the order of these clips begins")
        return k - self.origin

    def _images_before(self, k: int) -> int:
        """Batches of images among the first k: floor(k ratio + u) with a phase 0 <= u < 1, in whole numbers."""
        count, total = (self.image_ratio or Fraction(0)).as_integer_ratio()
        return (k * count + stable_hash(self.seed, "pictures") % total) // total

    def _steps(self, bucket: Bucket) -> int:
        return -(-bucket.rows // (bucket.batch_size or self.batch_size))

    def bucket_at(self, epoch: int, step: int) -> tuple[Bucket, int]:
        """The bucket at a step of a stream's epoch, and how many of its batches came before in that epoch.

        The first bucket's count after j of S steps is floor((j n + u) / S) with a phase 0 <= u < S: n in all, evenly
        spread. The other buckets share the remaining steps in the same way.
        """
        total = self.steps_per_epoch
        for bucket in self.buckets:
            count, phase = self._steps(bucket), stable_hash(self.seed, epoch, bucket.name, "turn") % total
            before = (step * count + phase) // total
            if ((step + 1) * count + phase) // total > before:
                return bucket, before
            step, total = step - before, total - count
        raise IndexError(f"step {step} is not within an epoch of {self.steps_per_epoch} steps")


@dataclass(frozen=True)
class Batch:
    """The clips of one global step, all of one bucket: indices of the split's rows, ascending.

    `epoch` counts the epochs of the batch's stream: a bucket's rows come exactly once for each value. The gradient does
    not depend on the order within a step; ascending, a rank's share is in few row groups, and in nearly the same ones
    from step to step of a window.
    """

    epoch: int
    bucket: str
    rows: tuple[int, ...]


def batch(order: SampleOrder, k: int) -> Batch:
    """Batch k >= 0 of a run."""
    stream, number = order.stream_at(k)
    passes, step = divmod(number, stream.steps_per_epoch)
    epoch = stream.epochs + passes
    bucket, turn = stream.bucket_at(epoch, step)
    size = bucket.batch_size or order.batch_size
    first = turn * size
    rows = ordered_rows(stream, bucket, epoch, first, min(first + size, bucket.rows))
    return Batch(epoch, bucket.name, tuple(np.sort(rows).tolist()))


def batch_number(step: int, skipped: Iterable[int]) -> int:
    """The number of the batch that a step takes, both counted from 0, if the batches `skipped` are never taken.

    Each skipped number that is not above it moves it up by one.
    """
    number = step
    for skip in sorted(set(skipped)):
        if skip > number:
            break
        number += 1
    return number


def share(batch: Batch, rank: int, world: int, micro_batch_size: int) -> list[list[int | None]]:
    """A rank's micro-batches of row indices, None for padding; all ranks get equally many, of equal size.

    Works for any world size. Shares differ by at most one row, so those of a short batch may be only padding.
    """
    count = -(-len(batch.rows) // (world * micro_batch_size))
    mine = batch.rows[len(batch.rows) * rank // world : len(batch.rows) * (rank + 1) // world]
    padded = [*mine, *[None] * (count * micro_batch_size - len(mine))]
    return [padded[i : i + micro_batch_size] for i in range(0, len(padded), micro_batch_size)]


def ordered_rows(order: SampleOrder, bucket: Bucket, epoch: int, first: int, last: int) -> Int64[np.ndarray, " rows"]:
    """Rows number first to last - 1 in a bucket's order of an epoch.

    The bucket's short group, if any, is the last of a window drawn per epoch; full groups take the other places. `gap`
    is how many rows it lacks: row number i is in slot i before the group's end, and in slot i + gap after it.
    """
    size, window_rows = bucket.group_rows, order.window * bucket.group_rows
    groups = -(-bucket.rows // size)
    gap = groups * size - bucket.rows
    key = (order.seed, epoch, bucket.name)
    short_window = stable_hash(*key, "short") % -(-groups // order.window)
    short = min((short_window + 1) * order.window, groups) - 1 if gap else groups
    end = (short + 1) * size - gap

    slots = [row + gap if row >= end else row for row in (first, last - 1)]
    places: list[NDArray[np.int64]] = []
    for window in range(slots[0] // window_rows, slots[1] // window_rows + 1):
        base, top = window * window_rows, min((window + 1) * window_rows, groups * size)
        held = top - base - (gap if base <= short * size < top else 0)
        opens = base - (gap if base >= end else 0)  # the number of the window's first row
        numbers = np.arange(max(first, opens), min(last, opens + held)) - opens
        places.append(base + permute(numbers, held, *key, "rows", window))
    place, inside = np.divmod(np.concatenate(places), size)
    # Places after the short group move up by one: the permutation is over full groups only.
    full = bucket.rows // size
    group = permute(np.minimum(place - (place > short), max(full - 1, 0)), max(full, 1), *key, "groups")
    return np.where(place == short, groups - 1, group) * size + inside


def permute(index: Int64[np.ndarray, " n"], size: int, *key: int | str) -> Int64[np.ndarray, " n"]:
    """Permutes indices in range(size) by the permutation of a key."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)  # rows * columns covers the range with less than one row to spare
    rounds = np.frombuffer(_digest(48, *key), "<u8").astype(np.uint64)
    image = _feistel(index.astype(np.uint64), rows, columns, rounds)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], rows, columns, rounds)
    return image.astype(np.int64)


def _feistel(x: NDArray[np.uint64], rows: int, columns: int, rounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed permutation of range(rows * columns): row and column are alternately shifted by a hash of the other."""
    row, column = x // np.uint64(columns), x % np.uint64(columns)
    for even, odd in zip(rounds[::2], rounds[1::2], strict=True):
        row = (row + _scramble(column ^ even)) % np.uint64(rows)
        column = (column + _scramble(row ^ odd)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def stable_hash(*key: int | str) -> int:
    """64 bits that are the same on every machine and in every Python, unlike `hash`."""
    return int.from_bytes(_digest(8, *key), "little")


def _digest(size: int, *key: int | str) -> bytes:
    return hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=size).digest()


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014, figure 15), in 63 bits, so adding an index can't overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)
