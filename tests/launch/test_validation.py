"""The supervisor of a validation, called as Ray calls it but without Ray."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sora_train.launch.monitor import Tail
from sora_train.launch.validation import ValidationStatus, run_child, supervise
from sora_train.launch.worker import request_validation
from sora_train.train.metrics import STOP_FILE, Events, JsonLines


def events(run: Path) -> list[tuple[str, int, str]]:
    return [(event["event"], event["step"], event["reason"]) for event in Events(run).lines.read()]


def test_a_validation_that_takes_too_long_is_retried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SORA_VALIDATION_DELAY_S", "60")
    checkpoint = SimpleNamespace(path=str(tmp_path / "checkpoints/step_00000007"))
    began = time.monotonic()
    result = supervise(checkpoint, run=str(tmp_path), timeout_s=1.0, gpu=False)
    assert time.monotonic() - began < 20
    assert result["validated"] is False
    assert events(tmp_path) == [("validation_failed", 7, "ended after validation.timeout_s 1")] * 2
    assert ValidationStatus(tmp_path).get(7) == "failed"


def test_a_validation_ends_with_a_run_that_was_asked_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SORA_VALIDATION_DELAY_S", "60")
    (tmp_path / STOP_FILE).touch()
    began = time.monotonic()
    result = supervise(SimpleNamespace(path=str(tmp_path / "checkpoints/step_00000007")), run=str(tmp_path),
                       timeout_s=60.0, gpu=False)  # fmt: skip
    assert time.monotonic() - began < 20
    assert result["validated"] is False
    assert ValidationStatus(tmp_path).get(7) == "lost"
    assert not events(tmp_path)


def test_a_child_that_fails_gives_its_reason(tmp_path: Path):
    reason = run_child(tmp_path / "checkpoints/step_00000007", tmp_path, 100.0, gpu=False)
    assert reason.startswith("exit code 1: RecipeError: no recipe at")


def test_the_supervisor_returns_even_if_nothing_can_be_written(tmp_path: Path):
    (tmp_path / "samples").write_text("a file where a folder should be")
    checkpoint = SimpleNamespace(path=str(tmp_path / "checkpoints/step_00000007"))
    assert supervise(checkpoint, run=str(tmp_path), timeout_s=1.0, gpu=False)["validated"] is False


def test_a_validation_is_requested_only_if_none_is_outstanding(tmp_path: Path, recipe_of):
    recipe = recipe_of(tmp_path, tmp_path, train__steps=20, validation__every=4, validation__prompts=["a"])
    outstanding = ValidationStatus(tmp_path)
    assert not request_validation(recipe, tmp_path, 2)
    assert request_validation(recipe, tmp_path, 4)
    assert not request_validation(recipe, tmp_path, 8)
    assert events(tmp_path) == [("validation_dropped", 8, "the one of step 4 is still running")]
    outstanding.set(4, "done")
    assert not request_validation(recipe, tmp_path, 4)  # a resumed run does not sample again
    assert request_validation(recipe, tmp_path, 12)
    assert request_validation(recipe, tmp_path, 20)  # the last is always asked for
    outstanding.set(12, "lost")
    outstanding.set(20, "failed")
    assert outstanding.outstanding_steps() == []


def test_a_validation_without_news_for_long_counts_as_lost(tmp_path: Path):
    outstanding = ValidationStatus(tmp_path)
    outstanding.set(4, "running")
    note = tmp_path / "samples/step_00000004/result.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"time": time.time() - 100}))
    assert outstanding.outstanding_steps(older_than_s=200.0) == [4]
    assert outstanding.outstanding_steps(older_than_s=50.0) == []


def test_each_new_line_is_read_once_even_after_a_truncation(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "step_s": 0.1})
    tail = Tail(lines.path)
    assert tail.new_records() == []
    for step in (2, 3, 4):
        lines.write({"step": step, "step_s": 0.1})
    assert [record["step"] for record in tail.new_records()] == [2, 3, 4]
    lines.truncate(2)
    for step in (3, 4, 5):
        lines.write({"step": step, "step_s": 0.2})
    assert [record["step"] for record in tail.new_records()] == [3, 4, 5]
    with lines.path.open("ab") as file:
        file.write(b'{"step": 6')
    assert tail.new_records() == []
    with lines.path.open("ab") as file:
        file.write(b"}\n")
    assert tail.new_records() == [{"step": 6}]
