"""cluster/slurm.sbatch as Slurm would run it on one node, in a world of its own (world.py), with a Ray of its own.

Slurm itself is not here. In its place stand two commands of a few lines: `srun`, which runs what it is given on this
one node, and `scontrol`, which writes down that a job was put back into the queue. Prints a line per finding.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sora_train.quickstart.shapes import make_clips
from sora_train.train.checkpoint import complete_checkpoints
from tests.cluster.job_drill import step, wait_for
from tests.cluster.world import ROOT

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$ASKED_OF_SLURM"
"""


def main(folder: Path) -> None:
    checkout, shared, commands, asked = (folder / name for name in ("checkout", "shared", "commands", "asked"))
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    (checkout / ".venv").symlink_to(sys.prefix)
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    make_clips(shared / "clips", 32)
    os.environ |= {
        "ASKED_OF_SLURM": str(asked),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    small = ["--data.captions", f"{shared}/clips/captions.csv", "--data.output", f"{shared}/shards",
             "--data.frames", "4", "--model.width", "32", "--model.depth", "2", "--model.heads", "2",
             "--model.sample_size", "8"]  # fmt: skip
    train = [*small, "--name", "queued", "--train.output", f"{shared}/runs", "--train.log_every", "1",
             "--train.steps", "40", "--train.checkpoint_every", "1000", "--validation.every", "0",
             "--train.batch_size", "4", "--train.micro_batch_size", "2", "--cluster.workers", "1"]  # fmt: skip
    run = shared / "runs" / "queued"

    assert ended(sbatch(folder, "prep", small, SORA_VERB="prep"), folder) == 0
    print("prep ended well")

    process = sbatch(folder, "first", train, SORA_STEP_DELAY_S="0.3")
    wait_for("step 8", lambda: step(run) >= 8, lambda: said(folder, "first"))
    state = Path.home() / ".sora_train/slurm-41"
    assert oct(state.stat().st_mode)[-3:] == "700"
    assert oct((state / "token").stat().st_mode)[-3:] == "600"
    token = (state / "token").read_text()
    assert token not in subprocess.run(["ps", "auxww"], capture_output=True, text=True).stdout
    process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM@300 has it
    assert ended(process, folder) == 75, said(folder, "first")
    ((at, _),) = complete_checkpoints(run / "checkpoints")
    assert at == step(run) >= 8
    assert asked.read_text() == "requeue 41\n"
    print(f"SIGTERM: a checkpoint at step {at}, exit status 75, back into the queue")

    assert ended(sbatch(folder, "again", train), folder) == 0, said(folder, "again")
    assert step(run) == 40
    assert asked.read_text() == "requeue 41\n"
    print("taken from the queue again it went on to the end")

    assert ended(sbatch(folder, "wrong", ["--train.stepz", "3"]), folder) == 2, said(folder, "wrong")
    assert asked.read_text() == "requeue 41\n"
    print("a mistake of one's own is not tried again")

    assert not state.exists()
    print("no token is left")


def sbatch(folder: Path, name: str, flags: list[str], **environment: str) -> subprocess.Popen:
    """The script, started as Slurm does; what it says goes into `NAME.log`."""
    command = ["bash", str(folder / "checkout/cluster/slurm.sbatch"), "jobs/quickstart.yaml", *flags]
    with (folder / f"{name}.log").open("w") as log:
        started = {**os.environ, **environment}
        return subprocess.Popen(command, env=started, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def ended(process: subprocess.Popen, folder: Path) -> int:
    began = time.monotonic()
    while process.poll() is None:
        assert time.monotonic() - began < 400, "".join(log.read_text() for log in folder.glob("*.log"))
        time.sleep(0.2)
    return process.returncode


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
