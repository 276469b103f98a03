"""Counts of clips by what became of them, the limit on bad sources, and the closing line."""

from __future__ import annotations

from collections import Counter

from data_prep.reasons import BAD_SOURCE_REASONS, kind_of, stage_of
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.schema import QUARANTINE_SCHEMA

MIN_SOURCES = 200
"""Sources that must be opened before their share of bad ones can end a run early."""
MAX_REMARKS = 20  # printed lines about single files


class PrepStats:
    """Counts clips. `failures` are the rows of `quarantine.parquet`, `reasons` how many there are of each reason."""

    def __init__(self, sources: int, max_bad_fraction: float, folder: str, quiet: bool = False):
        self.sources, self.max_bad_fraction, self.folder = sources, max_bad_fraction, folder
        self.asked = self.written = 0
        self.failures: list[dict] = []
        self.reasons: Counter[str] = Counter()
        self.opened: set[str] = set()  # sources that this run opened
        self.good_sources: set[str] = set()  # sources with a clip in the shards
        self.bad_sources: dict[str, str] = {}  # source without a clip -> reason
        self._remarks = MAX_REMARKS + 1 if quiet else 0  # printed

    def count_written(self, source: str) -> None:
        """Counts a clip that is in the shards."""
        self.written += 1
        self.good_sources.add(source)
        self.bad_sources.pop(source, None)

    def count_failure(self, failure: dict) -> str:
        """Counts a clip that is not in the shards. Returns `quarantined` or `filtered`.

        `failure` has the columns of the quarantine; `stage` and `kind` follow from the reason.
        """
        reason, source = failure["reason"], failure["source"]
        kind = kind_of(reason)
        row = {"start_s": 0.0, "end_s": 0.0, "duplicate_of": ""} | failure | {"stage": stage_of(reason), "kind": kind}
        self.failures.append({name: row[name] for name in QUARANTINE_SCHEMA.names})
        self.reasons[reason] += 1
        if reason in BAD_SOURCE_REASONS and source not in self.good_sources:
            self.bad_sources[source] = reason
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
        opened = len(self.opened) if len(self.opened) >= MIN_SOURCES else self.sources
        for bad, total in ((len(self.bad_sources), self.sources), (len(self.bad_sources.keys() & self.opened), opened)):
            if bad > self.max_bad_fraction * total:
                raise UserError(
                    f"{bad} of {total} sources can't be read, decoded or encoded, more than data.max_bad_fraction "
                    f"{self.max_bad_fraction:g} allows: {self._commonest(self.bad_sources)}. "
                    f"{self.folder}/quarantine.parquet lists them; {self._hint()}, or raise data.max_bad_fraction"
                )
        if finished and not self.written:
            reasons = {failure["source"]: failure["reason"] for failure in self.failures}
            raise UserError(
                f"none of {self.sources} sources gave a clip: {self._commonest(reasons)}. "
                f"{self.folder}/quarantine.parquet lists them"
            )

    def _hint(self) -> str:
        if 2 * sum(stage_of(reason) == "encode" for reason in self.bad_sources.values()) > len(self.bad_sources):
            return "free memory on that device, lower prep.vae_batch, or encode in fp32 (codec.precision)"
        return "fix or remove them, check data.root"

    def _commonest(self, reasons: dict[str, str]) -> str:
        """The three commonest reasons, each with an example."""
        example = {row["reason"]: f"{row['source']}: {row['message']}" for row in reversed(self.failures)}
        commonest = Counter(reasons.values()).most_common(3)
        return "; ".join(f"{count} {reason} ({example[reason]})" for reason, count in commonest)

    def summary(self) -> str:
        """`1500 clips asked for = 1490 written + 8 quarantined (unreadable 8) + 2 filtered (too_short 2)`."""
        text = f"{self.asked} clips asked for = {self.written} written"
        for kind in ("quarantined", "filtered"):
            counts = {reason: count for reason, count in sorted(self.reasons.items()) if kind_of(reason) == kind}
            details = ", ".join(f"{reason} {count}" for reason, count in counts.items())
            text += f" + {sum(counts.values())} {kind}{f' ({details})' if details else ''}"
        return text
