"""cluster/README.md, "Machines that you log in to", typed as it stands on three machines (nodes.py), from a clean
checkout.

What a reader fills in is filled in: the first node's name, the shared folder, the number of workers, and flags that
make the recipe small. What must be so is asserted on the way. Prints a line per finding.
"""

import json
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

from sora_train.quickstart.shapes import make_clips
from sora_train.train.checkpoint import complete_checkpoints
from tests.cluster.job_drill import wait_for
from tests.cluster.nodes import DISK, SHARED, Node, boot, prepare
from tests.cluster.world import ROOT

SECTION = "## Machines that you log in to"
WORKERS = 4
PREP = "--codec.vae builtin"
TRAIN = (
    f"{PREP} --train.steps 50 --train.log_every 1 --train.log_samples true --train.checkpoint_every 25 "
    "--train.keep_checkpoints 2 --validation.every 25"
)


def main(folder: Path) -> None:
    prepare(folder)
    make_clips(folder / "shared", 40)
    first, *others = (boot(number, folder) for number in (1, 2, 3))
    checkout = first.home / "sora_train"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    typed = blocks((checkout / "cluster/README.md").read_text())
    began = time.monotonic()
    submit = join(typed, first, others, checkout)
    status = f"{submit['settings']}; {submit['status']}"  # it tells of a node some seconds after it came
    shown_now = lambda: first.run(status, checkout)  # noqa: E731
    wait_for("three nodes", lambda: shown_now().count(" 1 node_") == 3, shown_now)
    print(f"three nodes with a token in {time.monotonic() - began:.0f} s")

    settings = submit["settings"]
    for verb, flags in (("prep", PREP), ("preflight", TRAIN), ("train", TRAIN)):
        began = time.monotonic()
        said = first.run(f"{settings}; {submit[verb]} {flags}", checkout)
        assert "succeeded" in said, said
        assert "Traceback" not in said, said
        print(f"sora {verb} by `ray job submit`: succeeded in {time.monotonic() - began:.0f} s")
        if verb == "preflight":
            print("\n".join(line for line in said.splitlines() if line.startswith("passed")))

    listed = first.run(f"{settings}; ray job list", checkout)
    assert len(re.findall(r"JobStatus.SUCCEEDED|'SUCCEEDED'", listed)) >= 3, listed
    assert "FAILED" not in listed, listed
    run = folder / "shared/runs/real_clips"
    shown = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown if "validation" not in line] == list(range(1, 51))
    assert sorted(line["step"] for line in shown if "validation" in line) == [25, 50]
    for step in (25, 50):
        held = sorted(path.name for path in (run / f"samples/step_{step:08d}").glob("*.mp4"))
        assert len(held) == 2, held
    assert complete_checkpoints(run / "checkpoints")[-1][0] == 50
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "start" and f"{WORKERS} workers" in event["reason"] for event in told), told
    assert not [event for event in told if event["event"] in ("worker_lost", "failed", "validation_failed")], told
    assert (run / "report.html").is_file()
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    print("50 steps, two validations with samples, report, checkpoint, an offline run of wandb")
    spread = hosts_of_workers(first, others)
    assert len(spread) > 1, spread
    print(f"training workers were on {', '.join(spread)}")


def blocks(page: str) -> dict[str, list[str]]:
    """The commands of the section, by the comment above them."""
    section = page.split(SECTION)[1].split("\n## ")[0].replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^    (.*)$", section, flags=re.MULTILINE):
        if line.startswith("# "):
            found[line] = commands = []
        elif line.strip():
            commands.append(line.split("  # ")[0].strip())  # type: ignore[reportPossiblyUnboundVariable]
    return found


def join(typed: dict[str, list[str]], first: Node, others: list[Node], checkout: Path) -> dict[str, str]:
    """Types the page's first three blocks on the nodes; returns the commands of the fourth by what they do."""
    once, on_first, on_others, submitting = typed.values()
    first.run("; ".join(once), checkout)
    token = first.home / ".ray/auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    first.run("; ".join(on_first), checkout)
    for node in others:
        # "in ~/.ray/auth_token: bring it to the other nodes"
        node.run(f"mkdir -m 700 -p ~/.ray && install -m 600 {token} ~/.ray/auth_token", SHARED)
        node.run("; ".join(on_others).replace("FIRST_NODE", first.name), SHARED)
    given = [line.replace("FIRST_NODE", first.name).replace("/shared/", f"{SHARED}/") for line in submitting]
    settings, status, prep, train = given
    train = re.sub(r"--cluster.workers \d+", f"--cluster.workers {WORKERS}", train)
    preflight = train.replace("sora train", "sora preflight")
    return {"settings": settings, "status": status, "prep": prep, "train": train, "preflight": preflight}


def hosts_of_workers(first: Node, others: list[Node]) -> list[str]:
    """Names of the nodes that had a training worker, by what Ray's logs there are called."""
    found = []
    for node in (first, *others):
        logs = node.at(DISK / "ray").glob("session_2*/logs/worker-*.out")
        found += [node.name] if any(b"RayTrainWorker" in log.read_bytes() for log in logs) else []
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
