"""Shards on storage: reads which clips they hold, writes new ones, removes clips."""

from __future__ import annotations

import io
import time
import uuid
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.sources import row_id
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import ENCODING_KEY, ROW_GROUP, SHARD_SCHEMA, shard_files
from sora_train.storage import DRAFT_PREFIX, atomic_write, resolve, storage_errors

SHARD_ROWS = 8 * ROW_GROUP
COLUMNS = [field.name for field in SHARD_SCHEMA if field.name not in ("latents", "text", "tokens")]
MAX_WRITE_DELAY_S = 30.0
"""After this time a shard is written although it is not full, which bounds the work that a kill can lose."""


@dataclass(slots=True)
class StoredClip:
    """A clip in a shard: what decides whether it may stay, and what a duplicate of it looks like."""

    row_id: str
    source: str
    source_size: int
    source_version: str
    shard: str
    content_hash: str
    perceptual_hash: str
    span: tuple[float, float]


def read_stored_clips(
    folder: str, encoding_hash: str, difference: str = "other frames, VAE, text encoder or code"
) -> tuple[dict[str, StoredClip], dict[str, set[str]]]:
    """The clips in the shards by `sample_id`; and by shard, the ids that an earlier shard holds too.

    Raises UserError for a shard that can't be read, or one of another encoding, with the `difference`.
    """
    system, _ = resolve(folder)
    clips: dict[str, StoredClip] = {}
    repeated: dict[str, set[str]] = {}
    for file in shard_files(folder):
        try:
            with system.open_input_file(file) as opened:
                table = pq.ParquetFile(opened).read(columns=COLUMNS)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"data.output: shard {file} can't be read ({error}). Delete it and run the same command again"
            ) from None
        if (table.schema.metadata or {}).get(ENCODING_KEY, b"").decode() != encoding_hash:
            raise UserError(
                f"data.output: {folder} holds shards of another encoding ({file.rpartition('/')[2]}): {difference}. "
                "Encodings never mix: set data.output to another folder, or delete this one to encode again"
            )
        for row in table.to_pylist():
            if row["sample_id"] in clips:
                repeated.setdefault(file, set()).add(row["sample_id"])
                continue
            same = {name: row[name] for name in StoredClip.__slots__ if name in row}
            key, span = row_id(row["source"], tuple(row["captions"])), (row["start_s"], row["end_s"])
            clips[row["sample_id"]] = StoredClip(row_id=key, shard=file, span=span, **same)
    return clips, repeated


def remove_clips(folder: str, file: str, sample_ids: set[str]) -> None:
    """Writes a shard again without these clips, or deletes it if none is left."""
    system, _ = resolve(folder)
    with system.open_input_file(file) as opened:
        table = pq.ParquetFile(opened).read()
    keep = [sample not in sample_ids for sample in table.column("sample_id").to_pylist()]
    if any(keep):
        _write(system, file, table.filter(pa.array(keep)))
    else:
        system.delete_file(file)


def remove_unfinished(folder: str) -> None:
    """Deletes the unfinished files of a killed run."""
    system, path = resolve(folder)
    with storage_errors(folder, "cleaned up"):
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True)):
            if info.type == fs.FileType.File and info.base_name.startswith(DRAFT_PREFIX):
                system.delete_file(info.path)


class ShardWriter:
    """Collects rows of one bucket and writes them as shards, each complete or not at all."""

    def __init__(self, folder: str, bucket: str, encoding_hash: str):
        self.system, path = resolve(folder)
        self.folder = f"{path}/bucket={bucket}"
        self.schema = SHARD_SCHEMA.with_metadata({ENCODING_KEY: encoding_hash.encode()})
        names = [file.rpartition("/")[2] for file in shard_files(folder)]
        self.next = 1 + max((int(name.split("-")[1]) for name in names if name.startswith("part-")), default=-1)
        self.rows: list[pa.Table] = []
        self.count = 0
        self.written_at = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        """Adds rows of SHARD_SCHEMA. Writes a shard if there are enough, always of complete row groups."""
        self.rows.append(rows)
        self.count += len(rows)
        while self.count >= SHARD_ROWS:
            self._write_first(SHARD_ROWS)
        if self.count >= ROW_GROUP and time.monotonic() - self.written_at > MAX_WRITE_DELAY_S:
            self._write_first(self.count - self.count % ROW_GROUP)

    def close(self) -> None:
        """Writes the remaining rows."""
        if self.count:
            self._write_first(self.count)

    def _write_first(self, count: int) -> None:
        table = pa.concat_tables(self.rows)
        name = f"part-{self.next:06d}-{uuid.uuid4().hex[:8]}.parquet"
        _write(self.system, f"{self.folder}/{name}", table.slice(0, count).cast(self.schema))
        self.rows, self.count = [table.slice(count)], len(table) - count
        self.next += 1
        self.written_at = time.monotonic()


def manifest_or_none(folder: str) -> Manifest | None:
    """The manifest of a shard set, or None if there is none that this version can read."""
    try:
        return Manifest.load(folder)
    except UserError:
        return None


def _write(system: fs.FileSystem, path: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    # Latents don't compress, and uncompressed pages can be read from a memory map without a copy. Checksums, since
    # nothing else would detect a flipped byte in a latent.
    encoding = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, buffer, row_group_size=ROW_GROUP, **encoding)
    atomic_write(system, path, buffer.getvalue())
