"""Nodes that leave and join during training, on a cluster of three nodes in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sora_train.recipe import Recipe, save_recipe

pytestmark = pytest.mark.ray

PROGRAM = Path(__file__).with_name("elastic.py")
TIMEOUT_S = 600


def elastic(recipe: Recipe, *acts: str) -> Path:
    """Runs `elastic.py`; returns the run's folder."""
    output = Path(recipe.train.output)
    save_recipe(recipe, output / f"{recipe.name}.yaml")
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(output / f"{recipe.name}.yaml"), *acts],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SORA_STEP_DELAY_S": "0.4" if acts else "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = program.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what of the cluster is left, which has the program's group
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, said[-3000:]
    return output / recipe.name


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(run: Path) -> list[tuple[str, str]]:
    """What happened to workers, and how many trained from then on."""
    told = ("start", "worker_lost", "preempted", "resume")
    return [
        (event["event"], event["reason"].partition("; ")[2].partition(" on ")[0] if "; " in event["reason"] else "")
        for event in lines(run / "events.jsonl")
        if event["event"] in told
    ]


def beside_one_alone(recipe: Recipe, *acts: str) -> Path:
    """The run's folder, after its losses were held against those of an unbroken run in one process, made meanwhile."""
    with ThreadPoolExecutor() as pool:
        broken = pool.submit(elastic, recipe, *acts)
        alone = pool.submit(elastic, recipe.model_copy(update={"name": "alone"}))
        run = broken.result()
        ours, theirs = lines(run / "metrics.jsonl"), lines(alone.result() / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    return run


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_that_loses_a_node_continues_with_the_same_losses(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__workers=[1, 3], train__steps=14, train__keep_checkpoints=9)
    run = beside_one_alone(recipe, "lose:6")
    happened = events(run)
    assert [event for event, _ in happened] == ["start", "worker_lost", "resume"]
    assert (happened[0][1], happened[2][1]) == ("3 workers", "2 workers")
    parts = {path.name for path in (run / "checkpoints/step_00000014").glob("part_*")}
    assert parts == {"part_00000_of_00002.safetensors", "part_00001_of_00002.safetensors"}


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_grows_again_when_a_node_comes_back(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__workers=[1, 3], cluster__elastic_poll_s=2, train__steps=140)
    run = beside_one_alone(recipe, "lose:8", "gain:20")
    assert [told for told in events(run) if told[0] != "worker_lost"] == [
        ("start", "3 workers"),
        ("resume", "2 workers"),
        ("resume", "3 workers"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_preemption_warning_saves_a_checkpoint(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__workers=[1, 3], train__steps=70, train__checkpoint_every=50)
    run = beside_one_alone(recipe, "warn:8")
    told = {event["event"]: event["step"] for event in lines(run / "events.jsonl") if event["step"] < 50}
    assert told["resume"] == told["checkpoint"] == told["preempted"] > 8
    assert [event for event, _ in events(run)] == ["start", "preempted", "resume"]
    assert events(run)[-1] == ("resume", "2 workers")
