"""Memory does not grow while a thousand real clips are encoded."""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sora_train.manifest import Manifest

CLIPS = 1000


def peaks(driver: psutil.Process) -> dict[int, tuple[str, float]]:
    """Name and peak resident memory in MiB of the driver, the stages' actors and the decoders' processes, by pid."""
    found: dict[int, tuple[str, float]] = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            name = " ".join(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, psutil.Error):
            continue
        kind = next(
            (word for word in ("data_prep.video.decode_process", "MapWorker", "sora_train.cli") if word in name), ""
        )
        if kind:
            found[process.pid] = (name[:60], int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024)
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_no_process_grows_by_a_tenth_after_clip_200(shared: Path, tmp_path: Path):
    with (shared / "data/clips/captions.csv").open(newline="") as file:
        rows = [(row["video_file_name"], row["prompt"]) for row in csv.DictReader(file)]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        many = [(rows[i % len(rows)][0], f"{rows[i % len(rows)][1]} {i}") for i in range(CLIPS + 60)]
        csv.writer(file).writerows([("video_file_name", "prompt"), *many])
    data = {"captions": str(tmp_path / "captions.csv"), "root": str(shared / "data/clips"), "fps": 16, "height": 64,
            "width": 64, "output": str(tmp_path / "shards")}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": data, "cluster": {"address": "local"}}))
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "sora_train.cli", "prep", str(tmp_path / "recipe.yaml")]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    driver, early, late = psutil.Process(process.pid), {}, {}
    while process.poll() is None:
        done = max(map(int, re.findall(r"(\d+) clips,", (tmp_path / "log").read_text())), default=0)
        if done >= 200:
            late |= peaks(driver)  # of a process that has ended already, what it had last
            early = early or dict(late)
        time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert Manifest.load(str(tmp_path / "shards")).counts.written >= CLIPS
    assert len(early) >= 5, early
    for pid, (name, before) in early.items():
        after = late[pid][1]
        print(f"{name}: {before:.0f} MiB at clip 200, {after:.0f} MiB at the end, {after / before - 1:+.1%}")
    assert max(late[pid][1] / before for pid, (_, before) in early.items()) < 1.1
