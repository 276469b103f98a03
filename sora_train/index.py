"""The index of a shard folder: append-only Parquet pieces with one row per clip, shard, source or failure.

A piece is `index/<kind>/<number>-<id>.index`, a Parquet file that is written completely or not at all. Readers take the
pieces in order of their numbers. `compact` merges small neighbours: the new piece has the number of the first, and its
metadata names all that it replaces, which readers ignore from then on. So the index is complete at every moment.

The shards are the truth. A row about a shard that is missing, or has another size, is ignored. A damaged piece is
skipped with a message; `sora prep` reads the shards that it described and adds them again.

The extension is not `.parquet`, so `datasets` and DuckDB don't take pieces for shards in a recursive search. No torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from sora_train.errors import one_line
from sora_train.index_rows import CLIPS, KINDS, SHARDS, SOURCES, Kind, clip_rows, last_rows, shard_places, shard_row
from sora_train.log import log
from sora_train.storage import atomic_write, resolve, storage_errors

__all__ = ["CLIPS", "KINDS", "SHARDS", "SOURCES", "Kind", "append", "clip_rows", "compact", "delete_damaged",
           "last_rows", "pieces", "read", "shard_places", "shard_row"]  # fmt: skip

FOLDER, REPLACES = "index", b"replaces"
NAME = re.compile(r"(\d{8,})-[0-9a-f]+\.index")
REPEATED = ["source", "shard", "encoding_hash", "groups.list.element", "tokens.list.element", "stage", "reason", "kind"]
"""Columns with few values, which are stored by number. Hashes and ids are not."""
GROUP_VALUES = 2**18
"""Rows of a piece's row group, counting the rows of the shards in `shards`: it bounds what a reader holds at a time."""
PIECE_BYTES = 2**28
"""Pieces that are merged have at most this size together."""
GRACE_S = 600.0
"""A replaced piece stays for this time, for readers that listed it before."""
OPENERS = 16  # footers that are fetched in parallel
LISTINGS = 5
DAMAGE = (pa.ArrowException, OSError, KeyError)
"""What reading a damaged piece raises."""


@dataclass(frozen=True)
class Piece:
    """A readable piece: its file, its footer, and its metadata without `replaces`."""

    path: str
    size: int
    modified: float
    footer: pq.FileMetaData
    metadata: dict[str, str]
    replaces: frozenset[str]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.rpartition("/")[2]


def append(folder: str, kind: Kind, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Adds a piece with the rows of a table, whose columns are those of the kind, and metadata.

    Only the owner of the folder's lock may append or compact.
    """
    if not len(table):
        return
    system, path = resolve(folder)
    number = 1 + max((_number(info) for info in _listed(system, folder, kind)), default=-1)
    content = io.BytesIO()
    with _writer(content, kind, metadata or {}) as write:
        write(table)
    atomic_write(system, f"{path}/{FOLDER}/{kind}/{_new_name(number)}", content.getvalue())


def read(
    folder: str, kind: Kind, columns: Sequence[str] | None = None, metadata: Mapping[str, str] | None = None
) -> Iterator[pa.Table]:
    """Yields the rows of all valid pieces, at most a row group at a time, in the order in which they were appended.

    With `metadata`, only those of pieces that have these entries. Damaged pieces are skipped with a message.
    """
    system, _ = resolve(folder)
    for piece in pieces(folder, kind):
        if (metadata or {}).items() <= piece.metadata.items():
            yield from _read_piece(system, kind, piece, columns)


def compact(
    folder: str,
    kind: Kind,
    above: int = 1,
    keep: Callable[[pa.Table], pa.Table] | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Merges small neighbours if there are more than `above` pieces, and deletes those that were replaced long ago.

    Of `shards`, only the last row of each shard stays. With `keep`, which filters the rows, all pieces are written
    again.
    """
    found, system = pieces(folder, kind), resolve(folder)[0]
    _delete_replaced(folder, kind, found, grace_s)
    if len(found) <= above:
        return
    for group in (group for group in _neighbours(found) if keep or len(group) > 1):
        content = io.BytesIO()
        replaces = sorted(frozenset({piece.name for piece in group}).union(*(piece.replaces for piece in group)))
        with _writer(content, kind, group[0].metadata | {REPLACES.decode(): json.dumps(replaces)}) as write:
            tables = (table for piece in group for table in _read_piece(system, kind, piece))
            if kind == "shards":
                tables = iter([last_rows(pa.concat_tables([SHARDS.empty_table(), *tables]), "shard")])
            held: list[pa.Table] = []
            for table in tables:
                held.append(keep(table) if keep else table)
                if sum(map(len, held)) >= GROUP_VALUES:
                    write(pa.concat_tables(held))
                    held = []
            write(pa.concat_tables([KINDS[kind].empty_table(), *held]))
        parent, _, name = group[0].path.rpartition("/")
        atomic_write(system, f"{parent}/{_new_name(int(name.partition('-')[0]))}", content.getvalue())
    if not grace_s:
        _delete_replaced(folder, kind, pieces(folder, kind), grace_s)


def pieces(folder: str, kind: Kind) -> list[Piece]:
    """The readable pieces that none replaces, in order. Damaged ones are reported."""
    return _survey(folder, kind)[0]


def find_damaged(folder: str, kind: Kind) -> list[str]:
    """Paths of the pieces that can't be read completely. Reads all of them; reasons are logged."""
    (system, _), (found, damaged) = resolve(folder), _survey(folder, kind)
    for piece in found:
        # a storage that fails for a moment must not look like damage
        if _read_error(system, kind, piece) and (error := _read_error(system, kind, piece)):
            _report_damage(system, piece.path, error)
            damaged.append(piece.path)
    return damaged


def _read_error(system: fs.FileSystem, kind: Kind, piece: Piece) -> Exception | None:
    """Why a piece can't be read completely, if so."""
    try:
        for _ in _tables(system, kind, piece, KINDS[kind].names):
            pass
    except DAMAGE as error:
        return error
    return None


def delete_damaged(folder: str, kind: Kind) -> None:
    """Deletes the pieces that can't be read completely. Their rows must be added again."""
    system, _ = resolve(folder)
    damaged = find_damaged(folder, kind)
    with storage_errors(folder, "cleaned up"):
        for path in damaged:
            system.delete_file(path)


def _survey(folder: str, kind: Kind) -> tuple[list[Piece], list[str]]:
    """The readable pieces that none replaces, in order, and the paths of damaged ones."""
    system, _ = resolve(folder)
    for _ in range(LISTINGS):
        infos = _listed(system, folder, kind)
        try:
            with ThreadPoolExecutor(OPENERS) as pool:
                found = list(pool.map(lambda info: _open(system, kind, info), infos))
        except FileNotFoundError:  # compacted since it was listed
            continue
        good = [piece for piece in found if piece]
        replaced = frozenset[str]().union(*(piece.replaces for piece in good))
        damaged = [info.path for info, piece in zip(infos, found, strict=True) if piece is None]
        return [piece for piece in good if piece.name not in replaced], damaged
    with storage_errors(folder, "read"):
        raise FileNotFoundError(f"pieces of {FOLDER}/{kind} vanish while they are listed")


def _listed(system: fs.FileSystem, folder: str, kind: Kind) -> list[fs.FileInfo]:
    place = f"{resolve(folder)[1]}/{FOLDER}/{kind}"
    with storage_errors(place, "listed", system):
        found = system.get_file_info(fs.FileSelector(place, allow_not_found=True))
    return sorted((info for info in found if NAME.fullmatch(info.base_name)), key=lambda i: (_number(i), i.base_name))


def _number(info: fs.FileInfo) -> int:
    return int(info.base_name.partition("-")[0])


def _new_name(number: int) -> str:
    return f"{number:08d}-{uuid.uuid4().hex[:12]}.index"


def _open(system: fs.FileSystem, kind: Kind, info: fs.FileInfo) -> Piece | None:
    """A piece, or None if it is damaged. Raises FileNotFoundError if it is gone."""
    try:
        with system.open_input_file(info.path) as file:
            footer = pq.ParquetFile(file, pre_buffer=False).metadata
        metadata = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        replaces = frozenset(json.loads(metadata.pop(REPLACES.decode(), "[]")))
        if missing := set(KINDS[kind].names) - set(footer.schema.to_arrow_schema().names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        _report_damage(system, info.path, error)
        return None
    metadata.pop("ARROW:schema", None)
    return Piece(info.path, info.size or 0, info.mtime_ns / 1e9 if info.mtime_ns else 0.0, footer, metadata, replaces)


def _read_piece(
    system: fs.FileSystem, kind: Kind, piece: Piece, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    try:
        yield from _tables(system, kind, piece, columns or KINDS[kind].names)
    except DAMAGE as error:
        _report_damage(system, piece.path, error)


def _tables(system: fs.FileSystem, kind: Kind, piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The row groups of a piece. Raises one of DAMAGE."""
    with system.open_input_file(piece.path) as file:
        opened = pq.ParquetFile(file, metadata=piece.footer, pre_buffer=False, page_checksum_verification=True)
        for group in range(opened.num_row_groups):
            yield opened.read_row_group(group, list(columns), use_threads=False).replace_schema_metadata(None)


def _report_damage(system: fs.FileSystem, path: str, error: Exception) -> None:
    """Logs that a piece is damaged. Raises UserError if the storage is at fault: the file can't even be read."""
    with storage_errors(path, "read", system), system.open_input_stream(path, compression=None) as file:
        while file.read(2**22):
            pass
    why = one_line(str(error))
    log.warning(f"{path}: this piece of the index is damaged and ignored ({why}); `sora prep` restores its content")


@contextlib.contextmanager
def _writer(to: io.BytesIO, kind: Kind, metadata: Mapping[str, str]) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that writes rows to a piece."""
    schema = KINDS[kind].with_metadata(dict(metadata))
    how: dict[str, Any] = {"compression": "zstd", "use_dictionary": REPEATED, "write_page_checksum": True}
    with pq.ParquetWriter(to, schema, **how) as writer:

        def write(table: pa.Table) -> None:
            table = table.select(schema.names).cast(schema)
            for start, stop in _row_groups(kind, table):
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)

        yield write


def _row_groups(kind: Kind, table: pa.Table) -> Iterator[tuple[int, int]]:
    """First row, and last row + 1, of parts with at most GROUP_VALUES values, or one row."""
    lengths = pc.list_value_length(table["holdout"]).to_numpy() if kind == "shards" else np.ones(len(table))
    ends = np.cumsum(lengths)
    start = 0
    while start < len(table):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + GROUP_VALUES, side="right")))
        yield start, stop
        start = stop


def _neighbours(found: list[Piece]) -> list[list[Piece]]:
    """Neighbours with equal metadata and at most PIECE_BYTES together."""
    groups: list[list[Piece]] = []
    for piece in found:
        last = groups[-1] if groups else []
        fits = last and last[0].metadata == piece.metadata
        if fits and sum(other.size for other in last) + piece.size <= PIECE_BYTES:
            last.append(piece)
        else:
            groups.append([piece])
    return groups


def _delete_replaced(folder: str, kind: Kind, found: list[Piece], grace_s: float) -> None:
    """Deletes the pieces that one replaced which is older than `grace_s`."""
    system, _ = resolve(folder)
    old = frozenset[str]().union(*(piece.replaces for piece in found if time.time() - piece.modified >= grace_s))
    there = [info.path for info in _listed(system, folder, kind) if info.base_name in old]
    with storage_errors(folder, "cleaned up"):
        for gone in there:
            system.delete_file(gone)
