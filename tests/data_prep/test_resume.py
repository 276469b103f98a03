"""A resumed run encodes only what is missing, and removes stale clips."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.resume import ResumeState, SavedProgress, SourceRecord, reconcile
from data_prep.shards import StoredClip, read_stored_clips
from data_prep.sources import SourceRow
from data_prep.stats import PrepStats
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.manifest import Manifest

DATA = DataConfig(output="out", frames=4, height=16, width=32)


def row(name: str, size: int = 1, reason: str = "") -> SourceRow:
    return SourceRow(f"id-{name}", f"{name}.mp4", ("x",), f"/{name}.mp4", size, "v", reason, "")


def stored(*clips: str, size: int = 1) -> dict[str, StoredClip]:
    """Clips such as `a0`, the first one of a.mp4."""
    return {
        clip: StoredClip(
            f"id-{clip[0]}", f"{clip[0]}.mp4", size, "v", "bucket=4x16x32/part", "", "", (0.0, float(clip[1]))
        )
        for clip in clips
    }


def progress(failures: dict[str, str] | None = None, **records: list[str]) -> SavedProgress:
    file = {"source_size": 1, "source_version": "v"}
    failed = {s: file | {"sample_id": s, "source": f"{s[0]}.mp4", "reason": reason, "message": "", "duplicate_of": ""}
              for s, reason in (failures or {}).items()}  # fmt: skip
    return SavedProgress(
        {f"id-{name}": SourceRecord(f"{name}.mp4", 1, "v", ids) for name, ids in records.items()}, failed
    )


def resume(
    rows: list[SourceRow], clips: dict[str, StoredClip], saved: SavedProgress
) -> tuple[ResumeState, PrepStats, dict[str, list[str]]]:
    stats = PrepStats(len(rows), 1.0, "out")
    state = reconcile(DATA, rows, clips, {}, saved, stats)
    return state, stats, {row.source: done for row, done in state.todo}


def test_a_complete_source_is_not_opened_again():
    state, stats, todo = resume([row("a")], stored("a0", "a1"), progress(a=["a0", "a1"]))
    assert todo == {}
    assert (stats.asked, stats.written, state.stale) == (2, 2, {})


def test_a_source_without_a_record_is_opened_and_keeps_its_clips():
    state, stats, todo = resume([row("a"), row("b")], stored("a0"), progress())
    assert todo == {"a.mp4": ["4x16x32/a0"], "b.mp4": []}
    assert (stats.asked, stats.written, state.stale) == (0, 1, {})


def test_only_failures_that_are_not_permanent_are_tried_again():
    rows, records = [row("a"), row("b")], {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    saved = progress({"a1": "corrupt", "b1": "timeout"}, **records)
    _, stats, todo = resume(rows, stored("a0", "b0"), saved)
    assert todo == {"b.mp4": ["4x16x32/b0"]}
    assert [failure["sample_id"] for failure in stats.failures] == ["a1"]
    assert (stats.asked, stats.written) == (2, 2)


def test_a_changed_file_is_encoded_again():
    state, stats, todo = resume([row("a", size=2), row("b")], stored("a0", "b0"), progress(a=["a0"], b=["b0"]))
    assert todo == {"a.mp4": []}
    assert state.stale == {"bucket=4x16x32/part": {"a0"}}
    assert stats.written == 1


def test_unwanted_clips_are_stale_but_not_those_of_a_lost_file():
    rows = [row("a", reason="missing_file"), row("b")]
    state, stats, todo = resume(rows, stored("a0", "b0", "b1", "c0"), progress(b=["b0"]))
    assert state.stale == {"bucket=4x16x32/part": {"b1", "c0"}}
    assert (stats.asked, stats.written, todo, stats.failures) == (2, 2, {}, [])


def test_a_folder_of_other_sources_is_refused():
    with pytest.raises(UserError, match="holds 1 clips of other sources, such as z.mp4"):
        resume([row("a")], stored("z0"), progress())


def test_progress_that_an_older_version_saved_is_loaded():
    folder = Path(__file__).parents[1] / "old_format" / "shards"
    key = pq.read_schema(folder / "sources.parquet").metadata[b"settings_hash"].decode()
    saved = SavedProgress.load(str(folder), key)
    samples = {sample for record in saved.records.values() for sample in record.sample_ids}
    stored, _ = read_stored_clips(str(folder), Manifest.load(str(folder)).encoding_hash)
    assert samples - saved.failures.keys() == stored.keys()
