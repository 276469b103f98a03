"""What a run finds before it begins decides what it makes: only what is missing, and nothing outdated stays."""

import pytest

from data_prep.ledger import Ledger, Record
from data_prep.resume import Stock, take_stock
from data_prep.shards import Held
from data_prep.sources import Row
from data_prep.stats import Outcome
from sora_train.data.config import DataConfig
from sora_train.errors import UserError

DATA = DataConfig(output="out", frames=4, height=16, width=32)


def row(name: str, size: int = 1, reason: str = "") -> Row:
    return Row(f"id-{name}", f"{name}.mp4", ("x",), f"/{name}.mp4", size, "v", reason, "")


def held(*clips: str, size: int = 1) -> dict[str, Held]:
    """Clips such as `a0`, the first one of a.mp4."""
    return {
        clip: Held(f"id-{clip[0]}", f"{clip[0]}.mp4", size, "v", "bucket=4x16x32/part", "", "", (0.0, float(clip[1])))
        for clip in clips
    }


def ledger(failures: dict[str, str] | None = None, **records: list[str]) -> Ledger:
    failed = {s: {"sample_id": s, "source": f"{s[0]}.mp4", "reason": reason, "message": "", "duplicate_of": ""}
              for s, reason in (failures or {}).items()}  # fmt: skip
    return Ledger({f"id-{name}": Record(f"{name}.mp4", 1, "v", ids) for name, ids in records.items()}, failed)


def take(rows: list[Row], clips: dict[str, Held], book: Ledger) -> tuple[Stock, Outcome, dict[str, list[str]]]:
    outcome = Outcome(len(rows), 1.0, "out")
    stock = take_stock(DATA, rows, clips, {}, book, outcome)
    return stock, outcome, {row.source: done for row, done in stock.todo}


def test_a_source_whose_clips_are_all_there_is_not_opened_again():
    stock, outcome, todo = take([row("a")], held("a0", "a1"), ledger(a=["a0", "a1"]))
    assert todo == {}
    assert (outcome.asked, outcome.written, stock.outdated) == (2, 2, {})


def test_a_source_without_a_record_is_opened_and_its_clips_are_left_alone():
    stock, outcome, todo = take([row("a"), row("b")], held("a0"), ledger())
    assert todo == {"a.mp4": ["4x16x32/a0"], "b.mp4": []}
    assert (outcome.asked, outcome.written, stock.outdated) == (0, 1, {})


def test_what_failed_for_good_is_not_tried_again_and_what_may_go_better_is():
    rows, records = [row("a"), row("b")], {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    book = ledger({"a1": "corrupt", "b1": "timeout"}, **records)
    _, outcome, todo = take(rows, held("a0", "b0"), book)
    assert todo == {"b.mp4": ["4x16x32/b0"]}
    assert [failure["sample_id"] for failure in outcome.failures] == ["a1"]
    assert (outcome.asked, outcome.written) == (2, 2)


def test_a_changed_file_is_made_anew():
    stock, outcome, todo = take([row("a", size=2), row("b")], held("a0", "b0"), ledger(a=["a0"], b=["b0"]))
    assert todo == {"a.mp4": []}
    assert stock.outdated == {"bucket=4x16x32/part": {"a0"}}
    assert outcome.written == 1


def test_clips_that_nobody_asks_for_any_more_go_and_those_of_a_lost_file_stay():
    rows = [row("a", reason="missing_file"), row("b")]
    stock, outcome, todo = take(rows, held("a0", "b0", "b1", "c0"), ledger(b=["b0"]))
    assert stock.outdated == {"bucket=4x16x32/part": {"b1", "c0"}}
    assert (outcome.asked, outcome.written, todo, outcome.failures) == (2, 2, {}, [])


def test_a_folder_of_other_sources_is_refused():
    with pytest.raises(UserError, match=r"holds 1 clips of other sources \(as z.mp4\)"):
        take([row("a")], held("z0"), ledger())
