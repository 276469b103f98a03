"""The judgement over bad sources, and counts that add up."""

import pytest

from data_prep.outcome import Outcome
from data_prep.source import Row
from sora_train.errors import UserError


def rows(count: int) -> list[Row]:
    return [Row(str(i), f"{i}.mp4", ("x",), 0, 1) for i in range(count)]


def results(start: int, stop: int, reason: str | None = None) -> list[dict]:
    common = {"start_s": 0.0, "end_s": 1.0, "reason": reason, "message": "words", "remark": None}
    return [{"sample_id": str(i), "source": f"{i}.mp4", **common} for i in range(start, stop)]


def test_a_tenth_of_bad_sources_passes_and_one_more_does_not():
    outcome = Outcome(rows(100), set(), 0.1, "out")
    outcome.add(results(0, 90))
    outcome.add(results(90, 100, "unreadable"))
    outcome.judge(finished=True)
    assert outcome.summary() == "100 rows = 90 written + 10 quarantined + 0 filtered (unreadable 10)"
    worse = Outcome(rows(100), set(), 0.1, "out")
    worse.add(results(0, 89))
    worse.add(results(89, 100, "unreadable"))
    with pytest.raises(UserError, match=r"11 of 100 sources can't be read or decoded.*11 unreadable \(89.mp4: words\)"):
        worse.judge(finished=True)


def test_many_bad_sources_stop_a_long_run_after_200_of_them_were_opened():
    outcome = Outcome(rows(10_000), set(), 0.1, "out")
    outcome.add(results(0, 199, "corrupt"))
    outcome.judge()
    outcome.add(results(199, 200))
    with pytest.raises(UserError, match="199 of 200 sources"):
        outcome.judge()


def test_the_three_commonest_reasons_are_named():
    outcome = Outcome(rows(20), set(), 0.1, "out")
    for start, stop, reason in ((0, 8, "corrupt"), (8, 13, "unreadable"), (13, 16, "timeout"), (16, 17, "empty_file")):
        outcome.add(results(start, stop, reason))
    with pytest.raises(UserError, match=r"17 of 20 .* 8 corrupt .*5 unreadable .*3 timeout") as error:
        outcome.judge()
    assert "empty_file" not in str(error.value)


def test_short_clips_and_names_outside_the_root_are_no_bad_sources():
    outcome = Outcome(rows(10), set(), 0.0, "out")
    outcome.add(results(0, 5, "too_short") + results(5, 9, "outside_root") + results(9, 10))
    outcome.judge(finished=True)


def test_a_run_that_leaves_no_clip_says_so():
    outcome = Outcome(rows(3), set(), 0.5, "out")
    outcome.add(results(0, 3, "too_short"))
    with pytest.raises(UserError, match=r"no clip is left of 3 rows: 3 too_short"):
        outcome.judge(finished=True)
