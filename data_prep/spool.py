"""Tables in a temporary file, whole or split by hash, so that metadata of any size needs little memory."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

ID = pa.binary(16)
BUFFER_BYTES = 2**26
"""Bytes of tables of one kind that wait in memory until they are split."""
PART_ROWS, MAX_PARTS = 2**17, 1024
HEX = np.full(256, 255, np.uint8)  # value of each hexadecimal digit
HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a table is in the file."""

    start: int
    size: int


class Spool:
    """Tables in a temporary file without a name, which disappears with the process."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="sora-prep-")  # noqa: SIM115
        self._end = 0

    def write(self, table: pa.Table) -> Slot:
        """Appends a table."""
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        slot = Slot(self._end, os.pwrite(self._file.fileno(), content, self._end))
        if slot.size != content.size:
            raise OSError(f"no space left in {tempfile.gettempdir()}; set TMPDIR to a larger disk")
        self._end += slot.size
        return slot

    def read(self, slot: Slot, columns: Iterable[str] | None = None) -> pa.Table:
        """The table, or some of its columns."""
        content = pa.py_buffer(os.pread(self._file.fileno(), slot.size, slot.start))
        reader = pa.ipc.open_stream(content)
        if columns is None:
            return reader.read_all()
        fields = sorted(reader.schema.get_field_index(name) for name in columns)
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        return pa.ipc.open_stream(content, options=options).read_all()


class Partitions:
    """Tables of several kinds, each split by hash: equal ids are in the same part, in the order in which they came."""

    def __init__(self, count: int):
        """`count` is the number of parts."""
        self.count = count
        self._spool = Spool()
        self._slots: dict[tuple[str, int], list[Slot]] = {}
        self._waiting: dict[str, list[tuple[NDArray[np.int64], pa.Table]]] = {}

    @classmethod
    def of(cls, rows: int) -> Partitions:
        """Parts for so many rows of a kind."""
        return cls(min(MAX_PARTS, 1 + rows // PART_ROWS))

    def add(self, kind: str, hashes: NDArray[np.uint64], table: pa.Table) -> None:
        """Adds rows, each with the hash that chooses its part."""
        parts = ((hashes >> np.uint64(32)) * np.uint64(self.count) >> np.uint64(32)).astype(np.int64)
        waiting = self._waiting.setdefault(kind, [])
        waiting.append((parts, table))
        if sum(table.nbytes for _, table in waiting) > BUFFER_BYTES:
            self._split(kind)

    def read(self, kind: str, part: int) -> pa.Table | None:
        """The rows of a part, or None."""
        self._split(kind)
        tables = [self._spool.read(slot) for slot in self._slots.get((kind, part), [])]
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def __iter__(self) -> Iterator[int]:
        """The numbers of the parts that have rows of any kind."""
        for kind in list(self._waiting):
            self._split(kind)
        return iter(sorted({part for _, part in self._slots}))

    def _split(self, kind: str) -> None:
        waiting = self._waiting.pop(kind, [])
        if not waiting:
            return
        parts = np.concatenate([parts for parts, _ in waiting])
        order = np.argsort(parts, kind="stable")
        table = pa.concat_tables([table for _, table in waiting]).combine_chunks().take(order)
        ends = np.searchsorted(parts[order], np.arange(self.count + 1))
        for part in np.flatnonzero(np.diff(ends)).tolist():
            slot = self._spool.write(table.slice(ends[part], ends[part + 1] - ends[part]))
            self._slots.setdefault((kind, part), []).append(slot)


def to_ids(names: Any) -> pa.Array:
    """16 bytes for each name of an Arrow column: 32 hexadecimal digits as such, of another name a hash."""
    names = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    if (pc.binary_length(names).to_numpy(zero_copy_only=False) == 32).all():
        digits = HEX[_content(names.cast(pa.binary()).cast(pa.binary(32)), 32)]
        if digits.max(initial=0) < 16:
            return as_ids((digits[0::2] << 4 | digits[1::2]).tobytes())
    return as_ids(b"".join(map(_to_id, names.to_pylist())))


def _to_id(name: str) -> bytes:
    """The id of one name, which does not depend on the others in its column."""
    if re.fullmatch("[0-9a-f]{32}", name):
        return bytes.fromhex(name)
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def as_ids(content: bytes) -> pa.Array:
    """An array of ids from their bytes."""
    buffers: list[Any] = [None, pa.py_buffer(content)]
    return pa.FixedSizeBinaryArray.from_buffers(ID, len(content) // 16, buffers)


def id_hashes(ids: Any) -> NDArray[np.uint64]:
    """The first eight bytes of each id of an Arrow column."""
    return _content(ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids, 16).view(np.uint64)[::2]


def first_rows(ids: Any) -> NDArray[np.int64]:
    """The place of the first equal id, for each one of an Arrow column."""
    return places_in(ids, ids)


def places_in(ids: Any, where: Any) -> NDArray[np.int64]:
    """The place of each id in another column of ids, the first if it is there several times; -1 if it is not there."""
    ids, where = (x.combine_chunks() if isinstance(x, pa.ChunkedArray) else x for x in (ids, where))
    return pc.index_in(ids, value_set=where).fill_null(-1).to_numpy().astype(np.int64)


def _content(fixed: Any, width: int) -> NDArray[np.uint8]:
    content = np.frombuffer(fixed.buffers()[1], np.uint8) if len(fixed) else np.empty(0, np.uint8)
    return content[width * fixed.offset : width * (fixed.offset + len(fixed))]


def text_hashes(texts: Any) -> NDArray[np.int64]:
    """64 bits of each text, the same only within this process."""
    values = texts if isinstance(texts, list) else texts.to_pylist()
    return np.fromiter(map(hash, values), np.int64, len(values))
