"""Which cluster a process joins, and what a local Ray needs."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.ray_cluster import connection
from sora_train.ray_cluster.connection import connect, explain_wait, running_cluster, wait_until_reachable
from sora_train.ray_cluster.local_ray import free_port, short_temp_dir


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` would note its address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_the_jobs_own_cluster_comes_first(notes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert running_cluster() == "10.0.0.1:6379"


def test_a_cluster_that_is_gone_is_not_joined(notes: Path):
    assert running_cluster() is None
    notes.write_text("127.0.0.1:1")  # nothing listens there
    assert running_cluster() is None
    notes.write_text("nonsense")
    assert running_cluster() is None


def test_a_cluster_that_answers_is_joined(notes: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        notes.write_text(address + "\n")
        assert running_cluster() == address


def test_a_cluster_that_is_gone_is_an_error_with_the_way_out(notes: Path, one_ray, monkeypatch: pytest.MonkeyPatch):
    one_ray.stop()  # a process that is connected stays with its cluster
    monkeypatch.setattr(connection, "WAIT_S", 1.0)
    gone = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", gone)
    with pytest.raises(UserError, match=rf"^no Ray at {gone} \(RAY_ADDRESS\): .*refused.* unset RAY_ADDRESS or give"):
        connect().__enter__()
    with pytest.raises(UserError, match=rf"^no Ray at {gone} \(cluster.address\): .*give --cluster.address local"):
        connect(gone).__enter__()
    with pytest.raises(UserError, match="no Ray at ray://"):
        connect(f"ray://{gone}").__enter__()


def test_a_cluster_that_starts_a_little_later_is_waited_for(capsys: pytest.CaptureFixture[str]):
    port = free_port()

    def open_later() -> None:
        time.sleep(1.5)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()[0].close()

    thread = threading.Thread(target=open_later)
    thread.start()
    wait_until_reachable(f"127.0.0.1:{port}", "RAY_ADDRESS")
    thread.join()
    assert "waiting up to 30 s" in capsys.readouterr().out


def test_a_long_wait_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(connection, "WAIT_S", 0.2)
    with explain_wait("something is not there"):
        time.sleep(1)
    with explain_wait("never said"):
        pass
    assert capsys.readouterr().out.startswith("something is not there (0 s so far")


def test_a_port_is_none_that_the_system_gives_away():
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < first_given for _ in range(5))


def test_a_folder_too_long_for_sockets_is_replaced_or_refused(monkeypatch: pytest.MonkeyPatch):
    long = "/" + "x" * 60
    monkeypatch.setenv("TMPDIR", long)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with short_temp_dir():
        assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert "RAY_TMPDIR" not in os.environ
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(UserError, match="RAY_TMPDIR /xxx.* Set RAY_TMPDIR to a short folder"):
        short_temp_dir().__enter__()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_starts_without_a_home_and_next_to_a_random_py(tmp_path: Path):
    """With a temporary folder too long for its sockets too. No worker has the working folder on its path, all know the
    cluster's address, and none is ended by a hangup of the terminal. In a process of its own: this one may be connected
    to another Ray."""
    (tmp_path / "random.py").write_text("raise ImportError('of the working folder')")
    (tmp_path / "cv2.py").write_text("raise ImportError('of the working folder')")
    (long := tmp_path / ("x" * 80)).mkdir()
    program = """
import os, signal, sys
import ray
from sora_train.ray_cluster.connection import connect
def inside():
    import cv2, random
    blocked = int(next(l for l in open("/proc/self/status") if l.startswith("SigBlk")).split()[1], 16)
    deaf = bool(blocked & 1 << (signal.SIGHUP - 1))
    return sys.path, os.getenv("RAY_ADDRESS"), deaf, cv2.__file__, random.__file__
with connect("local"):
    paths, told, deaf, *files = ray.get(ray.remote(inside).remote())
    assert told == ray.get_runtime_context().gcs_address
assert "RAY_ADDRESS" not in os.environ
here = os.getcwd()
assert here not in paths and not any(file.startswith(here) for file in files), (paths, files)
assert deaf
"""
    environment = {**os.environ, "TMPDIR": str(long), "HOME": "/proc"}
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too long for Ray's sockets" in done.stdout


@pytest.mark.ray
def test_sigterm_ends_a_command_without_rays_stack():
    code = """
import os, signal, sys
from sora_train import cli
from sora_train.ray_cluster.connection import connect

def run(verb, words):
    with connect("local"):
        os.kill(os.getpid(), signal.SIGTERM)

cli.run = run
sys.argv = ["sora", "prep"]
cli.command()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr == "sora prep: stopped by SIGTERM. The same command continues from what is done\n"
