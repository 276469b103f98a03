"""Locks against other processes, killed ones, and those of other machines."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sora_train import locks
from sora_train.errors import UserError
from sora_train.locks import OWNER_FILE, file_lock, run_lock
from sora_train.train.metrics import JsonLines

HOLD = (
    "import sys, time; from sora_train import locks\n"
    "locks.HEARTBEAT_S = 0.1\n"
    "with locks.run_lock(sys.argv[1], 'sora train'):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def of_another_machine(beat: int = 0) -> str:
    owner = {"command": "sora train", "process": 77, "host": "node-9", "machine": "another", "token": "t"}
    return json.dumps({**owner, "started": "1", "beat": f"{beat:012d}"})


def test_no_line_of_several_writers_is_lost_nor_cut_off(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from sora_train.train.metrics import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]))\n"
        "for i in range(40): lines.write({'step': i, 'who': sys.argv[2], 'long': 'x' * 9000})"
    )
    path = tmp_path / "metrics.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), str(i)]) for i in range(3)]
    while any(writer.poll() is None for writer in writers):
        JsonLines(path).truncate(1000)  # takes nothing out, and must not take out what is written meanwhile
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    found = sorted((line["who"], line["step"]) for line in JsonLines(path).read())
    assert found == [(str(who), step) for who in range(3) for step in range(40)]


def test_a_lock_that_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "ABANDONED_S", 0.2)
    (tmp_path / ".file.lock").write_text("of a dead process")
    with file_lock(tmp_path / "file"):
        assert (tmp_path / ".file.lock").exists()
    assert not list(tmp_path.iterdir())


def test_the_owner_of_a_folder_is_named_with_its_host(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"process {process.pid} on {os.uname().nodename}\)\. .*or give"):
            run_lock(str(tmp_path), "sora train").__enter__()
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_of_this_machine_holds_nobody_up(tmp_path: Path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / OWNER_FILE).exists()
    began = time.monotonic()
    with run_lock(str(tmp_path), "sora train"):
        assert time.monotonic() - began < locks.STALE_S / 2
    assert not list(tmp_path.iterdir())


def test_a_silent_owner_of_another_machine_loses_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    (tmp_path / OWNER_FILE).write_text(of_another_machine())
    with run_lock(str(tmp_path), "sora train"):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["process"] == os.getpid()
    assert "process 77 on node-9), or was killed. Waiting 2 s" in capsys.readouterr().out


def test_a_living_owner_of_another_machine_keeps_its_folder(tmp_path: Path):
    (tmp_path / OWNER_FILE).write_text(of_another_machine())
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.5):
            count += 1
            (tmp_path / OWNER_FILE).write_text(of_another_machine(count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 77 on node-9"):
            run_lock(str(tmp_path), "sora train").__enter__()
    finally:
        ended.set()
        thread.join()


def test_an_owner_that_lost_its_folder_ends_itself(tmp_path: Path):
    process = holder(tmp_path)
    (tmp_path / OWNER_FILE).write_text(of_another_machine())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 77 on node-9 took over" in said
    assert json.loads((tmp_path / OWNER_FILE).read_text())["host"] == "node-9"
