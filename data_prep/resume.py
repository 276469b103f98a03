"""What is there before a run begins, beside what the recipe asks for: what stays, what goes, what is to be made."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_prep.ledger import SavedProgress, SourceRecord
from data_prep.shards import StoredClip, remove_clips
from data_prep.sources import SourceRow
from data_prep.stats import PrepStats
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.schema import bucket_name, bucket_of

PendingSource = tuple[SourceRow, list[str]]
"""A source to go through, and those of its clips that need not be made: `bucket/sample_id`, or `sample_id` alone."""


@dataclass
class ResumeState:
    """What `reconcile` found."""

    todo: list[PendingSource] = field(default_factory=list)
    stored: dict[str, StoredClip] = field(default_factory=dict)
    """Clips in the shards that stay, by `sample_id`."""
    of_row: dict[str, list[str]] = field(default_factory=dict)
    """Their ids by `row_id`."""
    outdated: dict[str, set[str]] = field(default_factory=dict)
    """Per shard, the clips that go: no longer asked for, or their file has changed."""

    def drop(self, sample_id: str) -> None:
        """Marks a clip of the shards as outdated."""
        self.outdated.setdefault(self.stored.pop(sample_id).shard, set()).add(sample_id)

    def done(self, sample_ids: list[str]) -> list[str]:
        """Clips of the shards as the decoder is told of them: in another bucket they are made anew."""
        return [f"{bucket_of(self.stored[sample].shard)}/{sample}" for sample in sample_ids]

    def remove_stale(self, folder: str) -> None:
        """Takes what is outdated out of the shards."""
        for shard, samples in self.outdated.items():
            name = shard.rpartition("/")[2]
            log.info(f"prep: {len(samples)} clips of {name} go: no longer asked for, or their file has changed")
            remove_clips(folder, shard, samples)
        self.outdated.clear()


def check_folder(data: DataConfig, rows: list[SourceRow], stored: dict[str, StoredClip]) -> set[str]:
    """The names of the buckets that the recipe asks for.

    Raises UserError if the shards in `data.output` hold only other sources, or only clips of other buckets: that is the
    wrong folder, not a change of the recipe.
    """
    folder = data.output
    if stored and not {clip.source for clip in stored.values()} & {row.source for row in rows}:
        raise UserError(
            f"data.output: {folder} holds {len(stored)} clips of other sources (as "
            f"{next(iter(stored.values())).source}), none that data.captions names; set data.output to another folder, "
            "or delete this one"
        )
    in_use, wanted = {bucket_of(clip.shard) for clip in stored.values()}, {bucket_name(*shape) for shape in data.shapes}
    if stored and not in_use & wanted:
        raise UserError(
            f"data.output: {folder} holds clips of {', '.join(sorted(in_use))} and the recipe asks for "
            f"{', '.join(sorted(wanted))}; set data.output to another folder, or delete this one"
        )
    return wanted


def reconcile(
    data: DataConfig,
    rows: list[SourceRow],
    stored: dict[str, StoredClip],
    twice: dict[str, set[str]],
    saved: SavedProgress,
    stats: PrepStats,
) -> ResumeState:
    """Sorts the rows by what is known of them, and enters into `stats` all that needs no work.

    Raises UserError as `check_folder` does.
    """
    wanted = check_folder(data, rows, stored)
    state = ResumeState(stored=dict(stored), outdated={shard: set(samples) for shard, samples in twice.items()})
    asked = {row.row_id: row for row in rows if not row.reason or row.reason == "missing_file"}
    for sample, clip in stored.items():
        row = asked.get(clip.row_id)
        record = saved.records.get(clip.row_id)
        if row is None or _has_changed(row, clip.size, clip.version) or bucket_of(clip.shard) not in wanted:
            state.drop(sample)
        elif record and not _has_changed(row, record.size, record.version) and sample not in record.sample_ids:
            state.drop(sample)  # the recipe cuts otherwise now
        else:
            state.of_row.setdefault(clip.row_id, []).append(sample)
    for clip in state.stored.values():
        stats.count_written(clip.source)
    for row in rows:
        _sort(row, state, saved, stats)
    return state


def _sort(row: SourceRow, state: ResumeState, saved: SavedProgress, stats: PrepStats) -> None:
    """Enters a row where it belongs: settled, failed, or to be worked on."""
    mine = state.of_row.get(row.row_id, [])
    if row.reason == "missing_file" and mine:  # of a file that is gone the clips stay
        stats.record_source(
            row.row_id, SourceRecord(row.source, state.stored[mine[0]].size, state.stored[mine[0]].version, mine)
        )
        return
    if row.reason:
        stats.asked += 1
        stats.count_failure(_failure(row))
        return
    record = saved.records.get(row.row_id)
    if record is None or _has_changed(row, record.size, record.version):
        state.todo.append((row, state.done(mine)))
        return
    failures = [
        saved.permanent_failure(sample, state.stored) for sample in record.sample_ids if sample not in state.stored
    ]
    for failure in filter(None, failures):
        stats.count_failure(failure)
    if all(failures):
        stats.record_source(row.row_id, record)
    else:
        state.todo.append((row, state.done(mine) + [failure["sample_id"] for failure in failures if failure]))


def _failure(row: SourceRow) -> dict:
    """A row of the quarantine for a source that was not opened."""
    return {
        "sample_id": row.row_id,
        "source": row.source,
        "source_size": row.size,
        "source_version": row.version,
        "start_s": 0.0,
        "end_s": 0.0,
        "reason": row.reason,
        "message": row.message,
    }


def _has_changed(row: SourceRow, size: int, version: str) -> bool:
    """Whether a file is another than that with this size and version; one that is gone has not changed."""
    return row.reason != "missing_file" and (row.size, row.version) != (size, version)
