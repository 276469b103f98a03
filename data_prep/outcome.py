"""What became of every row: the failures with their reasons, the judgement over them, the closing line."""

from __future__ import annotations

from collections import Counter

from data_prep.reasons import UNDECODABLE, kind_of, stage_of
from data_prep.source import Row
from sora_train.errors import UserError

JUDGED_AFTER = 200  # sources
REMARKS = 20  # lines about single files


class Outcome:
    """Counts rows by how they ended. `failures` are rows of the quarantine."""

    def __init__(self, rows: list[Row], done: set[str], max_bad_fraction: float, folder: str):
        self.rows, self.max_bad_fraction, self.folder = rows, max_bad_fraction, folder
        self.failures: list[dict] = []
        self.written = len(done)
        self.sources = len({row.source for row in rows})
        self.files = {row.sample_id: (row.size, row.version) for row in rows}
        self.seen: set[str] = set()  # sources that were opened
        self.bad: dict[str, str] = {}  # source -> reason
        self._remarks = 0
        self.add(
            [vars(row) for row in rows if row.reason and not (row.sample_id in done and row.reason == "missing_file")]
        )
        self.seen.clear()

    def add(self, rows: list[dict]) -> tuple[int, int, int]:
        """Takes rows as they come out of the chain; returns how many were written, quarantined and filtered."""
        counts = Counter(self._add(row) for row in rows)
        return counts["written"], counts["quarantined"], counts["filtered"]

    def _add(self, row: dict) -> str:
        self.seen.add(row["source"])
        if not row["reason"]:
            self.written += 1
            if row["remark"]:
                self._say(f"{row['source']} {row['remark']}")
            return "written"
        kind = kind_of(row["reason"])
        columns = {name: row[name] for name in ("sample_id", "source", "start_s", "end_s", "reason", "message")}
        size, version = self.files[row["sample_id"]]
        file = {"source_size": size, "source_version": version}
        self.failures.append(columns | file | {"stage": stage_of(row["reason"]), "kind": kind})
        if row["reason"] in UNDECODABLE:
            self.bad[row["source"]] = row["reason"]
        self._say(f"{row['source']} is {kind}: {row['reason']}: {row['message']}")
        return kind

    def _say(self, remark: str) -> None:
        self._remarks += 1
        if self._remarks <= REMARKS:
            print(f"prep: {remark}", flush=True)
        elif self._remarks == REMARKS + 1:
            print(f"prep: more such files are named in {self.folder}/quarantine.parquet only", flush=True)

    def judge(self, finished: bool = False) -> None:
        """Raises UserError where too many sources can't be decoded, or at the end where no clip is left.

        Judged over what was opened once that is 200 sources, and at any time where the rest can't make it good.
        """
        opened = len(self.seen) if len(self.seen) >= JUDGED_AFTER else self.sources
        for bad, total in ((len(self.bad), self.sources), (len(self.bad.keys() & self.seen), opened)):
            if bad > self.max_bad_fraction * total:
                raise UserError(
                    f"{bad} of {total} sources can't be read or decoded, more than data.max_bad_fraction "
                    f"{self.max_bad_fraction:g} allows: {self._commonest(self.bad)}. {self.folder}/quarantine.parquet "
                    "names each; mend or remove them, check data.root, or raise data.max_bad_fraction"
                )
        if finished and not self.written:
            reasons = {failure["source"]: failure["reason"] for failure in self.failures}
            raise UserError(
                f"no clip is left of {len(self.rows)} rows: {self._commonest(reasons)}. "
                f"{self.folder}/quarantine.parquet names each"
            )

    def _commonest(self, reasons: dict[str, str]) -> str:
        """The three commonest reasons, each with an example."""
        example = {row["reason"]: f"{row['source']}: {row['message']}" for row in reversed(self.failures)}
        commonest = Counter(reasons.values()).most_common(3)
        return "; ".join(f"{count} {reason} ({example[reason]})" for reason, count in commonest)

    def summary(self) -> str:
        """`1500 rows = 1490 written + 8 quarantined + 2 filtered (too_short 2, unreadable 8)`."""
        kinds = Counter(failure["kind"] for failure in self.failures)
        reasons = Counter(failure["reason"] for failure in self.failures)
        named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        lost = f"{kinds['quarantined']} quarantined + {kinds['filtered']} filtered"
        counts = f"{len(self.rows)} rows = {self.written} written + {lost}"
        return f"{counts} ({named})" if named else counts
