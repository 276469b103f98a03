"""wandb's own files, read back: every key at every step once, whatever happened to the run."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sora_train.train.tracking import Tracker, offline_records, offline_rows
from sora_train.video import contact_sheet, write_mp4


def tracker_of(run: Path) -> Tracker:
    return Tracker(run, mode="offline", project="p", config={"a": 1}, failed=pytest.fail)


def steps(first: int, last: int) -> list[dict]:
    return [{"step": step, "loss": 1 / step, "mfu": None} for step in range(first, last + 1)]


def validation(run: Path, step: int) -> dict:
    """What a validation leaves: two videos, a sheet, a list of them, and its line."""
    folder = run / f"samples/step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    videos = [np.full((4, 32, 32, 3), 10 * step + i, np.uint8) for i in range(2)]
    for i, video in enumerate(videos):
        write_mp4(folder / f"{i:03d}-clip.mp4", video, 8)
    contact_sheet(videos, ["a", "b"]).save(folder / "sheet.png")
    listing = [{"file": f"{i:03d}-clip.mp4", "prompt": f"clip {i}"} for i in range(2)]
    (folder / "samples.json").write_text(json.dumps({"samples": listing}))
    return {"step": step, "validation": True, "holdout_loss": 0.5 / step}


def held(run: Path) -> dict[str, dict[int, int]]:
    """How often wandb has each key at each train_step."""
    count: dict[str, Counter] = {}
    for row in offline_rows(run):
        for key in {key.split(".")[0] for key in row if "/" in key}:
            count.setdefault(key, Counter())[row["train_step"]] += 1
    return {key: dict(sorted(found.items())) for key, found in count.items()}


def test_wandb_has_every_key_and_video_once_also_after_resumes(tmp_path: Path):
    """The first is killed at step 7, which takes rows with it; the second goes on from there, another comes to its end,
    and the last has nothing to tell.
    """
    script = (
        "import json, os, sys; from pathlib import Path; from sora_train.train.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), mode='offline', project='p', config={}, failed=print)\n"
        "for record in json.loads(sys.argv[2]): tracker.log([record])\n"
        "os.kill(os.getpid(), 9)"
    )
    records = [*steps(1, 6), validation(tmp_path, 4), *steps(7, 7)]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), json.dumps(records)], timeout=120)
    assert killed.returncode == -9
    validations = [validation(tmp_path, 4), validation(tmp_path, 8)]
    last = [*steps(1, 11), {"bucket": "4x16x16"} | steps(12, 12)[0]]
    for rest in (steps(1, 9), [*last, *validations], [*last, *validations]):
        tracker = tracker_of(tmp_path)
        tracker.log(rest)
        tracker.finish()
    every, validated = dict.fromkeys(range(1, 13), 1), {4: 1, 8: 1}
    assert held(tmp_path) == {
        "train/loss": every,
        "train/bucket": {12: 1},
        "validation/holdout_loss": validated,
        "validation/done": validated,
        "samples/000-clip": validated,
        "samples/001-clip": validated,
        "samples/sheet": validated,
    }
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 4
    assert len({path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")}) == 1  # run-ID.wandb
    for row in offline_rows(tmp_path):
        for key, value in row.items():
            if key.startswith("samples/") and key.endswith("path"):
                assert any((folder / "files" / value).is_file() for folder in folders), value


def alerts(run: Path) -> list[tuple[str, str, str]]:
    """Title, level and text of every alert in wandb's files, in order of time."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in offline_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "alert":
                found.append((record.alert.title, record.alert.level, record.alert.text))
    return found


def test_what_goes_wrong_is_an_alert_once_also_over_resumes(tmp_path: Path):
    run = tmp_path / "first"
    run.mkdir()
    happened = [
        {"event": "start", "step": 0, "reason": "from scratch"},
        {"event": "worker_lost", "step": 7, "reason": "rank 1: ActorDiedError"},
        {"event": "checkpoint", "step": 8, "reason": "somewhere"},
        {"event": "rollback", "step": 9, "reason": "3 bad steps in a row"},
        {"event": "failed", "step": 9, "reason": "a full disk\n" + 2000 * "x"},
    ]
    for known in (2, 4, 4, 5):  # of the third driver nothing was heard but what was told before
        tracker = tracker_of(run)
        tracker.alert(happened[: known - 1])
        tracker.alert(happened[:known])
        tracker.finish()
    told = alerts(run)
    assert [(title, level) for title, level, _ in told] == [
        ("first: worker lost", "WARN"),
        ("first: rollback", "ERROR"),
        ("first: failed", "ERROR"),
    ]
    assert told[0][2] == "step 7: rank 1: ActorDiedError"
    assert len(told[2][2]) == 1000


def test_node_metrics_go_with_the_last_record_new_to_wandb(tmp_path: Path):
    for rest in (steps(1, 3), steps(1, 3), steps(1, 5)):
        tracker = tracker_of(tmp_path)
        tracker.log(rest, {"node/host/cpu": 50.0})
        tracker.finish()
    assert held(tmp_path) == {"train/loss": dict.fromkeys(range(1, 6), 1), "node/host/cpu": {3: 1, 5: 1}}


def test_what_a_kill_kept_from_wandb_is_told_after_the_resume(tmp_path: Path):
    tracker = tracker_of(tmp_path)
    tracker.log(steps(1, 3))
    tracker.finish()
    tracker = tracker_of(tmp_path)
    tracker.log(steps(1, 5))  # what metrics.jsonl holds, of which nobody told wandb steps 4 and 5
    tracker.finish()
    assert held(tmp_path) == {"train/loss": dict.fromkeys(range(1, 6), 1)}


def test_a_video_that_is_gone_costs_wandb_nothing_else(tmp_path: Path):
    line = validation(tmp_path, 2)
    (tmp_path / "samples/step_00000002/001-clip.mp4").unlink()
    tracker = tracker_of(tmp_path)
    tracker.log([line])
    tracker.finish()
    assert held(tmp_path).keys() == {"validation/holdout_loss", "validation/done", "samples/000-clip", "samples/sheet"}


def test_a_tracker_that_fails_says_so_once_and_never_raises(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "wandb.json").write_text("no json")
    tracker = Tracker(tmp_path, mode="offline", project="p", config={}, failed=said.append)
    tracker.log(steps(1, 1))
    tracker.finish()
    assert len(said) == 1
    assert "training goes on" in said[0]


def test_tracking_that_is_off_does_nothing(tmp_path: Path):
    tracker = Tracker(tmp_path, mode="off", project="p", config={}, failed=pytest.fail)
    tracker.log(steps(1, 1))
    tracker.finish()
    assert not list(tmp_path.iterdir())
