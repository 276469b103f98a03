"""A world of its own for what takes the whole machine: process numbers, ports and addresses that nobody else sees.

`unshare` (util-linux) makes it. Everything that was started inside ends with it; `ray stop` in there, which ends every
Ray of a machine, finds only its own.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTO = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--pid", "--fork", "--mount-proc", "--net"]
INTO += ["--kill-child=SIGKILL"]
ADDRESS = "10.9.0.1"
"""An address of the machine that is not loopback."""


@functools.cache
def lacking() -> str:
    """Why there is no such world here, or an empty string."""
    try:
        done = subprocess.run([*INTO, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, timeout=30)
    except OSError as error:
        return f"no `unshare` here: {error}"
    return f"`unshare` and `ip` can't make one: {done.stderr.strip()}" if done.returncode else ""


def run_inside(module: str, folder: Path, timeout_s: float) -> str:
    """Runs `python -m MODULE FOLDER` in a world of its own and returns what it printed; AssertionError if it failed."""
    # The shell stays, as number 1, since somebody must see to orphans that end: Ray waits for each process of a job.
    network = f"ip link set lo up && ip addr add {ADDRESS}/32 dev lo && {sys.executable} -m {module} {folder}; exit $?"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home = folder / "home"
    home.mkdir()
    environment |= {
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
    }
    done = subprocess.run(
        [*INTO, "sh", "-c", network], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout
