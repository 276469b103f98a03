"""The shard reader: reads clips by number from a folder of Parquet shards, local or remote.

Opening reads the footers, and the `source` column if clips are held out. A read fetches only the row groups it needs.
Local files are memory mapped. Row numbers count the rows of one split of one bucket, with files sorted by name.
"""

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from sora_train.data.config import image_ratio_error
from sora_train.data.order import WINDOW_GROUPS, Bucket, SampleOrder
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import (
    ENCODING_KEY,
    SHARD_SCHEMA,
    Clips,
    bucket_of,
    bucket_size,
    decode_rows,
    holdout_hash,
    shard_files,
)
from sora_train.storage import resolve

Split = Literal["train", "holdout"]
OPENERS = 16  # footers of a remote folder that are fetched in parallel
OPEN_FILES = 64
COLUMNS = ["sample_id", "source", "captions", "latents", "text", "tokens"]  # that `decode_rows` reads


@dataclass(frozen=True)
class Shard:
    """One file: its footer's contents, and which of its rows belong to the split."""

    path: str
    bucket: str
    ends: NDArray[np.int32]
    """Rows of the file up to the end of each row group."""
    taken: NDArray[np.uint8] | None
    """One bit per row, 1 if it belongs to the split; None: all do."""
    rows: int
    """Rows that belong to the split."""

    def locate(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(Row group, row in it) for rows of the split."""
        if self.taken is not None:
            rows = np.flatnonzero(np.unpackbits(self.taken))[rows]
        groups = np.searchsorted(self.ends, rows, side="right")
        starts = np.concatenate([[0], self.ends])
        return list(zip(groups.tolist(), (rows - starts[groups]).tolist(), strict=True))


class ShardSet:
    """The clips of one split of a shard folder, by bucket and number. Reading is safe from several threads."""

    def __init__(
        self,
        folder: str,
        holdout_fraction: float = 0.0,
        split: Split = "train",
        cache_bytes: int = 4 * 10**9,
    ):
        """Opens a folder.

        Row groups are cached while training's order may return to them. `cache_bytes` bounds the cache: a window of
        16 x 256 x 256 with long T5-XXL captions has 2.6 GB. Raises UserError if the folder has no manifest, no clips
        for this split, or a broken shard.
        """
        self.folder, self.split, self.holdout_fraction = folder, split, holdout_fraction
        self.manifest = Manifest.load(folder)
        self._filesystem, _ = resolve(folder)
        if isinstance(self._filesystem, fs.LocalFileSystem):
            self._filesystem = fs.LocalFileSystem(use_mmap=True)  # ParquetFile's memory_map does nothing with one given
        with ThreadPoolExecutor(OPENERS) as pool:
            shards = list(pool.map(self._open_shard, shard_files(folder)))
        self._shards = {
            name: [shard for shard in shards if shard.bucket == name and shard.rows]
            for name in sorted({shard.bucket for shard in shards if shard.rows})
        }
        if not self._shards:
            raise UserError(
                self._no_clips(sum(int(shard.ends[-1]) for shard in shards if len(shard.ends))), code="shards"
            )
        # A window's groups, and those of the next that a batch may reach into.
        self._cache_groups = len(self._shards) * (WINDOW_GROUPS + WINDOW_GROUPS // 4)
        self._ends = {name: np.cumsum([shard.rows for shard in held]) for name, held in self._shards.items()}
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._open_file = lru_cache(OPEN_FILES)(self._parquet)
        self._lock = threading.Lock()

    @property
    def rows(self) -> dict[str, int]:
        """Clips of the split in each bucket."""
        return {name: int(ends[-1]) for name, ends in self._ends.items()}

    def sample_order(self, batch_size: int, seed: int, image_ratio: float | None = None) -> SampleOrder:
        """The order in which training takes these clips, in groups of the most frequent row group size.

        Raises UserError if the split lacks the images or the videos that `image_ratio` (data.image_ratio) needs.
        """
        if wrong := image_ratio_error(image_ratio, map(bucket_size, self.rows)):
            raise UserError(f"{wrong} (the {self.split} split of {self.folder})", code="shards")
        buckets: list[Bucket] = []
        for name, rows in self.rows.items():
            sizes = Counter[int]()
            for shard in self._shards[name]:
                sizes.update(np.diff(shard.ends, prepend=np.int32(0)).tolist())
            group_rows = max(sizes, key=lambda size: (sizes[size], size))
            buckets.append(Bucket(name, rows, group_rows, images=bucket_size(name)[0] == 1))
        ratio = None if image_ratio is None else Fraction(str(image_ratio))  # exactly as written: 0.1 is a tenth
        return SampleOrder(tuple(buckets), batch_size, seed, image_ratio=ratio)

    def read(self, bucket: str, rows: Sequence[int]) -> Clips:
        """The clips with these numbers, in this order; repeats are allowed."""
        ends = self._ends[bucket]
        if not len(rows) or min(rows) < 0 or max(rows) >= ends[-1]:
            raise IndexError(f"bucket {bucket} has the rows 0 to {ends[-1] - 1}, not {list(rows)}")
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
            with self._lock, _shard_errors(path):
                table = self._open_file(path).read_row_group(group, columns=["sample_id"], use_threads=False)
            for i, inside in places:
                ids[i] = str(table["sample_id"][inside])
        return ids

    def all_sample_ids(self, bucket: str) -> list[str]:
        """The ids of the split's clips in a bucket, by number; reads only that column."""
        return [str(name) for name in self.columns(bucket, ["sample_id"])["sample_id"].to_pylist()]

    def columns(self, bucket: str, names: list[str]) -> pa.Table:
        """Some columns of the split's clips in a bucket, by number."""
        tables: list[pa.Table] = []
        for shard in self._shards[bucket]:
            with self._lock, _shard_errors(shard.path):
                table = self._open_file(shard.path).read(columns=names, use_threads=False)
            taken = None if shard.taken is None else np.flatnonzero(np.unpackbits(shard.taken, count=len(table)))
            tables.append(table if taken is None else table.take(taken))
        return pa.concat_tables(tables).replace_schema_metadata(None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the split's clips, their order and their groups, which the order of samples depends on.

        Reads the ids of all clips.
        """
        found = hashlib.sha256()
        for bucket in self.sample_order(1, 0).buckets:
            found.update(f"{bucket.name} {bucket.rows} {bucket.group_rows}\0".encode())
            found.update("\0".join(self.all_sample_ids(bucket.name)).encode())
        return found.hexdigest()[:32]

    def _locate(self, bucket: str, rows: Sequence[int]) -> Iterator[tuple[int, str, int, int]]:
        """Yields (index in `rows`, path, row group, row in the group), file by file."""
        numbers, ends = np.asarray(rows, np.int64), self._ends[bucket]
        files = np.searchsorted(ends, numbers, side="right")
        for file in np.unique(files):
            shard, which = self._shards[bucket][file], np.flatnonzero(files == file)
            places = shard.locate(numbers[which] - (ends[file] - shard.rows))
            for i, (group, inside) in zip(which.tolist(), places, strict=True):
                yield i, shard.path, group, inside

    def _group(self, path: str, group: int) -> pa.Table:
        if (path, group) in self._cache:
            self._cache.move_to_end((path, group))
            return self._cache[path, group]
        with _shard_errors(path):
            table = self._open_file(path).read_row_group(group, columns=COLUMNS, use_threads=False)
        self._cache[path, group] = table
        self._cached_bytes += table.nbytes
        while len(self._cache) > 1 and (
            self._cached_bytes > self._cache_bytes or len(self._cache) > self._cache_groups
        ):
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table

    def _open_shard(self, path: str) -> Shard:
        with _shard_errors(path):
            file = self._parquet(path)
            self._check(path, file.schema_arrow, file.metadata.metadata or {})
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes, dtype=np.int32)
            if min(sizes, default=0) < 0 or sum(sizes) != file.metadata.num_rows:
                raise OSError(f"its row groups hold {sum(sizes)} rows, not {file.metadata.num_rows}")
            if not self.holdout_fraction:
                return Shard(path, bucket_of(path), ends, None, file.metadata.num_rows if self.split == "train" else 0)
            sources = [str(source) for source in file.read(columns=["source"])["source"].to_pylist()]
        held_out = {source: is_held_out(source, self.holdout_fraction) for source in set(sources)}
        taken = np.array([held_out[source] == (self.split == "holdout") for source in sources], bool)
        return Shard(path, bucket_of(path), ends, np.packbits(taken), int(taken.sum()))

    def _check(self, path: str, schema: pa.Schema, metadata: dict[bytes, bytes]) -> None:
        for column in COLUMNS:
            wanted = SHARD_SCHEMA.field(column).type
            if (place := schema.get_field_index(column)) < 0 or schema.field(place).type != wanted:
                raise UserError(
                    f"{path} is not a shard: it has no column {column} of type {wanted}. Move it out of the folder",
                    code="shards",
                )
        encoding = metadata.get(ENCODING_KEY, self.manifest.encoding_hash.encode()).decode()
        if encoding != self.manifest.encoding_hash:
            raise UserError(
                f"{path} has the encoding {encoding}, {self.folder}/manifest.json has {self.manifest.encoding_hash}. "
                "A folder holds one encoding: encode into another data.output",
                code="shards",
            )

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


@contextmanager
def _shard_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read as a shard ({error}). To repair it, delete this file and run `sora prep` again: it "
            "encodes only what is missing",
            code="shards",
        ) from error
