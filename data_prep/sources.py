"""Sources: the rows of `data.captions`, each with a stable id and its file, or the reason why there is none.

A file is one source, however captions spell its name: its clips have ids of one name, and are on one side of the
held-out split. Names may not leave the data root; links below it are followed wherever they lead.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from json.encoder import encode_basestring as quoted
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.lookup import FoundLine, found_lines
from data_prep.spool import ID, Partitions, Slot, Spool, as_ids, first_rows, id_hashes, text_hashes
from sora_train.data.config import DataConfig

TABLE_ROWS, FILE_PARTS = 2**15, 64
USABLE, MISSING, UNUSABLE, LINE = 0, 1, 2, 4
"""The `code` of a row: usable, its file is missing, or another reason; and LINE if the captions are the reason."""
STRING = pa.string()
ROWS = pa.schema({"where": STRING, "source": STRING, "captions": pa.list_(STRING), "path": STRING, "size": pa.int64(),
                  "version": STRING, "reason": STRING, "message": STRING, "row_id": ID, "source_hash": pa.int64(),
                  "version_hash": pa.int64(), "code": pa.int8()})  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A source with its captions. `path` is on the data root's filesystem; an unusable source has a `reason`."""

    row_id: str
    """Hash of source and captions."""
    source: str
    captions: tuple[str, ...]
    path: str = ""
    size: int = 0
    version: str = ""
    """Modification time in nanoseconds; of remote files in whole seconds, since requests and listings differ."""
    reason: str = ""
    message: str = ""


class SourceRows:
    """The rows of the captions, in order. They are in a temporary file, so any number of them takes little memory."""

    def __init__(self, lines: Iterable[Sequence[FoundLine]]):
        self._spool, self._slots, self._starts = Spool(), list[Slot](), [0]
        files = Partitions(FILE_PARTS)
        with _paused_gc():
            for some in lines:
                for begin in range(0, len(some), TABLE_ROWS):
                    self._add(some[begin : begin + TABLE_ROWS], files)
        self._name_files_once(files)
        self.parts = Partitions.of(len(self))
        """`rows` with row_id, number, size, version_hash and code; `names` with the hashes of source names."""
        for begin, table in self.tables(["row_id", "size", "version_hash", "code", "source_hash"]):
            numbers = pa.array(np.arange(begin, begin + len(table)))
            hashes = id_hashes(table["row_id"])
            self.parts.add("rows", hashes, table.drop_columns("source_hash").append_column("number", numbers))
            names = table.select(["source_hash"])
            self.parts.add("names", names["source_hash"].to_numpy().view(np.uint64), names)
        self._mark_repeats()
        names = (self.parts.read("names", part) for part in self.parts)
        self.sources = sum(pc.count_distinct(table["source_hash"]).as_py() for table in names if table)
        """Number of different sources."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[SourceRow]:
        for _, rows in self.select(np.ones(len(self), bool)):
            yield from rows

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yields the number of a row, and a table of ROWS that begins with it."""
        for begin, slot in zip(self._starts, self._slots, strict=False):
            yield begin, self._spool.read(slot, columns)

    def select(self, mask: NDArray[np.bool_]) -> Iterator[tuple[list[int], list[SourceRow]]]:
        """Yields the numbers of the rows that a mask chooses, and these rows, at most TABLE_ROWS at a time."""
        for begin, slot, end in zip(self._starts, self._slots, self._starts[1:], strict=False):
            chosen = np.flatnonzero(mask[begin:end])
            if len(chosen):
                rows = self._spool.read(slot).take(chosen).to_pylist()
                yield (begin + chosen).tolist(), [_to_source_row(row) for row in rows]

    @classmethod
    def of(cls, rows: Iterable[SourceRow]) -> SourceRows:
        """Makes SourceRows of rows whose files were looked up before. Computes their `row_id`."""
        lines = (
            FoundLine(f"row {i}", r.source, r.captions, r.path, r.size, r.version, r.reason, r.message)
            for i, r in enumerate(rows)
        )
        return cls(iter(lambda: list(islice(lines, TABLE_ROWS)), []))

    def has_any(self, sources: Any) -> bool:
        """Whether one of the names in an Arrow column is that of a source."""
        hashes = text_hashes(sources)
        names = (self.parts.read("names", part) for part in self.parts)
        return any(np.isin(table["source_hash"].to_numpy(), hashes).any() for table in names if table)

    def _add(self, lines: Sequence[FoundLine], files: Partitions) -> None:
        *values, identities = zip(*lines, strict=True)
        columns: dict[str, Any] = dict(zip(FoundLine._fields, map(list, values), strict=False))
        columns["row_id"] = as_ids(b"".join(map(row_key, columns["source"], columns["captions"])))
        columns["source_hash"], columns["version_hash"] = map(text_hashes, (columns["source"], columns["version"]))
        columns["code"] = [code_of(line.reason, line.path) if line.reason else USABLE for line in lines]
        begin = self._starts[-1]
        self._slots.append(self._spool.write(pa.table(columns, ROWS)))
        self._starts.append(begin + len(lines))
        found = [i for i, identity in enumerate(identities) if identity]
        texts = [identities[i] for i in found]  # hashed twice, since 64 bits would be too few for a billion files
        hashes = np.stack([text_hashes(texts), text_hashes([f"{text} again" for text in texts])], axis=1)
        ids = as_ids(hashes.tobytes())
        numbers, names = np.array(found, np.int64) + begin, columns["source_hash"][found]
        table = pa.table([ids, pa.array(numbers), pa.array(names)], ["id", "number", "source_hash"])
        files.add("files", id_hashes(ids), table)

    def _name_files_once(self, files: Partitions) -> None:
        """Gives the rows of a file that has several names the first of them."""
        pairs: list[NDArray[np.int64]] = []
        for part in files:
            table = files.read("files", part)
            assert table
            first = first_rows(table["id"])
            numbers, names = table["number"].to_numpy(), table["source_hash"].to_numpy()
            other = np.flatnonzero(names[first] != names)
            pairs.append(np.stack([numbers[other], numbers[first[other]]]))

        def rename(row: dict, name: str) -> None:
            row |= {"source": name, "source_hash": hash(name), "row_id": row_key(name, row["captions"])}

        self._rewrite(pairs, "source", rename)

    def _mark_repeats(self) -> None:
        """Marks rows with file and captions of an earlier one."""
        pairs: list[NDArray[np.int64]] = []
        for part in self.parts:
            if table := self.parts.read("rows", part):
                numbers, repeats = table["number"].to_numpy(), np.flatnonzero(is_repeat(table))
                pairs.append(np.stack([numbers[repeats], numbers[first_rows(table["row_id"])[repeats]]]))

        def mark(row: dict, first: str) -> None:
            message = f"{row['where']} repeats {first}: the same file and captions"
            row |= {"path": "", "reason": "duplicate_row", "message": message, "code": UNUSABLE}

        self._rewrite(pairs, "where", mark)

    def _rewrite(self, pairs: list[NDArray[np.int64]], column: str, change: Callable[[dict, str], None]) -> None:
        """Changes rows, each by a text that another row has. `pairs` are arrays of the numbers of both."""
        numbers, others = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
        order = np.argsort(numbers)
        numbers, others = numbers[order], others[order]
        wanted, inverse = np.unique(others, return_inverse=True)
        texts: list[Any] = []
        for i, some in self._split(wanted):
            texts += self._spool.read(self._slots[i], [column])[column].take(some).to_pylist()
        done = 0
        for i, some in self._split(numbers):
            rows = self._spool.read(self._slots[i]).to_pylist()
            for row in some.tolist():
                change(rows[row], texts[inverse[done]])
                done += 1
            self._slots[i] = self._spool.write(pa.Table.from_pylist(rows, ROWS))

    def _split(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yields the tables that hold rows of these sorted numbers, with the places of the rows in them."""
        ends = np.searchsorted(numbers, self._starts)
        for i in np.flatnonzero(np.diff(ends)).tolist():
            yield i, numbers[ends[i] : ends[i + 1]] - self._starts[i]


def is_repeat(rows: pa.Table) -> NDArray[np.bool_]:
    """Whether an earlier row has the same file and captions. A row whose captions are unusable is not compared."""
    repeats = first_rows(rows["row_id"]) != np.arange(len(rows))
    return repeats & (rows["code"].to_numpy() < LINE)


def code_of(reason: str, path: str) -> int:
    """The `code` of a row with a reason. Captions are the reason if no file was looked up for it."""
    is_line = reason in ("no_caption", "fetch_failed") or (reason == "missing_file" and not path)
    return (MISSING if reason == "missing_file" else UNUSABLE) + LINE * is_line


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Without cyclic garbage collection, which takes a third of the time where there are many small tuples."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _to_source_row(row: dict) -> SourceRow:
    return SourceRow(
        row["row_id"].hex(), row["source"], tuple(row["captions"]), row["path"], row["size"], row["version"],
        row["reason"], row["message"],
    )  # fmt: skip


def read_rows(data: DataConfig) -> SourceRows:
    """The sources that `data.captions` names. Raises RecipeError as `found_lines`."""
    return SourceRows(found_lines(data))


def row_id(source: str, captions: tuple[str, ...]) -> str:
    """Hex hash that identifies a source with its captions; never equal to a clip's `sample_id`."""
    return row_key(source, captions).hex()


def row_key(source: str, captions: Sequence[str]) -> bytes:
    """`row_id` as bytes."""
    # What json.dumps([source, captions], ensure_ascii=False) gives, in a quarter of the time.
    content = f"[{quoted(source)}, [{', '.join(map(quoted, captions))}]]"
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:16]


def sample_id(source: str, start_s: float, end_s: float, captions: tuple[str, ...]) -> str:
    """Hex hash of source name, span and captions: the same everywhere, and known before the video is read."""
    content = json.dumps([source, start_s, end_s, list(captions)], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
