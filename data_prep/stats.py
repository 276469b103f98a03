"""Counts clips by outcome, ends a run with too many bad sources, and writes the closing line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.reasons import BAD_SOURCE_REASONS, kind_of, stage_of
from data_prep.spool import Slot, Spool
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.schema import QUARANTINE_SCHEMA

MIN_SOURCES = 200
"""Sources that must be opened before their share of bad ones can end a run early."""
MAX_REMARKS = 20  # printed lines about single files
TABLE_ROWS = 4096
RECENT = 2**16


class FailureLog:
    """Rows of `quarantine.parquet`, in order. Only the last ones are in memory, the others in a temporary file."""

    def __init__(self):
        self._spool, self._slots, self._rows = Spool(), list[Slot](), list[dict]()

    def append(self, row: dict) -> None:
        """Adds a row."""
        self._rows.append(row)
        if len(self._rows) == TABLE_ROWS:
            self._slots.append(self._spool.write(pa.Table.from_pylist(self._rows, QUARANTINE_SCHEMA)))
            self._rows = []

    def __len__(self) -> int:
        return TABLE_ROWS * len(self._slots) + len(self._rows)

    def __iter__(self) -> Iterator[dict]:
        for table in self.tables():
            yield from table.to_pylist()

    def tables(self, begin: int = 0) -> Iterator[pa.Table]:
        """Yields the rows from number `begin` on, at most TABLE_ROWS at a time."""
        for number in range(begin // TABLE_ROWS, len(self._slots) + 1):
            is_last = number == len(self._slots)
            table = (
                pa.Table.from_pylist(self._rows, QUARANTINE_SCHEMA)
                if is_last
                else self._spool.read(self._slots[number])
            )
            yield table.slice(max(0, begin - number * TABLE_ROWS))


class SourceSet:
    """Sources by the hashes of their names, eight bytes each."""

    def __init__(self):
        self._sorted, self._recent = np.empty(0, np.int64), set[int]()

    def add(self, source: str) -> bool:
        """Whether the source was not there before."""
        if source in self:
            return False
        self._recent.add(hash(source))
        if len(self._recent) > max(RECENT, len(self._sorted) // 16):
            self.add_hashes(np.fromiter(self._recent, np.int64))
            self._recent.clear()
        return True

    def add_hashes(self, hashes: NDArray[np.int64]) -> None:
        """Adds many, by `spool.text_hashes`."""
        self._sorted = np.union1d(self._sorted, hashes)

    def __contains__(self, source: str) -> bool:
        value = hash(source)
        if value in self._recent:
            return True
        place = np.searchsorted(self._sorted, value)
        return bool(place < len(self._sorted) and self._sorted[place] == value)

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)


class PrepStats:
    """Counts clips. `failures` are the rows of `quarantine.parquet`, `reasons` their number by reason.

    `quiet` prints no lines about single files.
    """

    def __init__(self, sources: int, max_bad_fraction: float, folder: str, quiet: bool = False):
        self.sources, self.max_bad_fraction, self.folder = sources, max_bad_fraction, folder
        self.asked = self.written = 0
        self.failures = FailureLog()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """The first failure of each reason."""
        self.bad_sources: dict[str, str] = {}  # source without a clip -> reason
        self._opened, self._good = SourceSet(), SourceSet()  # by this run; with a clip in the shards
        self._bad_opened = 0
        self._remarks = MAX_REMARKS + 1 if quiet else 0  # printed

    def count_stored(self, clips: int, sources: NDArray[np.int64]) -> None:
        """Counts clips that earlier runs wrote, before anything else. `sources` are the hashes of their sources."""
        self.written += clips
        self._good.add_hashes(sources)

    def count_written(self, source: str) -> None:
        """Counts a clip that is in the shards."""
        self.written += 1
        self._good.add(source)
        if self.bad_sources.pop(source, None):
            self._bad_opened -= source in self._opened

    def count_opened(self, source: str) -> None:
        """Counts a source all of whose clips have come."""
        if self._opened.add(source):
            self._bad_opened += source in self.bad_sources

    def count_failure(self, failure: dict, known: bool = False) -> str:
        """Counts a clip that is not in the shards, and prints it unless `known`. Returns `quarantined` or `filtered`.

        `failure` has the columns of the quarantine; `stage` and `kind` follow from the reason.
        """
        reason, source = failure["reason"], failure["source"]
        kind = kind_of(reason)
        row = {"start_s": 0.0, "end_s": 0.0, "duplicate_of": ""} | failure | {"stage": stage_of(reason), "kind": kind}
        self.failures.append({name: row[name] for name in QUARANTINE_SCHEMA.names})
        self.reasons[reason] += 1
        self.examples.setdefault(reason, f"{source}: {failure['message']}")
        if reason in BAD_SOURCE_REASONS and source not in self._good:
            self._bad_opened += source not in self.bad_sources and source in self._opened
            self.bad_sources[source] = reason
        if not known:
            self.print_remark(f"{source} is {kind}: {reason}: {failure['message']}")
        return kind

    def print_remark(self, remark: str) -> None:
        """Prints a line about one file, unless there were many."""
        self._remarks += 1
        if self._remarks <= MAX_REMARKS:
            log.info("prep: " + remark.replace("\n", "\\n"))
        elif self._remarks == MAX_REMARKS + 1:
            log.info(f"prep: more such files are listed in {self.folder}/quarantine.parquet only")

    def check_limits(self, finished: bool = False) -> None:
        """Raises UserError if too many sources are bad, or at the end if there is no clip.

        The share of bad sources counts among those opened, once these are MIN_SOURCES, and among all sources.
        """
        opened = len(self._opened) if len(self._opened) >= MIN_SOURCES else self.sources
        for bad, total in ((len(self.bad_sources), self.sources), (self._bad_opened, opened)):
            if bad > self.max_bad_fraction * total:
                raise UserError(
                    f"{bad} of {total} sources can't be read, decoded or encoded, more than data.max_bad_fraction "
                    f"{self.max_bad_fraction:g} allows: {self._commonest(Counter(self.bad_sources.values()))}. "
                    f"{self.folder}/quarantine.parquet lists them; {self._hint()}, or raise data.max_bad_fraction",
                    code="media",
                )
        if finished and not self.written:
            reasons = {failure["source"]: failure["reason"] for failure in self.failures}
            raise UserError(
                f"none of {self.sources} sources gave a clip: {self._commonest(Counter(reasons.values()))}. "
                f"{self.folder}/quarantine.parquet lists them",
                code="media",
            )

    def _hint(self) -> str:
        if 2 * sum(stage_of(reason) == "encode" for reason in self.bad_sources.values()) > len(self.bad_sources):
            return "free memory on that device, lower prep.vae_batch, or encode in fp32 (codec.precision)"
        return "fix or remove them, check data.root"

    def _commonest(self, counts: Counter[str]) -> str:
        """The three commonest reasons, each with an example."""
        return "; ".join(f"{count} {reason} ({self.examples[reason]})" for reason, count in counts.most_common(3))

    def summary(self) -> str:
        """`1500 clips asked for = 1490 written + 8 quarantined (unreadable 8) + 2 filtered (too_short 2)`."""
        text = f"{self.asked} clips asked for = {self.written} written"
        for kind in ("quarantined", "filtered"):
            counts = {reason: count for reason, count in sorted(self.reasons.items()) if kind_of(reason) == kind}
            details = ", ".join(f"{reason} {count}" for reason, count in counts.items())
            text += f" + {sum(counts.values())} {kind}{f' ({details})' if details else ''}"
        return text
