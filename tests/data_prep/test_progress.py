"""Progress: lines in a log, a bar on a terminal, and Ray's metrics."""

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

import pyarrow as pa
import pytest

from data_prep.progress import Progress
from data_prep.schemas import FACTS


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_start_up_has_its_own_line():
    clock = Clock()
    progress = Progress(10, clock=clock)
    clock.now += 65
    assert progress.line() == "prep: starting Ray and loading the VAE and the text encoder, 65 s so far"


def test_rate_and_time_left_are_shown_once_known():
    clock = Clock()
    progress = Progress(66, clock=clock)
    clock.now += 65
    progress.add(30, 30, 0, 0)
    progress.add(6, 5, 1, 0)
    clock.now += 0.01
    assert progress.line() == "prep: 36 of 66 sources (54 %), 36 clips, 1 bad, 0 filtered"
    clock.now += 9.99
    progress.add(10, 10, 0, 0)
    assert progress.line() == "prep: 46 of 66 sources (69 %), 46 clips, 1.6 clips/s, 1 bad, 0 filtered, 12 s left"


def facts(clip_bytes: int, **seconds: float) -> pa.Table:
    work = [{"stage": name, "worker": worker, "seconds": s}
            for key, s in seconds.items() for name, worker in [key.split("_")]]  # fmt: skip
    rows = [{"bytes": clip_bytes, "work": work}, {"bytes": None, "work": None}]
    return pa.Table.from_pylist(rows, pa.schema([FACTS.field("bytes"), FACTS.field("work")]))


def test_a_standstill_and_the_last_shards_are_named():
    clock = Clock()
    progress = Progress(20, clock=clock)
    progress.add(8, 8, 0, 0)
    clock.now += 10
    progress.add(8, 8, 0, 0)
    clock.now += 30
    assert progress.line().endswith("20 s left")
    clock.now += 1
    assert progress.line().endswith("; no clip for 31 s")
    progress.add(4, 3, 1, 0)
    assert progress.line() == (
        "prep: 20 of 20 sources (100 %), 20 clips, 1 bad, 0 filtered; the last shards are being written"
    )


def test_the_busiest_stage_and_the_bytes_are_shown():
    clock = Clock()
    progress = Progress(100, clock=clock)
    for second in range(21):  # two VAEs that always work, a decoder that works half of the time
        clock.now += 1
        progress.add(1, 1, 0, 0, None, facts(10**8, VAE_a=1.0, VAE_b=1.0, decode_c=0.5), 0.1)
        if second == 5:
            assert progress.limit() == ""
    busy = progress.busy()
    assert busy == pytest.approx({"VAE": 1.0, "decode": 0.5, "sink": 0.1})
    assert progress.line().endswith("left; 100 MB/s; the VAE limits the speed, 100 % busy")
    clock.now += 60
    progress.add(1, 1, 0, 0, None, facts(0, VAE_a=1.0), 0.1)
    assert "is the busiest stage" in progress.limit()


def test_rates_are_of_the_last_minute_and_fall_in_a_pause():
    clock = Clock()
    progress = Progress(10_000, clock=clock)
    for second in range(400):  # 10 sources of 2 clips a second, then one
        clock.now += 1
        progress.add(1 if second >= 200 else 10, 2 if second >= 200 else 20, 0, 0)
    sources, clips = progress.rates() or (0.0, 0.0)
    assert (sources, clips) == pytest.approx((1.0, 2.0))
    assert progress.line().endswith(", 7800 s left")
    clock.now += 61
    assert (progress.rates() or (0.0, 0.0))[0] == pytest.approx(0.5)


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
def ray_metrics(local_ray: None) -> str:
    """The address of a local Ray's own metrics."""
    import ray

    (node,) = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@pytest.mark.ray
def test_prep_counts_are_in_rays_metrics(ray_metrics: str):
    clock = Clock()
    with Progress(4, every_s=0.2, run="clips", clock=clock) as progress:
        progress.add(1, 5, 1, 2, Counter(unreadable=1, too_short=2))
        clock.now += 20
        progress.add(1, 0, 0, 1, Counter(unreadable=1, too_short=3))
        until, found = time.monotonic() + 60, dict[str, float]()
        while len(found) < 7 and time.monotonic() < until:
            time.sleep(0.5)
            text = urllib.request.urlopen(ray_metrics, timeout=10).read().decode()
            ours = [line for line in text.splitlines() if line.startswith("ray_sora_prep") and 'run="clips"' in line]
            tags = (re.findall(r'(?:outcome|reason)="(\w+)"', line) or [line.split("{")[0]] for line in ours)
            found = {tag: float(line.split()[-1]) for (tag,), line in zip(tags, ours, strict=True)}
    assert found.pop("ray_sora_prep_clips_per_s") > 0
    assert found == {"written": 5, "quarantined": 1, "filtered": 3, "unreadable": 1, "too_short": 3,
                     "ray_sora_prep_share_done": 0.5}  # fmt: skip
