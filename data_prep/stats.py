"""What became of every clip: counts, the failures with their reasons, the judgement over them, the closing line."""

from __future__ import annotations

from collections import Counter

from data_prep.ledger import SourceRecord
from data_prep.reasons import BAD_SOURCE_REASONS, kind_of, stage_of
from sora_train.errors import UserError
from sora_train.log import log

JUDGED_AFTER = 200  # sources
REMARKS = 20  # lines about single files


class PrepStats:
    """Counts clips by how they ended. `failures` are rows of the quarantine, `records` what the ledger keeps."""

    def __init__(self, sources: int, max_bad_fraction: float, folder: str):
        self.sources, self.max_bad_fraction, self.folder = sources, max_bad_fraction, folder
        self.asked = self.written = 0
        self.failures: list[dict] = []
        self.records: dict[str, SourceRecord] = {}
        self.opened: set[str] = set()  # sources that were opened in this run
        self.good_sources: set[str] = set()  # sources of which a clip is written
        self.bad_sources: dict[str, str] = {}  # source that gave no clip -> reason
        self._remarks = 0

    def record_source(self, row_id: str, record: SourceRecord) -> None:
        """Takes note of all that was asked of a source; once per row."""
        self.asked += len(record.sample_ids)
        self.records[row_id] = record

    def count_written(self, source: str) -> None:
        """Counts a clip that is in the shards."""
        self.written += 1
        self.good_sources.add(source)
        self.bad_sources.pop(source, None)

    def count_failure(self, failure: dict) -> str:
        """Counts a clip that is not; returns `quarantined` or `filtered`.

        `failure` has the quarantine's columns, but for `stage` and `kind`, which follow from the reason.
        """
        reason, source = failure["reason"], failure["source"]
        kind = kind_of(reason)
        self.failures.append({"duplicate_of": ""} | failure | {"stage": stage_of(reason), "kind": kind})
        if reason in BAD_SOURCE_REASONS and source not in self.good_sources:
            self.bad_sources[source] = reason
        self.log_remark(f"{source} is {kind}: {reason}: {failure['message']}")
        return kind

    def log_remark(self, remark: str) -> None:
        """Prints a line about one file, the first few times."""
        self._remarks += 1
        if self._remarks <= REMARKS:
            log.info("prep: " + remark.replace("\n", "\\n"))
        elif self._remarks == REMARKS + 1:
            log.info(f"prep: more such files are named in {self.folder}/quarantine.parquet only")

    def check_limits(self, finished: bool = False) -> None:
        """Raises UserError where too many sources are bad, or at the end where no clip is left.

        Judged over what was opened once that is 200 sources, and at any time where the rest can't make it good.
        """
        opened = len(self.opened) if len(self.opened) >= JUDGED_AFTER else self.sources
        for bad, total in ((len(self.bad_sources), self.sources), (len(self.bad_sources.keys() & self.opened), opened)):
            if bad > self.max_bad_fraction * total:
                raise UserError(
                    f"{bad} of {total} sources can't be read, decoded or encoded, more than data.max_bad_fraction "
                    f"{self.max_bad_fraction:g} allows: {self._commonest(self.bad_sources)}. "
                    f"{self.folder}/quarantine.parquet names each; {self._remedy()}, or raise data.max_bad_fraction"
                )
        if finished and not self.written:
            reasons = {failure["source"]: failure["reason"] for failure in self.failures}
            raise UserError(
                f"no clip is left of {self.sources} sources: {self._commonest(reasons)}. "
                f"{self.folder}/quarantine.parquet names each"
            )

    def _remedy(self) -> str:
        if 2 * sum(stage_of(reason) == "encode" for reason in self.bad_sources.values()) > len(self.bad_sources):
            return "free that device's memory, lower prep.vae_batch, or encode in fp32 (codec.precision)"
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
            reasons = Counter(failure["reason"] for failure in self.failures if failure["kind"] == kind)
            named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            text += f" + {reasons.total()} {kind}{f' ({named})' if named else ''}"
        return text
