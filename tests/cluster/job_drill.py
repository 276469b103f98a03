"""A head node and jobs submitted to it, by the commands of cluster/README.md, in a world of its own (world.py).

What must be so is asserted on the way. Prints a line per finding.
"""

import json
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from sora_train.quickstart.shapes import make_clips
from sora_train.train.checkpoint import complete_checkpoints
from tests.cluster.world import ADDRESS, ROOT

API = "http://127.0.0.1:8265"


def main(folder: Path) -> None:
    checkout, shared = folder / "checkout", folder / "shared"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    make_clips(shared / "clips", 32)

    sh("(umask 077; ray get-auth-token --generate > /dev/null)", checkout)
    token = Path.home() / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    os.environ["RAY_AUTH_MODE"] = "token"
    sh(f"RAY_JOB_STOP_WAIT_TIME_S=300 ray start --head --num-cpus 3 --node-ip-address {ADDRESS} "
       "--disable-usage-stats", checkout)  # fmt: skip
    os.environ["RAY_API_SERVER_ADDRESS"] = API

    # The dashboard is on loopback, and tells nobody without the token more than that it is well.
    assert answer(f"http://{ADDRESS}:8265/api/gcs_healthz") == "refused"
    assert answer(f"{API}/api/gcs_healthz") == "200 success"
    assert answer(f"http://{ADDRESS}:52365/api/local_raylet_healthz") == "200 success"
    assert answer(f"{API}/api/jobs/").startswith("401")
    with_other = {**os.environ, "RAY_AUTH_TOKEN": "another"}
    refused = subprocess.run(["ray", "job", "list"], env=with_other, capture_output=True, text=True)
    assert refused.returncode
    assert "AuthenticationError" in refused.stderr + refused.stdout
    assert token.read_text() not in refused.stderr + refused.stdout
    print("loopback and token: hold")

    flags = f"jobs/quickstart.yaml --data.captions {shared}/clips/captions.csv --data.output {shared}/shards"
    small = "--data.frames 4 --model.width 32 --model.depth 2 --model.heads 2 --model.sample_size 8"
    sh(f"ray job submit --working-dir . -- sora prep {flags} {small}", checkout)

    run = shared / "runs" / "stopped"
    train = (
        f"sora train {flags} {small} --name stopped --train.output {shared}/runs --train.steps 60 --train.log_every 1 "
        "--train.checkpoint_every 1000 --validation.every 0 --train.batch_size 4 --train.micro_batch_size 2"
    )
    slow = """--runtime-env-json '{"env_vars": {"SORA_STEP_DELAY_S": "0.3"}}'"""
    sh(f"ray job submit --no-wait --submission-id first --working-dir . {slow} -- {train}", checkout)
    wait_for("step 8", lambda: step(run) >= 8, lambda: sh("ray job logs first", checkout))
    began = time.monotonic()
    sh("ray job stop first", checkout)
    seconds = time.monotonic() - began
    assert "STOPPED" in sh("ray job status first", checkout).upper()
    logs = sh("ray job logs first", checkout)
    assert "SIGTERM: saving a checkpoint" in logs, logs
    assert "perhaps before" not in logs
    assert "Traceback" not in logs, logs
    assert "tracking failed" not in logs, logs  # wandb's process is told to end as well
    ((at, _),) = complete_checkpoints(run / "checkpoints")
    assert at == step(run) >= 8
    print(f"stopped at step {at} with a checkpoint, in {seconds:.0f} s")

    said = sh(f"ray job submit --submission-id second --working-dir . -- {train}", checkout)
    assert "succeeded" in said, said
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in told if event["event"] == "resume"] == [at]
    assert step(run) == 60
    print("the same command went on from there, to the end")

    # A job may bring the seconds along; with Ray's own 3 the run says that they may be too few.
    short = """--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "3"}}'"""
    said = sh(f"ray job submit --working-dir . {short} -- {train.replace('.steps 60', '.steps 61')}", checkout)
    assert "`ray job stop` kills this run after 3 s, perhaps before it has saved" in said, said
    print("three seconds are warned of")


def sh(command: str, cwd: Path) -> str:
    """Runs a line of shell; returns all that it said, AssertionError where it failed."""
    done = subprocess.run(["bash", "-c", command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def answer(url: str) -> str:
    """Status and text of a web page, fetched without a token; `refused` where nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return f"{page.status} {page.read(100).decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(100).decode()}"
    except urllib.error.URLError as error:
        return "refused" if isinstance(error.reason, ConnectionRefusedError) else repr(error.reason)


def step(run: Path) -> int:
    """The last step of a run that is written down."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(what: str, is_so: Callable[[], bool], logs: Callable[[], str], timeout_s: float = 180) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, f"no {what}:\n{logs()[-3000:]}"
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
