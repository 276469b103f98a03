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
from collections import Counter
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

    interval = {"metrics_report_interval_ms": 1000}
    ray.init(address="local", num_cpus=1, include_dashboard=False, _system_config=interval)
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


@pytest.mark.ray
def test_what_prep_did_is_in_rays_metrics(ray_metrics: str):
    with Progress(4, every_s=0.2, run="clips") as progress:
        progress.add(2, 5, 1, 2, Counter(unreadable=1, too_short=2))
        until, found = time.monotonic() + 60, dict[str, float]()
        while len(found) < 7 and time.monotonic() < until:
            time.sleep(0.5)
            text = urllib.request.urlopen(ray_metrics, timeout=10).read().decode()
            ours = [line for line in text.splitlines() if line.startswith("ray_sora_prep")]
            assert all('run="clips"' in line for line in ours)
            tags = (re.findall(r'(?:outcome|reason)="(\w+)"', line) or [line.split("{")[0]] for line in ours)
            found = {tag: float(line.split()[-1]) for (tag,), line in zip(tags, ours, strict=True)}
    assert found.pop("ray_sora_prep_clips_per_s") > 0
    assert found == {"written": 5, "quarantined": 1, "filtered": 2, "unreadable": 1, "too_short": 2,
                     "ray_sora_prep_share_done": 0.5}  # fmt: skip
