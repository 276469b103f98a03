"""Finds duplicates among millions of clips: by bytes and span, or by perceptual hashes.

Clips with near hashes are found by multi-index hashing (Norouzi et al. 2012, section 3.1). If two hashes differ in at
most 4 r + a bits, a < 4, then one of the first a + 1 of their four 16-bit bands differs in at most r bits, or one of
the others in at most r - 1. So a clip is compared only with those that have such a band.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.spool import Slot, Spool
from sora_train.data.config import SelectionConfig

BLOCK = 2**13
"""Clips that are compared one by one before they are sorted."""
BANDS, MAX_RADIUS = 4, 3
"""With more different bits in a band most clips are candidates, and all are compared."""
NAMES = pa.schema({"sample_id": pa.string(), "source": pa.string()})


class Duplicate(NamedTuple):
    """`duplicate` or `near_duplicate`, and the first clip that is like this one."""

    reason: str
    sample_id: str
    source: str


class Duplicates:
    """Finds duplicates of the clips that were added before, the first of them. Checks that are off take no memory.

    A clip takes 20 bytes for exact duplicates and 44 for near ones; names are in a temporary file. Images without any
    structure, such as all black and all white, have almost the same perceptual hash.
    """

    def __init__(self, selection: SelectionConfig):
        self.exact, self.bits = selection.duplicates, selection.near_duplicates
        self._sorted: list[_Sorted] = []  # consecutive clips
        self._recent = _Recent(0)
        self._names, self._slots = Spool(), list[Slot]()
        self._starts: list[int] = []  # number of the first clip of each slot
        self._read_names = lru_cache(64)(self._names.read)

    def __len__(self) -> int:
        return self._recent.start + len(self._recent.names)

    def add(
        self, sample_id: str, source: str, content_hash: str, perceptual_hash: str, span: tuple[float, float]
    ) -> None:
        """Adds a clip; `perceptual_hash` may be empty."""
        if not self.exact and self.bits is None:
            return
        recent, number = self._recent, len(self)
        recent.names.append((sample_id, source))
        if self.exact:
            recent.seen.setdefault(_key(content_hash, span), number)
        if self.bits is not None and perceptual_hash:
            recent.hashes[len(recent.hashed)] = as_uint64(perceptual_hash)
            recent.hashed.append(number)
        if len(recent.names) == BLOCK:
            self._sort_recent()

    def add_table(self, table: pa.Table) -> None:
        """Adds clips, in order; `table` has the columns `resume.HASHES`."""
        if self.exact or self.bits is not None:
            for row in table.to_pylist():
                span = row.pop("start_s"), row.pop("end_s")
                self.add(**row, span=span)

    def find(self, content_hash: str, perceptual_hash: str, span: tuple[float, float]) -> Duplicate | None:
        """The earliest clip with the same bytes and span, or else the earliest that looks the same; or None."""
        parts = [*self._sorted, self._recent]
        if self.exact:
            key = _key(content_hash, span)
            number = next((number for part in parts if (number := part.find(key)) is not None), None)
            if number is not None:
                return Duplicate("duplicate", *self._name(number))
        if self.bits is not None and perceptual_hash:
            looks = as_uint64(perceptual_hash)
            number = next((number for part in parts if (number := part.find_near(looks, self.bits)) is not None), None)
            if number is not None:
                return Duplicate("near_duplicate", *self._name(number))
        return None

    def _name(self, number: int) -> tuple[str, str]:
        if number >= self._recent.start:
            return self._recent.names[number - self._recent.start]
        slot = bisect_right(self._starts, number) - 1
        row = self._read_names(self._slots[slot]).slice(number - self._starts[slot], 1).to_pylist()[0]
        return row["sample_id"], row["source"]

    def _sort_recent(self) -> None:
        recent = self._recent
        ids, sources = zip(*recent.names, strict=True)
        self._slots.append(self._names.write(pa.table([pa.array(ids), pa.array(sources)], schema=NAMES)))
        self._starts.append(recent.start)
        keys = np.frombuffer(b"".join(recent.seen), np.uint64).reshape(-1, 2)
        numbers = np.fromiter(recent.seen.values(), np.uint32)
        hashed = np.array(recent.hashed, np.uint32)
        self._sorted.append(_Sorted(keys, numbers, recent.hashes[: len(hashed)].copy(), hashed))
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):  # so there are few
            last, before = self._sorted.pop(), self._sorted.pop()
            self._sorted.append(before.merged(last))
        self._recent = _Recent(len(self))


@dataclass
class _Recent:
    """The last clips, from number `start` on."""

    start: int
    names: list[tuple[str, str]] = field(default_factory=list)
    seen: dict[bytes, int] = field(default_factory=dict)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty((BLOCK, 3), np.uint64))
    hashed: list[int] = field(default_factory=list)
    """The number of each row of `hashes`."""

    def find(self, key: bytes) -> int | None:
        """The number of the first clip with this key."""
        return self.seen.get(key)

    def find_near(self, looks: NDArray[np.uint64], bits: int) -> int | None:
        """The number of the first clip that looks like this."""
        rows = _near(self.hashes[: len(self.hashed)], looks, bits)
        return self.hashed[rows[0]] if len(rows) else None


class _Sorted:
    """Clips sorted by their keys, and by the bands of the middle frame's hash."""

    def __init__(
        self,
        keys: NDArray[np.uint64],
        numbers: NDArray[np.uint32],
        hashes: NDArray[np.uint64],
        hashed: NDArray[np.uint32],
    ):
        order = np.lexsort((numbers, keys[:, 0]))
        self.keys, self.numbers, self.hashes, self.hashed = keys[order], numbers[order], hashes, hashed
        self.orders: list[NDArray[np.uint32]] = []  # rows of `hashes` by each band
        self.starts: list[NDArray[np.int64]] = []  # where each value of the band begins in that order
        for band in range(BANDS) if len(hashes) else ():
            values = _band(hashes[:, 1], band)
            self.orders.append(np.argsort(values, kind="stable").astype(np.uint32))
            self.starts.append(np.append(0, np.cumsum(np.bincount(values, minlength=2**16))))

    def __len__(self) -> int:
        return max(len(self.keys), len(self.hashed))

    def merged(self, later: _Sorted) -> _Sorted:
        """These clips and later ones."""
        pairs = ((getattr(self, name), getattr(later, name)) for name in ("keys", "numbers", "hashes", "hashed"))
        return _Sorted(*map(np.concatenate, pairs))

    def find(self, key: bytes) -> int | None:
        """The number of the first clip with this key."""
        wanted = np.frombuffer(key, np.uint64)
        begin, end = (np.searchsorted(self.keys[:, 0], wanted[0], side) for side in ("left", "right"))
        rows = begin + np.flatnonzero(self.keys[begin:end, 1] == wanted[1])
        return int(self.numbers[rows[0]]) if len(rows) else None

    def find_near(self, looks: NDArray[np.uint64], bits: int) -> int | None:
        """The number of the first clip that looks like this."""
        radius, rest = divmod(bits, BANDS)
        if not len(self.hashes):
            return None
        if radius > MAX_RADIUS:
            rows = _near(self.hashes, looks, bits)
        else:
            some = [self._with_band(looks, band, radius if band <= rest else radius - 1) for band in range(BANDS)]
            candidates = np.unique(np.concatenate(some))
            rows = candidates[_near(self.hashes[candidates], looks, bits)]
        return int(self.hashed[rows[0]]) if len(rows) else None

    def _with_band(self, looks: NDArray[np.uint64], band: int, radius: int) -> NDArray[np.uint32]:
        """Rows whose band differs in at most `radius` bits."""
        if radius < 0:
            return np.empty(0, np.uint32)
        values = _band(looks[1:2], band) ^ _masks(radius)
        begins, ends = self.starts[band][values], self.starts[band][values + 1]
        counts = ends - begins
        return self.orders[band][np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)]


def _near(hashes: NDArray[np.uint64], looks: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Rows all of whose three hashes differ in at most so many bits; the middle one is compared first."""
    rows = np.flatnonzero(np.bitwise_count(hashes[:, 1] ^ looks[1]) <= bits)
    for frame in (0, 2):
        rows = rows[np.bitwise_count(hashes[rows, frame] ^ looks[frame]) <= bits]
    return rows


def _band(hashes: NDArray[np.uint64], band: int) -> NDArray[np.int64]:
    return (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.int64)


@lru_cache
def _masks(radius: int) -> NDArray[np.int64]:
    """All 16-bit numbers with at most so many ones."""
    return np.array([sum(1 << bit for bit in bits) for n in range(radius + 1) for bits in combinations(range(16), n)])


def _key(content_hash: str, span: tuple[float, float]) -> bytes:
    return hashlib.blake2b(f"{content_hash} {span[0]!r} {span[1]!r}".encode(), digest_size=16).digest()


def as_uint64(perceptual_hash: str) -> NDArray[np.uint64]:
    """48 hex digits as three uint64."""
    return np.array([int(perceptual_hash[i : i + 16], 16) for i in (0, 16, 32)], np.uint64)
