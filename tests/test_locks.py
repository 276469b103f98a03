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
from sora_train.storage import atomic_write, read_bytes, resolve
from sora_train.train.metrics import JsonLines

HOLD = (
    "import sys, time; from sora_train import locks\n"
    "locks.HEARTBEAT_S, write, (start, delay) = 0.1, locks.atomic_write, map(float, sys.argv[2:])\n"
    "locks.atomic_write = lambda *args: time.sleep(delay) or write(*args)\n"
    "time.sleep(max(0, start - time.time()))\n"
    "with locks.run_lock(sys.argv[1], 'sora train'):\n"
    "    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture(params=["folder", "object store"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder to lock, or a URI."""
    return str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3')}/runs/a"


def start_holder(folder: str, at: float = 0.0, delay: float = 0.0) -> subprocess.Popen:
    """A process that locks the folder at this time and prints `held`. An object store gets its object after a delay."""
    command = [sys.executable, "-c", HOLD, folder, str(at), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holder(folder: str) -> subprocess.Popen:
    process = start_holder(folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def read_owner(folder: str) -> dict | None:
    system, path = resolve(f"{folder}/{OWNER_FILE}")
    content = read_bytes(system, path)
    return None if content is None else json.loads(content)


def write_owner(folder: str, content: str) -> None:
    system, path = resolve(f"{folder}/{OWNER_FILE}")
    atomic_write(system, path, content.encode())


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


def test_the_owner_of_a_folder_is_named_with_its_host(folder: str):
    process = holder(folder)
    try:
        with pytest.raises(UserError, match=rf"process {process.pid} on {os.uname().nodename}\)\. .*or give") as caught:
            run_lock(folder, "sora train").__enter__()
        assert caught.value.code == "locked"
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_of_this_machine_holds_nobody_up(folder: str):
    process = holder(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_owner(folder)
    began = time.monotonic()
    with run_lock(folder, "sora train"):
        assert time.monotonic() - began < locks.STALE_S / 2
    assert read_owner(folder) is None


def test_one_of_several_that_start_together_gets_the_folder(folder: str):
    start = time.time() + 4
    processes = [start_holder(folder, start, delay=0.5) for _ in range(4)]
    try:
        first = [process.stdout.readline() for process in processes if process.stdout]
        assert sorted(first) == ["", "", "", "held\n"]
        owner = processes[first.index("held\n")]
        time.sleep(1)  # some heartbeats
        assert owner.poll() is None
        assert (read_owner(folder) or {})["process"] == owner.pid
        others = [process.communicate()[1] for process in processes if process is not owner]
        assert all(f"process {owner.pid} on" in said for said in others)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_silent_owner_of_another_machine_loses_its_folder(folder: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    write_owner(folder, of_another_machine())
    with run_lock(folder, "sora train"):
        assert (read_owner(folder) or {})["process"] == os.getpid()
    assert "process 77 on node-9), or was killed. Waiting 2 s" in capsys.readouterr().out


def test_a_living_owner_of_another_machine_keeps_its_folder(folder: str):
    write_owner(folder, of_another_machine())
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.5):
            count += 1
            write_owner(folder, of_another_machine(count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 77 on node-9"):
            run_lock(folder, "sora train").__enter__()
    finally:
        ended.set()
        thread.join()


def test_an_owner_that_lost_its_folder_ends_itself(folder: str):
    process = holder(folder)
    write_owner(folder, of_another_machine())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 77 on node-9 took over" in said
    assert (read_owner(folder) or {})["host"] == "node-9"


def test_a_bucket_that_can_not_be_written_is_one_message(s3: str):
    with pytest.raises(UserError, match="s3://no-such-bucket/x/.owner can't be written: .*AWS_ACCESS_KEY_ID"):
        run_lock("s3://no-such-bucket/x", "sora prep").__enter__()
