"""How far the work is: lines in a log, a bar on a terminal, and Ray's metrics."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator

import pytest

from data_prep.progress import Progress


def test_a_line_counts_sources_and_clips_and_leaves_start_up_out_of_the_rate():
    progress = Progress(10)
    assert progress.line() == "prep: 0 of 10 sources (0 %), the first are under way since 0 s"
    progress.started -= 100
    progress.add(1, 3, 0, 1)
    assert "1 of 10 sources (10 %), 4 clips, 0.04 clips/s, 0 bad, 1 filtered, 900 s left" in progress.line()
    assert progress.first is not None
    progress.first = (progress.first[0] - 4, *progress.first[1:])
    progress.add(2, 5, 1, 0)
    assert "3 of 10 sources (30 %), 10 clips, 1.5 clips/s, 1 bad, 1 filtered, 14 s left" in progress.line()


def test_a_terminal_gets_a_bar():
    code = """
from data_prep.progress import Progress
with Progress(4) as progress:
    progress.add(4, 3, 1, 0)
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True, timeout=60)
    os.set_blocking(ours, False)
    text = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert "4/4" in text
    assert "4 clips, 1 bad, 0 filtered" in text


@pytest.fixture
def ray_metrics() -> Iterator[str]:
    """The address of a local Ray's own metrics."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


@pytest.mark.ray
def test_the_counters_are_ray_metrics(ray_metrics: str):
    progress = Progress(4, metrics=True)
    progress.add(2, 5, 1, 2)
    until, found = time.monotonic() + 60, set[str]()
    while len(found) < 4 and time.monotonic() < until:
        time.sleep(1)
        text = urllib.request.urlopen(ray_metrics, timeout=10).read().decode()
        found = {line for line in text.splitlines() if line.startswith("ray_sora_prep")}
    values = {(re.findall(r'outcome="(\w+)"', line) or ["share"])[0]: float(line.split()[-1]) for line in found}
    assert values == {"written": 5, "quarantined": 1, "filtered": 2, "share": 0.5}
