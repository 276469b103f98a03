"""The shard reader: reads clips by number from a folder of Parquet shards, local or remote.

Opening reads the index (`opening.py`). A read fetches only the row groups it needs. Local files are memory mapped. Row
numbers count the rows of one split of one bucket, with files sorted by name, without rows that the index drops.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from sora_train.data.clip_columns import clip_columns
from sora_train.data.config import image_ratio_error
from sora_train.data.opening import COLUMNS, Split, open_shards, rows_of, shard_errors, split_by_bucket
from sora_train.data.order import WINDOW_GROUPS, Bucket, SampleOrder
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import Clips, bucket_size, decode_rows, holdout_hash
from sora_train.storage import resolve

OPEN_FILES = 64


class ShardSet:
    """The clips of one split of a shard folder, by bucket and number. Reading is safe from several threads."""

    def __init__(
        self,
        folder: str,
        holdout_fraction: float = 0.0,
        split: Split = "train",
        cache_bytes: int = 4 * 10**9,
        listed: pa.Table | None = None,
    ):
        """Opens a folder.

        Row groups are cached while training's order may return to them. `cache_bytes` bounds the cache: a window of
        16 x 256 x 256 with long T5-XXL captions has 2.6 GB. `listed` is the result of `open_shards` if another process
        or split has it already. Raises UserError if the folder has no manifest, no clips for this split, or a broken
        shard.
        """
        self.folder, self.split, self.holdout_fraction = folder, split, holdout_fraction
        self.manifest = Manifest.load(folder)
        self._filesystem, self._root = resolve(folder)
        if isinstance(self._filesystem, fs.LocalFileSystem):
            self._filesystem = fs.LocalFileSystem(use_mmap=True)  # ParquetFile's memory_map does nothing with one given
        self.listed = open_shards(folder, holdout_fraction) if listed is None else listed
        self._shards = split_by_bucket(self.listed, split)
        if not self._shards:
            raise UserError(self._no_clips(int(rows_of(self.listed).sum())), code="shards")
        # A window's groups, and those of the next that a batch may reach into.
        self._cache_groups = len(self._shards) * (WINDOW_GROUPS + WINDOW_GROUPS // 4)
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._open_file = lru_cache(OPEN_FILES)(self._parquet)
        self._lock = threading.Lock()

    @property
    def rows(self) -> dict[str, int]:
        """Clips of the split in each bucket."""
        return {name: int(shards.ends[-1]) for name, shards in self._shards.items()}

    def sample_order(
        self, batch_size: int | Mapping[str, int], seed: int, image_ratio: float | None = None
    ) -> SampleOrder:
        """The order in which training takes these clips, in groups of the most frequent row group size.

        `batch_size` may be one for all buckets, or one for each. Raises UserError if the split lacks the images or the
        videos that `image_ratio` (data.image_ratio) needs.
        """
        if wrong := image_ratio_error(image_ratio, map(bucket_size, self.rows)):
            raise UserError(f"{wrong} (the {self.split} split of {self.folder})", code="shards")
        buckets: list[Bucket] = []
        for name, rows in self.rows.items():
            group_rows = self._shards[name].commonest_group()
            own = None if isinstance(batch_size, int) else batch_size[name]
            buckets.append(Bucket(name, rows, group_rows, images=bucket_size(name)[0] == 1, batch_size=own))
        ratio = None if image_ratio is None else Fraction(str(image_ratio))  # exactly as written: 0.1 is a tenth
        least = batch_size if isinstance(batch_size, int) else min(batch_size.values())
        return SampleOrder(tuple(buckets), least, seed, image_ratio=ratio)

    def read(self, bucket: str, rows: Sequence[int]) -> Clips:
        """The clips with these numbers, in this order; repeats are allowed."""
        count = self.rows[bucket]
        if not len(rows) or min(rows) < 0 or max(rows) >= count:
            raise IndexError(f"bucket {bucket} has the rows 0 to {count - 1}, not {list(rows)}")
        found: dict[int, pa.Table] = {}  # by place in `rows`
        with self._lock:
            for i, path, group, inside in self._locate(bucket, rows):
                found[i] = self._group(path, group).slice(inside, 1)
        try:
            return decode_rows(pa.concat_tables([found[i] for i in range(len(rows))]), self.manifest, bucket)
        except ValueError as error:
            raise UserError(
                f"clips of {self.folder}/bucket={bucket} do not match its manifest.json ({error}). Remove the "
                "files of another encoding, or encode into another data.output",
                code="shards",
            ) from error

    def sample_ids(self, bucket: str, rows: Sequence[int]) -> list[str]:
        """The ids of clips with these numbers. Reads only that column, and each row group once."""
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}  # by row group: place in `rows`, row in the group
        for i, path, group, inside in self._locate(bucket, rows):
            wanted.setdefault((path, group), []).append((i, inside))
        ids = [""] * len(rows)
        for (path, group), places in wanted.items():
            with self._lock, shard_errors(path):
                table = self._open_file(path).read_row_group(group, columns=["sample_id"], use_threads=False)
            for i, inside in places:
                ids[i] = str(table["sample_id"][inside])
        return ids

    def all_sample_ids(self, bucket: str) -> list[str]:
        """The ids of the split's clips in a bucket, by number; reads only that column."""
        return [str(name) for name in self.columns(bucket, ["sample_id"])["sample_id"].to_pylist()]

    def columns(self, bucket: str, names: list[str]) -> pa.Table:
        """Some columns of the split's clips in a bucket, by number; from the index where it has them."""
        shards = self._shards[bucket]

        def read_shard(file: int) -> pa.Table:
            path = f"{self._root}/{shards.names[file]}"
            with self._lock, shard_errors(path):
                return self._open_file(path).read(columns=names, use_threads=False).replace_schema_metadata(None)

        table = clip_columns(self.folder, names, shards.names, shards.rows, shards.indexed, read_shard)
        return table if shards.taken is None else table.filter(pc.list_flatten(shards.taken))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the split's clips, their order and their groups, which the order of samples depends on.

        Reads the ids of all clips.
        """
        found = hashlib.sha256()
        for bucket in self.sample_order(1, 0).buckets:
            found.update(f"{bucket.name} {bucket.rows} {bucket.group_rows}".encode())
            for ids in self.columns(bucket.name, ["sample_id"])["sample_id"].chunks:
                if len(ids):
                    whole = pa.ListArray.from_arrays(pa.array([0, len(ids)], pa.int32()), ids)
                    joined: Any = pc.binary_join(whole, pa.scalar("\0"))
                    found.update(b"\0" + joined[0].as_py().encode())
        return found.hexdigest()[:32]

    def _locate(self, bucket: str, rows: Sequence[int]) -> Iterator[tuple[int, str, int, int]]:
        """Yields (index in `rows`, path, row group, row in the group), file by file."""
        numbers, shards = np.asarray(rows, np.int64), self._shards[bucket]
        files = np.searchsorted(shards.ends, numbers, side="right")
        for file in np.unique(files).tolist():
            which, start = np.flatnonzero(files == file), shards.ends[file - 1] if file else 0
            path = f"{self._root}/{shards.names[file]}"
            for i, (group, inside) in zip(which.tolist(), shards.locate(file, numbers[which] - start), strict=True):
                yield i, path, group, inside

    def _group(self, path: str, group: int) -> pa.Table:
        if (path, group) in self._cache:
            self._cache.move_to_end((path, group))
            return self._cache[path, group]
        with shard_errors(path):
            table = self._open_file(path).read_row_group(group, columns=COLUMNS, use_threads=False)
        self._cache[path, group] = table
        self._cached_bytes += table.nbytes
        while len(self._cache) > 1 and (
            self._cached_bytes > self._cache_bytes or len(self._cache) > self._cache_groups
        ):
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table

    def _parquet(self, path: str) -> pq.ParquetFile:
        # Page checksums make a flipped byte an error instead of a wrong clip.
        remote = not isinstance(self._filesystem, fs.LocalFileSystem)
        return pq.ParquetFile(path, filesystem=self._filesystem, pre_buffer=remote, page_checksum_verification=True)

    def _no_clips(self, rows: int) -> str:
        if not rows:
            return f"0 clips: the shards in {self.folder} are empty. `sora inspect {self.folder}` shows why"
        which, remedy = ("none", "Raise") if self.split == "holdout" else ("all", "Lower")
        return (
            f"0 clips: data.holdout_fraction {self.holdout_fraction} holds out {which} of the {rows} clips in "
            f"{self.folder}. {remedy} it, or prepare more sources"
        )


def is_held_out(source: str, fraction: float) -> bool:
    """Whether a source is held out, by its name alone, so clips of one video stay in one split."""
    return holdout_hash(source) < fraction * 2**64
