"""The limit on bad sources, and counts that add up."""

import pytest

from data_prep.stats import PrepStats
from sora_train.errors import UserError


def run(stats: PrepStats, start: int, stop: int, reason: str | None = None) -> None:
    """Sources that came out of the pipeline, each with one clip."""
    for i in range(start, stop):
        source = f"{i}.mp4"
        if reason:
            row = {"sample_id": str(i), "source": source, "source_size": 1, "source_version": "v"}
            stats.count_failure(row | {"start_s": 0.0, "end_s": 1.0, "reason": reason, "message": "words"})
        else:
            stats.count_written(source)
        stats.count_opened(source)
        stats.asked += 1


def test_a_tenth_of_bad_sources_passes_and_one_more_does_not():
    stats = PrepStats(100, 0.1, "out")
    run(stats, 0, 90)
    run(stats, 90, 100, "unreadable")
    stats.check_limits(finished=True)
    assert stats.summary() == "100 clips asked for = 90 written + 10 quarantined (unreadable 10) + 0 filtered"
    worse = PrepStats(100, 0.1, "out")
    run(worse, 0, 89)
    run(worse, 89, 100, "unreadable")
    with pytest.raises(
        UserError, match=r"11 of 100 sources can't be read, decoded or encoded.*11 unreadable \(89.mp4: words\)"
    ):
        worse.check_limits(finished=True)


def test_many_bad_sources_stop_a_run_after_200_are_opened():
    stats = PrepStats(10_000, 0.1, "out")
    run(stats, 0, 199, "corrupt")
    stats.check_limits()
    run(stats, 199, 200)
    with pytest.raises(UserError, match="199 of 200 sources"):
        stats.check_limits()


def test_the_three_commonest_reasons_are_named():
    stats = PrepStats(20, 0.1, "out")
    for start, stop, reason in ((0, 8, "corrupt"), (8, 13, "unreadable"), (13, 16, "timeout"), (16, 17, "empty_file")):
        run(stats, start, stop, reason)
    with pytest.raises(UserError, match=r"17 of 20 .* 8 corrupt .*5 unreadable .*3 timeout") as error:
        stats.check_limits()
    assert "empty_file" not in str(error.value)


def test_short_clips_and_outside_names_are_not_bad_sources():
    stats = PrepStats(10, 0.0, "out")
    run(stats, 0, 5, "too_short")
    run(stats, 5, 9, "outside_root")
    run(stats, 9, 10)
    stats.check_limits(finished=True)


def test_sources_that_can_not_be_encoded_count_too():
    stats = PrepStats(100, 0.1, "out")
    run(stats, 0, 80)
    run(stats, 80, 90, "encode_failed")
    stats.check_limits(finished=True)
    run(stats, 90, 100, "not_finite")
    with pytest.raises(UserError, match=r"20 of 100 .*10 encode_failed .*free memory on that device"):
        stats.check_limits(finished=True)


def test_a_source_with_one_good_clip_is_not_bad():
    stats = PrepStats(1, 0.0, "out")
    run(stats, 0, 1, "truncated")
    with pytest.raises(UserError, match="1 of 1 sources"):
        stats.check_limits()
    stats.count_written("0.mp4")
    stats.check_limits(finished=True)
    run(stats, 0, 1, "truncated")
    stats.check_limits(finished=True)


def test_a_run_without_a_clip_is_an_error():
    stats = PrepStats(3, 0.5, "out")
    run(stats, 0, 3, "too_short")
    with pytest.raises(UserError, match=r"none of 3 sources gave a clip: 3 too_short"):
        stats.check_limits(finished=True)
