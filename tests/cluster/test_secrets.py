"""Secrets of the environment stay there: planted ones are looked for in everything that encoding and training leave."""

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN")


def holds(folder: Path, needles: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Names of the needles that a folder's files hold, packed columns of Parquet unpacked, or that file names do."""
    for path in folder.rglob("*"):
        content = str(path).encode()
        if path.is_file() and not path.is_symlink():
            content += path.read_bytes()
            if path.suffix == ".parquet":
                content += repr(pq.ParquetFile(path).read().to_pylist()).encode()
        yield from ((name, path) for name, needle in needles.items() if needle.encode() in content)


class ProcessList(threading.Thread):
    """Watches the command lines of all processes, and notes which needles were ever in one."""

    def __init__(self, needles: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.needles, self.seen, self.over = needles, set[str](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
            self.seen |= {name for name, needle in self.needles.items() if needle in lines}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_no_secret_leaks_into_runs_logs_or_process_lists(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    from sora_train.quickstart.shapes import make_clips

    planted = {name: secrets.token_hex(20) for name in NAMES}
    marker = {"marker": f"m{secrets.token_hex(8)}"}  # no secret: the run's name, which must be found wherever we look
    make_clips(tmp_path / "clips", 12)
    (tmp_path / "clips/broken.mp4").write_bytes(b"no video")
    with (tmp_path / "clips/captions.csv").open("a") as file:
        file.write("broken.mp4,a broken file\n")
    flags = ["--name", marker["marker"], "--data.captions", tmp_path / "clips/captions.csv",
             "--data.output", tmp_path / "out/shards", "--data.frames", "4", "--model.width", "32",
             "--model.depth", "2", "--model.heads", "2", "--model.sample_size", "8", "--train.output", tmp_path / "out",
             "--train.steps", "4", "--train.batch_size", "4", "--train.micro_batch_size", "2", "--train.log_every", "1",
             "--train.checkpoint_every", "2", "--train.log_samples", "true", "--validation.every", "4",
             "--validation.steps", "2", "--cluster.workers", "1", "--cluster.address", "local"]  # fmt: skip
    short = tmp_path_factory.mktemp("r")  # Ray's sockets lie there
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_", "AWS_"))}
    environment |= {**planted, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(short),
                    "OMP_NUM_THREADS": "1"}  # fmt: skip
    watch = ProcessList(planted | marker)
    watch.start()
    said = ""
    for words in (["prep", "jobs/quickstart.yaml", *flags], ["train", "jobs/quickstart.yaml", *flags],
                  ["report", tmp_path / "out" / marker["marker"]]):  # fmt: skip
        command = [sys.executable, "-m", "sora_train.cli", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said += done.stdout.decode()
        assert done.returncode == 0, said
    watch.over.set()
    watch.join()

    run = tmp_path / "out" / marker["marker"]
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "report.html", "wandb"):
        assert (run / name).exists(), name
    assert not list(holds(tmp_path / "out", planted))
    assert not list(holds(short, planted))
    assert not [name for name, secret in planted.items() if secret in said]
    assert watch.seen == {"marker"}
    # The looking itself works.
    assert list(holds(tmp_path / "out", marker))
    assert list(holds(short, marker))
    assert marker["marker"] in said
