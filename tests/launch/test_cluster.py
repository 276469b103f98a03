"""Which cluster a process belongs to, found out without starting one."""

import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.launch.cluster import running_cluster


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
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        notes.write_text(address + "\n")
        assert running_cluster() == address


@pytest.mark.ray
def test_all_processes_of_a_ray_started_here_know_its_address():
    """In a process of its own: this one may be connected to another."""
    program = """
import os, ray
from sora_train.launch.cluster import connect
with connect("local", dashboard=False):
    print(ray.get_runtime_context().gcs_address, ray.get(ray.remote(os.getenv).remote("RAY_ADDRESS")))
print(os.getenv("RAY_ADDRESS"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here, told, after = done.stdout.split()
    assert here == told
    assert after == "None"
