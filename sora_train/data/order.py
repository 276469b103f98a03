"""Which clips make batch k: pure arithmetic on (seed, plan, k), with no iterator, no state, and no ranks until `share`.

An epoch orders each bucket on its own. Its rows form groups of `group_rows` neighbours, the size of a row group in the
shards; a keyed permutation orders the groups; `window` groups at a time are laid together, and a second permutation
orders the rows of that window. So a run reads its shards one window of row groups after the other, and no two epochs
agree. Buckets take turns in proportion to their batches, one bucket per global step.

With an `image_ratio`, pictures and videos are two streams, each with epochs of its own: a share of the steps, fixed by
number, takes the next batch of pictures; the other steps take the next of the videos.

Where a run goes on with new data (`sora train --new-data`), batch numbers go on too, and an epoch of the new clips
begins at the number `origin`.

Every row comes exactly once an epoch of its stream. The last batch of a bucket may be short: it is served short, and
`share` pads it.

The permutation is a Feistel network over a grid that just covers the range, with cycle walking (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains", section 5): it is computed per index, so 10⁹ rows take no more memory than ten.
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
    """Clips of one shape: `rows` in the split, in groups of `group_rows` neighbours, the last of which may be short.

    `pictures` says that they have one frame; it matters only where a plan has an `image_ratio`.
    """

    name: str
    rows: int
    group_rows: int = 32
    pictures: bool = False

    def __post_init__(self):
        if self.rows < 1 or self.group_rows < 1:
            raise ValueError(
                f"bucket {self.name}: rows {self.rows} and group_rows {self.group_rows} must be at least 1"
            )


@dataclass(frozen=True)
class Plan:
    """All that the order of samples depends on; two equal plans give the same batches on any machine.

    `window` counts groups: it bounds what is read at a time, and a batch has some batch_size / window clips of a group.
    `image_ratio` is the share of the steps that take pictures, 0 <= ratio < 1; None lets all buckets take turns.
    """

    buckets: tuple[Bucket, ...]
    batch_size: int
    seed: int
    window: int = WINDOW_GROUPS
    image_ratio: Fraction | None = None
    origin: int = 0
    """The batch number at which the first epoch of these clips begins; above 0 where a run went on with new data."""
    epochs: int = 0
    """The number of that epoch: epochs of the clips before are counted too, so that no order comes twice."""

    def __post_init__(self):
        if not self.buckets or self.batch_size < 1 or self.window < 1:
            raise ValueError(
                f"a plan needs a bucket, got {len(self.buckets)}; batch_size {self.batch_size}, window {self.window}"
            )
        kinds, ratio = {bucket.pictures for bucket in self.buckets}, self.image_ratio
        if ratio is not None and (not 0 <= ratio < 1 or False not in kinds or (ratio and True not in kinds)):
            names = ", ".join(bucket.name for bucket in self.buckets)
            raise ValueError(
                f"image_ratio {ratio} must be at least 0 and below 1, with videos and pictures as buckets, not {names}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once, short ones counted: an epoch, where no `image_ratio` makes it two."""
        return sum(self._steps(bucket) for bucket in self.buckets)

    def stream(self, pictures: bool) -> "Plan":
        """The plan of the pictures alone, or of the videos alone. ValueError where there are none."""
        mine = tuple(bucket for bucket in self.buckets if bucket.pictures == pictures)
        return replace(self, buckets=mine, image_ratio=None)

    def place(self, k: int) -> tuple["Plan", int]:
        """The stream that batch k of the run is of, and its number there; without an `image_ratio` this plan and k.

        Both are counted from `origin`.
        """
        k = self._since_origin(k)
        if self.image_ratio is None:
            return self, k
        before = self._pictures_before(k)
        pictures = self._pictures_before(k + 1) > before
        return self.stream(pictures), before if pictures else k - before

    def epoch(self, k: int) -> int:
        """The epoch that a run is in at batch k: with an `image_ratio` that of the videos, also where k is of pictures.

        `Batch.epoch` is that of the batch's own stream.
        """
        k = self._since_origin(k)
        if self.image_ratio is None:
            return self.epochs + k // self.steps_per_epoch
        return self.epochs + (k - self._pictures_before(k)) // self.stream(pictures=False).steps_per_epoch

    def _since_origin(self, k: int) -> int:
        if k < self.origin:
            raise ValueError(f"batch {k} comes before batch {self.origin}, with which the order of these clips begins")
        return k - self.origin

    def _pictures_before(self, k: int) -> int:
        """Batches of pictures among the first k: floor(k ratio + u) with a phase 0 <= u < 1, in whole numbers."""
        count, total = (self.image_ratio or Fraction(0)).as_integer_ratio()
        return (k * count + stable_hash(self.seed, "pictures") % total) // total

    def _steps(self, bucket: Bucket) -> int:
        return -(-bucket.rows // self.batch_size)

    def turn(self, epoch: int, step: int) -> tuple[Bucket, int]:
        """The bucket whose turn it is at a step of a stream's epoch, and how many of its batches came before in it.

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

    `epoch` counts the epochs of the batch's stream: a bucket's rows come exactly once for each value of it.
    Within a step the order means nothing to the gradient; ascending, a rank's share lies in few row groups, and in
    nearly the same ones from step to step of a window.
    """

    epoch: int
    bucket: str
    rows: tuple[int, ...]


def batch(plan: Plan, k: int) -> Batch:
    """Batch k >= 0 of a run."""
    stream, number = plan.place(k)
    passes, step = divmod(number, stream.steps_per_epoch)
    epoch = stream.epochs + passes
    bucket, turn = stream.turn(epoch, step)
    first = turn * plan.batch_size
    rows = ordered_rows(stream, bucket, epoch, first, min(first + plan.batch_size, bucket.rows))
    return Batch(epoch, bucket.name, tuple(np.sort(rows).tolist()))


def batch_number(step: int, skipped: Iterable[int]) -> int:
    """The number of the batch that a step takes, both counted from 0, where the batches `skipped` are never taken.

    It is the step-th of the numbers that are left. Each skipped number that is not above it moves it up by one.
    """
    number = step
    for left_out in sorted(set(skipped)):
        if left_out > number:
            break
        number += 1
    return number


def share(batch: Batch, rank: int, world: int, micro_batch_size: int, batch_size: int) -> list[list[int | None]]:
    """A rank's micro-batches of row indices, None for padding: on every rank equally many, of equal size.

    Any world size will do. Shares differ by at most one row, so those of a short batch may be nothing but padding.
    """
    count = -(-batch_size // (world * micro_batch_size))
    mine = batch.rows[len(batch.rows) * rank // world : len(batch.rows) * (rank + 1) // world]
    padded = [*mine, *[None] * (count * micro_batch_size - len(mine))]
    return [padded[i : i + micro_batch_size] for i in range(0, len(padded), micro_batch_size)]


def ordered_rows(plan: Plan, bucket: Bucket, epoch: int, first: int, last: int) -> Int64[np.ndarray, " rows"]:
    """Rows number first to last - 1 in a bucket's order of an epoch.

    The bucket's short group, if it has one, takes the last place of a window drawn per epoch; full groups take the
    other places. `gap` is what it lacks: row number i lies in slot i before its end, and in slot i + gap behind it.
    """
    size, window_rows = bucket.group_rows, plan.window * bucket.group_rows
    groups = -(-bucket.rows // size)
    gap = groups * size - bucket.rows
    key = (plan.seed, epoch, bucket.name)
    short_window = stable_hash(*key, "short") % -(-groups // plan.window)
    short = min((short_window + 1) * plan.window, groups) - 1 if gap else groups
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
    # Places behind the short group move up by one: the permutation knows full groups only.
    full = bucket.rows // size
    group = permute(np.minimum(place - (place > short), max(full - 1, 0)), max(full, 1), *key, "groups")
    return np.where(place == short, groups - 1, group) * size + inside


def permute(index: Int64[np.ndarray, " n"], size: int, *key: int | str) -> Int64[np.ndarray, " n"]:
    """Images of indices in range(size) under the permutation that a key names."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)  # rows * columns covers the range with less than one row to spare
    rounds = np.frombuffer(_digest(48, *key), "<u8").astype(np.uint64)
    image = _feistel(index.astype(np.uint64), rows, columns, rounds)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], rows, columns, rounds)
    return image.astype(np.int64)


def _feistel(x: NDArray[np.uint64], rows: int, columns: int, rounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed permutation of range(rows * columns): row and column are shifted in turn by a hash of the other."""
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
    """63 bits, so that adding an index can't overflow: the finaliser of SplitMix64 (Steele et al. 2014, figure 15)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)
