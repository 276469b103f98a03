"""The monitor thread shows every line once, and no error ends it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.launch.monitor import Monitor, Tail
from sora_train.train.metrics import Events, JsonLines
from sora_train.train.tracking import Tracker

OFF = {"mode": "off", "project": "p"}


def record(step: int) -> dict:
    figures = ("loss", "lr", "grad_norm", "step_s", "samples_per_s", "data_wait_share")
    return {"step": step, **dict.fromkeys(figures, 0.5)}


def soon(holds: Callable[[], bool]) -> bool:
    ends = time.monotonic() + 30
    while time.monotonic() < ends and not holds():
        time.sleep(0.05)
    return holds()


def test_like_lines_are_shown_as_often_as_they_come(tmp_path: Path):
    tail, lines = Tail(tmp_path / "events.jsonl"), JsonLines(tmp_path / "events.jsonl")
    for _ in range(2):
        lines.write({"step": 1, "event": "skipped"})
        lines.write({"step": 1, "event": "skipped"})
        assert len(tail.new_records()) == 2
    assert tail.new_records() == []


def test_only_new_lines_are_shown_after_a_cut(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 0})
    tail = Tail(lines.path)
    for step in (1, 2, 3):
        lines.write({"step": step})
    lines.write({"step": 1, "validation": True})
    assert [found["step"] for found in tail.new_records()] == [1, 2, 3, 1]
    lines.truncate(1)
    for step in (2, 2, 3):
        lines.write({"step": step, "again": True})
    assert [found["step"] for found in tail.new_records()] == [2, 2, 3]
    lines.truncate(0)
    assert tail.new_records() == []
    lines.write({"step": 1, "again": True})
    assert [found["step"] for found in tail.new_records()] == [1]


def test_a_damaged_line_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Monitor(tmp_path, 9, OFF, {}):
        with (tmp_path / "metrics.jsonl").open("w") as file:
            file.write('{"step": 1}\n{"step": 2, "loss": "x"}\nnonsense\n' + json.dumps(record(3)) + "\n")
        (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"step": 2, "event": "resume", "reason": "r"}\n')
    said = capsys.readouterr()
    assert "step 3/9" in said.out
    assert "resume at step 2: r" in said.out
    assert said.err.count("training continues") == len(said.err.splitlines()) > 0


def test_a_file_that_can_not_be_read_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Monitor(tmp_path, 9, OFF, {}) as monitor:
        (tmp_path / "events.jsonl").mkdir()
        time.sleep(2)  # several rounds
        JsonLines(tmp_path / "metrics.jsonl").write(record(1))
        assert soon(lambda: monitor.activity == "training")
    said = capsys.readouterr()
    assert "step 1/9" in said.out
    assert said.err.count("IsADirectoryError") == 1


def test_a_stdout_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    with Monitor(tmp_path, 9, OFF, {}) as monitor:
        monkeypatch.setattr("sys.stdout", Broken())
        JsonLines(tmp_path / "metrics.jsonl").write(record(1))
        Events(tmp_path).write("start", 0, "from scratch")
        assert soon(lambda: monitor.training)
        Events(tmp_path).write("worker_lost", 0, "r")
        assert soon(lambda: not monitor.training)


def test_a_tracker_that_can_note_nothing_ends_nothing(tmp_path: Path):
    def full(why: str) -> None:
        raise UserError("events.jsonl can't be written: No space left on device", code="not_writable")

    tracker = Tracker(tmp_path / "nowhere", mode="offline", project="p", config={}, failed=full)
    tracker.log([{"step": 1, "loss": 1.0}])
    assert tracker.writer is None


def test_a_tracker_that_hangs_holds_no_line_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import threading

    import wandb

    answers = threading.Event()

    def hang(**_: object) -> None:  # as a server that does not answer makes it
        answers.wait(60)
        raise TimeoutError("no answer")

    monkeypatch.setattr(wandb, "init", hang)
    with Monitor(tmp_path, 9, {"mode": "offline", "project": "p"}, {}) as monitor:
        JsonLines(tmp_path / "metrics.jsonl").write(record(1))
        assert soon(lambda: monitor.activity == "training")
        JsonLines(tmp_path / "metrics.jsonl").write(record(2))
        said = ""
        ends = time.monotonic() + 30
        while "step 2/9" not in said and time.monotonic() < ends:
            said += capsys.readouterr().out
            time.sleep(0.1)
        assert "step 2/9" in said
        answers.set()
    (event,) = Events(tmp_path).lines.read()
    assert (event["event"], event["step"]) == ("tracking_failed", 2)
