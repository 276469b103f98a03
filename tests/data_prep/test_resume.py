"""A resumed run encodes only what is missing and drops stale clips, as a comparison of Python objects would."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import sources, spool
from data_prep.commits import Commits
from data_prep.compare import NO_PROGRESS, SavedProgress
from data_prep.reasons import PERMANENT
from data_prep.resume import (
    ResumeState,
    SourceRecord,
    load_progress,
    reconcile,
    save_quarantine,
)
from data_prep.shard_index import sync_index
from data_prep.shards import write_shard
from data_prep.sources import SourceRow, SourceRows, row_id
from data_prep.spool import to_ids
from data_prep.stats import PrepStats
from data_prep.stored import NO_CLIPS, ROW_BITS, StoredClips, count_clips, read_stored
from sora_train import index
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, bucket_of, encode_row
from sora_train.storage import resolve

DATA = DataConfig(output="out", frames=4, height=16, width=32)
SHARD, OTHER_SHARD, OTHER_BUCKET = "bucket=4x16x32/a", "bucket=4x16x32/b", "bucket=1x16x32/c"
SHARDS: list[str] = sorted((SHARD, OTHER_SHARD, OTHER_BUCKET))
EMPTY = dict.fromkeys(index.CLIPS.names)
Clip = tuple[str, int, str]
"""Name, size of its file, shard. `a0` is the first clip of a.mp4."""


def sid(name: str) -> str:
    """The id of a clip, as a run would have made it."""
    (found,) = to_ids(pa.array([name])).to_pylist()
    assert found
    return found.hex()


def row(name: str, size: int = 1, reason: str = "", caption: str = "x") -> SourceRow:
    source = f"{name}.mp4"
    return SourceRow(row_id(source, (caption,)), source, (caption,), f"/{source}", size, "v", reason, "")


def stored(*clips: str | Clip) -> StoredClips:
    numbers = dict.fromkeys(range(len(SHARDS)), 0)
    rows: list[dict] = []
    for clip in clips:
        name, size, shard = (clip, 1, SHARD) if isinstance(clip, str) else clip
        number = SHARDS.index(shard)
        facts = {"source": f"{name[0]}.mp4", "source_size": size, "source_version": "v", "start_s": float(name[1])}
        facts |= {"row_id": row(name[0]).row_id, "sample_id": sid(name), "content_hash": "", "perceptual_hash": ""}
        rows.append(EMPTY | facts | {"place": (number << ROW_BITS) + numbers[number]})
        numbers[number] += 1
    schema = pa.schema([*index.CLIPS, pa.field("place", pa.int64())])
    table = pa.Table.from_pylist(rows, schema)
    half = len(table) // 2
    return StoredClips(
        SHARDS, lambda columns: iter([t.select([*columns, "place"]) for t in (table[:half], table[half:])])
    )


def progress(
    failures: dict[str, str] | None = None,
    copies: dict[str, str] | None = None,
    size: int = 1,
    records: dict[str, list[str]] | None = None,
    **more: list[str],
) -> SavedProgress:
    """`copies`: of which clip a duplicate is one. Failures of the clips of `records`, whose files have a `size`."""
    rows = [
        dict.fromkeys(QUARANTINE_SCHEMA.names)
        | {"sample_id": sid(clip), "source": f"{clip[0]}.mp4", "source_size": size, "source_version": "v"}
        | {"reason": reason, "message": "", "duplicate_of": sid(copies[clip]) if copies and clip in copies else ""}
        for clip, reason in (failures or {}).items()
    ]  # fmt: skip
    finished = [
        (row(name).row_id, SourceRecord(f"{name}.mp4", size, "v", [sid(clip) for clip in clips], [f"{name}!"]))
        for name, clips in ((records or {}) | more).items()
    ]
    sources, failed = record_table(finished), pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)
    return SavedProgress(
        lambda columns: iter([sources.select(columns)]), lambda columns: iter([failed.select(columns)])
    )


def record_table(records: list[tuple[str, SourceRecord]]) -> pa.Table:
    return pa.Table.from_pylist([{"row_id": key, **asdict(record)} for key, record in records], index.SOURCES)


def resume(
    rows: list[SourceRow], clips: StoredClips, saved: SavedProgress
) -> tuple[ResumeState, PrepStats, list[tuple[str, list[str]]]]:
    stats = PrepStats(len(rows), 1.0, "out", quiet=True)
    state = reconcile(DATA, SourceRows.of(rows), clips, saved, stats)
    return state, stats, [(row.source, skip) for some in state.rounds(400_000) for row, skip in some]


def kept(state: ResumeState) -> list[str]:
    return [str(sample) for table in state.kept(["sample_id"]) for sample in table["sample_id"].to_pylist()]


def ids(*names: str) -> list[str]:
    return [sid(name) for name in names]


def test_rounds_have_all_sources_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "TABLE_ROWS", 4)
    rows = [row(f"{i:02d}") for i in range(22)]
    state = reconcile(DATA, SourceRows.of(rows), NO_CLIPS, NO_PROGRESS, PrepStats(22, 1.0, "out", quiet=True))
    rounds = [[source.source for source, _ in some] for some in state.rounds(7)]
    assert [len(some) for some in rounds] == [8, 8, 6]
    assert [name for some in rounds for name in some] == [f"{i:02d}.mp4" for i in range(22)]


def test_a_complete_source_is_not_opened_again():
    state, stats, todo = resume([row("a")], stored("a0", "a1"), progress(a=["a0", "a1"]))
    assert todo == []
    assert (stats.asked, stats.written, state.pending, kept(state)) == (2, 2, 0, ids("a0", "a1"))
    assert state.remarks == {"a!": 1}


def test_a_source_without_a_record_is_opened_and_keeps_its_clips():
    state, stats, todo = resume([row("a"), row("b")], stored("a0"), progress())
    assert todo == [("a.mp4", [f"4x16x32/{sid('a0')}"]), ("b.mp4", [])]
    assert (stats.asked, stats.written, state.pending, kept(state)) == (0, 1, 2, ids("a0"))


def test_only_failures_that_are_not_permanent_are_tried_again():
    rows, records = [row("a"), row("b")], {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    saved = progress({"a1": "corrupt", "b1": "timeout"}, records=records)
    _, stats, todo = resume(rows, stored("a0", "b0"), saved)
    assert todo == [("b.mp4", [f"4x16x32/{sid('b0')}"])]
    assert [failure["sample_id"] for failure in stats.failures] == ids("a1")
    assert (stats.asked, stats.written) == (2, 2)


def test_failures_of_earlier_runs_are_counted_and_not_printed_again(capsys: pytest.CaptureFixture[str]):
    stats = PrepStats(2, 1.0, "out")
    saved = progress({"a1": "corrupt"}, a=["a0", "a1"])
    reconcile(DATA, SourceRows.of([row("a"), row("b", reason="missing_file")]), stored("a0"), saved, stats)
    assert stats.reasons == {"corrupt": 1, "missing_file": 1}
    assert capsys.readouterr().out == "prep: b.mp4 is quarantined: missing_file: \n"


def test_a_changed_file_is_encoded_again():
    state, stats, todo = resume([row("a", size=2), row("b")], stored("a0", "b0"), progress(a=["a0"], b=["b0"]))
    assert todo == [("a.mp4", [])]
    assert (kept(state), stats.written) == (ids("b0"), 1)


def test_a_failure_of_another_file_of_that_name_does_not_hold():
    saved = progress({"a1": "corrupt"}, a=["a0", "a1"])
    newer = progress(size=2, a=["a0", "a1"])
    both = SavedProgress(newer.sources, saved.failures)
    assert resume([row("a", size=2)], stored(("a0", 2, SHARD)), both)[2] == [("a.mp4", [f"4x16x32/{sid('a0')}"])]


def test_unwanted_clips_are_stale_but_not_those_of_a_lost_file():
    rows = [row("a", reason="missing_file"), row("b")]
    state, stats, todo = resume(rows, stored("a0", "b0", "b1", "c0"), progress(b=["b0"]))
    assert kept(state) == ids("a0", "b0")
    assert (stats.asked, stats.written, todo, len(stats.failures)) == (2, 2, [], 0)


def test_a_folder_of_other_sources_or_buckets_is_refused():
    with pytest.raises(UserError, match="holds 1 clips of other sources, such as z.mp4"):
        resume([row("a")], stored("z0"), progress())
    resume([row("z", caption="another")], stored("z0"), progress())
    only = StoredClips([OTHER_BUCKET], lambda columns: stored(("a0", 1, OTHER_BUCKET)).read(columns))
    with pytest.raises(UserError, match="holds clips of 1x16x32; the recipe asks for 4x16x32"):
        resume([row("a")], only, progress())


def test_a_source_that_could_not_be_opened_keeps_its_clips_and_others_lose_unwanted_ones():
    state, stats, _ = resume([row("a"), row("b")], stored("a0", "b0", "b1"), progress())
    assert state.holds(sid("a0"))
    assert not state.holds(sid("c0"))
    record = state.finish(row("a").row_id, SourceRecord("a.mp4", 1, "v", [row("a").row_id]))
    assert record.sample_ids == [row("a").row_id, sid("a0")]
    state.finish(row("b").row_id, SourceRecord("b.mp4", 1, "v", ids("b1", "b2"), ["hdr"]))
    assert (stats.asked, stats.written, state.remarks) == (4, 2, {"hdr": 1})
    assert not state.holds(sid("b1")), "its source is finished"


NAMES = "abc"
CLIPS = st.sampled_from([f"{name}{i}" for name in NAMES for i in range(3)])
REASONS = st.sampled_from(["corrupt", "timeout", "duplicate", "too_short"])
ROWS = st.builds(
    row, st.sampled_from(NAMES), st.integers(1, 2), st.sampled_from(["", "", "missing_file", "empty_file"])
)


@settings(max_examples=100)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    clips=st.lists(st.tuples(CLIPS, st.integers(1, 2), st.sampled_from(SHARDS)), max_size=8),
    records=st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 2), unique=True, max_size=3)),
    size=st.integers(1, 2),
    failures=st.dictionaries(CLIPS, REASONS),
    copies=st.dictionaries(CLIPS, CLIPS),
    parts=st.integers(1, 3),
)
def test_the_join_equals_a_comparison_of_objects(rows, clips, records, size, failures, copies, parts):
    copies = {clip: of for clip, of in copies.items() if failures.get(clip) == "duplicate"}
    listed = {name: [f"{name}{i}" for i in numbers] for name, numbers in records.items()}
    saved, old_rows = progress(failures, copies, size, listed), marked_repeats(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PART_ROWS", max(1, len(rows) // parts))
        patch.setattr(spool, "BUFFER_BYTES", 100)
        clips = sorted(clips, key=lambda clip: clip[2])
        due = oracle(old_rows, clips, listed, size, failures, copies)
        if due is None:
            with pytest.raises(UserError, check=lambda error: error.code == "shards"):
                resume(rows, stored(*clips), saved)
            return
        state, stats, todo = resume(rows, stored(*clips), saved)
    assert todo == due["todo"]
    assert sorted(kept(state)) == sorted(due["kept"])
    assert (stats.asked, stats.written) == (due["asked"], len(due["kept"]))
    assert sorted(failure["sample_id"] for failure in stats.failures) == sorted(due["failed"])
    assert set(stats.bad_sources) == due["bad"]
    assert sum(table.num_rows for table in state.known_hashes()) == len(due["kept"])


def marked_repeats(rows: list[SourceRow]) -> list[SourceRow]:
    seen: set[str] = set()
    return [
        row
        if row.row_id not in seen and not seen.add(row.row_id)
        else SourceRow(row.row_id, row.source, row.captions, reason="duplicate_row")
        for row in rows
    ]


def oracle(rows, clips, records, size, failures, copies) -> dict | None:
    """What `reconcile` finds, by dicts of all clips. None: the folder is refused."""
    held: dict[str, Clip] = {}
    for clip in clips:
        held.setdefault(clip[0], clip)  # of repeated ones, the first stays
    by_id = {row.source[0]: row for row in rows if row.reason in ("", "missing_file")}
    if held and not ({name[0] for name in held} & {row.source[0] for row in rows}):
        return None

    def changed(row: SourceRow, size: int) -> bool:
        return row.reason != "missing_file" and row.size != size

    for name, (_, of_size, shard) in list(held.items()):
        row, record = by_id.get(name[0]), records.get(name[0])
        is_other_cut = row and record is not None and not changed(row, size) and name not in record
        if row is None or changed(row, of_size) or shard == OTHER_BUCKET or is_other_cut:
            del held[name]
    asked, failed, todo, bad = 0, list[str](), list[tuple[str, list[str]]](), set[str]()
    for row in rows:
        mine = [name for name in held if name[0] == row.source[0]]
        if row.reason == "missing_file" and mine:
            asked += len(mine)
        elif row.reason:
            asked += 1
            failed.append(row.row_id)
            if row.reason != "duplicate_row" and not mine:
                bad.add(row.source)
        elif row.source[0] not in records or changed(row, size):
            todo.append((row.source, skipped(mine, held, [])))
        else:
            record = records[row.source[0]]
            missing = [name for name in record if name not in held]
            lost = [
                name
                for name in missing
                if failures.get(name) in PERMANENT and (name not in copies or copies[name] in held)
            ]
            failed += ids(*lost)
            if any(failures[name] == "corrupt" for name in lost) and not mine:
                bad.add(row.source)
            if len(lost) == len(missing):
                asked += len(record)
            else:
                todo.append((row.source, skipped(mine, held, lost)))
    return {"asked": asked, "failed": failed, "todo": todo, "kept": ids(*held), "bad": bad}


def skipped(mine: list[str], held: dict[str, Clip], lost: list[str]) -> list[str]:
    return [f"{bucket_of(held[name][2])}/{sid(name)}" for name in mine] + ids(*lost)


def test_progress_that_an_older_version_saved_is_loaded(tmp_path: Path):
    folder = Path(__file__).parents[1] / "old_format" / "shards"
    key = pq.read_schema(folder / "sources.parquet").metadata[b"settings_hash"].decode()
    for name in ("sources.parquet", "quarantine.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())

    def samples() -> tuple[set[str], set[str]]:
        saved = load_progress(str(tmp_path), key)
        asked = [pc.list_flatten(table["sample_ids"]) for table in saved.sources(["sample_ids"])]
        failed = [table["sample_id"] for table in saved.failures(["sample_id"])]
        found: list[set[str]] = [{str(name) for some in each for name in some.to_pylist()} for each in (asked, failed)]
        return found[0], found[1]

    asked, failed = samples()
    stored = read_stored(str(folder), Manifest.load(str(folder)).encoding_hash)
    assert asked - failed == {str(i) for table in stored.read(["sample_id"]) for i in table["sample_id"].to_pylist()}


def test_saved_progress_is_loaded_for_the_same_settings_only(tmp_path: Path):
    folder = str(tmp_path)
    commits = Commits(folder, "key", "settings")
    failure = dict.fromkeys(QUARANTINE_SCHEMA.names) | {"sample_id": "t", "reason": "corrupt"}
    failures = pa.Table.from_pylist([failure], QUARANTINE_SCHEMA)
    record = SourceRecord("a.mp4", 5, "7", ["s", "t"])
    for some in (failures, failures[:0]):
        commits.records = {"row": record}
        commits.save_sources(some, set())
    saved = load_progress(folder, "settings")
    records = record_table([("row", record)] * 2)
    assert pa.concat_tables(saved.sources(index.SOURCES.names)).equals(records)
    assert pa.concat_tables(saved.failures(QUARANTINE_SCHEMA.names)).equals(failures)
    assert list(load_progress(folder, "others").sources(["row_id"])) == []
    assert list(load_progress(str(tmp_path / "nowhere"), "settings").failures(["sample_id"])) == []


def test_the_quarantine_is_written_whole_and_a_damaged_one_counts_as_empty(tmp_path: Path):
    failure = dict.fromkeys(QUARANTINE_SCHEMA.names) | {"sample_id": "t", "reason": "corrupt"}
    failures = pa.Table.from_pylist([failure] * 3, QUARANTINE_SCHEMA)
    save_quarantine(str(tmp_path), "settings", iter([failures[:2], failures[2:]]))
    assert pq.read_table(tmp_path / "quarantine.parquet").equals(failures)
    saved = load_progress(str(tmp_path), "settings")
    assert pa.concat_tables(saved.failures(QUARANTINE_SCHEMA.names)).equals(failures)
    (tmp_path / "quarantine.parquet").write_bytes(b"no parquet")
    assert list(saved.failures(["sample_id"])) == []


def test_loading_saved_progress_leaves_no_thread_behind(tmp_path: Path):
    save_quarantine(str(tmp_path), "settings", [])
    code = (
        "from pathlib import Path\n"
        "from data_prep.resume import load_progress\n"
        "def threads(): return {t.name for t in Path('/proc/self/task').iterdir()"
        " if not (t / 'comm').read_text().startswith('jemalloc')}\n"
        "before = threads()\n"
        f"assert len(list(load_progress({str(tmp_path)!r}, 'settings').failures(['sample_id'])))\n"
        "import time\n"
        "ends = time.monotonic() + 10\n"
        "while threads() != before and time.monotonic() < ends: time.sleep(0.05)\n"  # a joined thread takes a moment
        "assert threads() == before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def clip_table(*numbers: int) -> pa.Table:
    rows = [
        encode_row(
            sample_id=sid(f"a{i}"), source="a.mp4", source_size=1, source_version="v", content_hash="",
            start_s=float(i), end_s=1.0, captions=["x"], latents=np.zeros(4), text=[np.zeros((1, 4))],
        )
        for i in numbers
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SHARD_SCHEMA)


def write(folder: Path, name: str, *numbers: int) -> None:
    write_shard(resolve(str(folder))[0], f"{folder}/bucket=4x16x32/{name}.parquet", "key", [clip_table(*numbers)])


def test_dropped_clips_are_gone_from_the_index_and_their_shards_stay(tmp_path: Path):
    write(tmp_path, "a", 0, 1, 2)
    write(tmp_path, "b", 2, 3)  # a2 again, as after a kill
    folder = str(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    saved = progress(a=["a0", "a2", "a3"])
    with pytest.raises(UserError, match="another encoding"):
        sync_index(folder, "another")
    for _ in range(2):
        sync_index(folder, "key")
        stats = PrepStats(1, 1.0, folder, quiet=True)
        state = reconcile(DATA, SourceRows.of([row("a")]), read_stored(folder, "key"), saved, stats)
        assert (stats.written, sorted(kept(state))) == (3, sorted(ids("a0", "a2", "a3")))
        state.remove_stale(folder)
        assert count_clips(folder) == {"4x16x32": 3}
    assert {file.name: file.read_bytes() for file in tmp_path.rglob("*.parquet")} == before
    write(tmp_path, "a", 4)  # another file of that name
    assert count_clips(folder) == {"4x16x32": 1}, "the index does not know it yet"
    stored = read_stored(folder, "key")
    assert ids("a3", "a4") == [i for table in stored.read(["sample_id"]) for i in table["sample_id"].to_pylist()]
    sync_index(folder, "key")
    assert count_clips(folder) == {"4x16x32": 2}


def test_an_id_does_not_depend_on_the_other_names_of_its_column():
    name = "0123456789abcdef" * 2
    alone, mixed = to_ids(pa.array([name])), to_ids(pa.array(["", name, "A" * 32]))
    assert mixed[1].as_py() == alone[0].as_py() == bytes.fromhex(name)
    assert len(set(mixed.to_pylist())) == 3
