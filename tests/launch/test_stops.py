"""Runs that end before their last step, and what the same command does then."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.util

from sora_train import cli
from sora_train.errors import UserError
from sora_train.launch.trainer import launch_training
from sora_train.recipe import Recipe, save_recipe
from sora_train.train.checkpoint import complete_checkpoints, read_state

pytestmark = pytest.mark.ray


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_signals() -> None:
    """Restores signals that `nohup` or a shell's `&` ignores; children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def terminated(
    recipe: Recipe, when: Callable[[str], bool], number: int = signal.SIGTERM, times: int = 1
) -> tuple[int, str, float]:
    """Runs `sora train` and signals its process group once `when` holds for what it has printed, as a terminal and
    `timeout` do; returns its exit code, its output, and the seconds that it took to end."""
    path = Path(recipe.train.output) / f"{recipe.name}.yaml"
    save_recipe(recipe, path)
    said = path.with_suffix(".txt")
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.cli", "train", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "SORA_STEP_DELAY_S": "0.3"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=answers_signals,
        )
        try:
            while process.poll() is None and not when(said.read_text()):
                time.sleep(0.1)
            began = time.monotonic()
            for _ in range(times):
                os.killpg(process.pid, number)
                while process.poll() is None and "saving a checkpoint" not in said.read_text() and times > 1:
                    time.sleep(0.05)
            code = process.wait(timeout=240)
        finally:
            process.kill()
    return code, said.read_text(), time.monotonic() - began


@pytest.mark.timeout(600)
def test_sigterm_saves_a_checkpoint_and_exits_as_resumable(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__address="local", train__steps=500,
                       train__checkpoint_every=500, validation__every=500, validation__prompts=["a"])  # fmt: skip
    code, said, _ = terminated(recipe, lambda said: "step   3/500" in said)
    assert code == cli.EXIT_RESUMABLE == 75, said
    assert "Traceback" not in said
    run = tmp_path / "tiny"
    ((step, folder),) = complete_checkpoints(run / "checkpoints")
    assert 3 <= step < 20
    assert (
        f"stopped at step {step} after SIGTERM. The last checkpoint is {folder}. Run the same command to resume" in said
    )
    told = [(event["event"], event["step"]) for event in lines(run / "events.jsonl")]
    assert ("stopped", step) in told
    assert not (run / "leave").exists()
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, step + 1))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "Ctrl-C"), pytest.param(signal.SIGHUP, "SIGHUP", marks=pytest.mark.slow)],
)
def test_ctrl_c_and_a_closed_terminal_save_a_checkpoint(
    number: int, name: str, builtin_shards: Path, tmp_path: Path, recipe_of
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")  # as on most clusters: runs -> /scratch/me/runs
    (tmp_path / "real/far").mkdir()
    (tmp_path / "real/tiny").symlink_to(tmp_path / "real/far")
    recipe = recipe_of(builtin_shards, tmp_path / "link", cluster__address="local", cluster__workers=1,
                       train__steps=500, train__checkpoint_every=500)  # fmt: skip
    code, said, _ = terminated(recipe, lambda said: "step   3/500" in said, number)
    assert code == cli.EXIT_RESUMABLE, said
    assert "Traceback" not in said
    assert f"{name}: saving a checkpoint, then stopping. A second {name} stops at once\n" in said
    ((step, folder),) = complete_checkpoints(tmp_path / "real/far/checkpoints")
    assert 3 <= step < 20
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}
    events = lines(tmp_path / "real/far/events.jsonl")
    (reason,) = [event["reason"] for event in events if event["event"] == "stopped"]
    assert reason == f"{name}; run the same command to resume"


@pytest.mark.timeout(600)
def test_a_second_ctrl_c_ends_a_run_now(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__address="local", cluster__workers=1, train__steps=500,
                       train__checkpoint_every=500)  # fmt: skip
    code, said, _ = terminated(recipe, lambda said: "step   3/500" in said, signal.SIGINT, times=2)
    assert code == cli.EXIT_INTERRUPTED, said
    assert "Traceback" not in said
    (event,) = [event for event in lines(tmp_path / "tiny/events.jsonl") if event["event"] == "interrupted"]
    assert event["reason"].startswith("Ctrl-C")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", [pytest.param("starting Ray", marks=pytest.mark.slow), "starting workers"])
def test_sigterm_while_a_run_starts_ends_it_soon(moment: str, builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__address="local", cluster__workers=1, train__steps=500)
    code, said, seconds = terminated(recipe, lambda said: moment in said)
    assert code == cli.EXIT_RESUMABLE, said
    assert "There is no checkpoint yet" in said  # and perhaps, of Python, that it ignored what Ray's handler raised
    assert seconds < 240  # and not the minutes that the run would take; a busy machine is slow to answer


@pytest.mark.slow
def test_damaged_shards_end_a_run_at_once_with_the_reason(
    local_ray: None, builtin_shards: Path, tmp_path: Path, recipe_of, monkeypatch: pytest.MonkeyPatch
):
    shards = tmp_path / "shards"
    shutil.copytree(builtin_shards, shards)
    (file,) = shards.glob("bucket=*/*.parquet")
    table = pq.ParquetFile(file).read()
    pq.write_table(table, file, row_group_size=8, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[content.index(table["latents"][20].as_py()) + 10] ^= 1
    file.write_bytes(content)
    says = r"(?s)near step \d+: .*bucket=2x32x32/part.parquet.*checkpoint.*once the cause is fixed"
    with pytest.raises(UserError, match=says) as raised:
        launch_training(recipe_of(shards, tmp_path, train__steps=30))
    assert raised.value.code == "shards"  # that of the worker's error
    told = [event["event"] for event in lines(tmp_path / "tiny/events.jsonl")]
    assert told.count("failed") == told.count("start") == 1
    assert "worker_lost" not in told


@pytest.mark.slow
def test_a_run_says_that_it_waits_for_room_and_then_starts(
    local_ray: None, builtin_shards: Path, tmp_path: Path, recipe_of, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sora_train.launch.monitor.WAIT_S", 2.0)
    monkeypatch.setattr("sora_train.launch.monitor.QUIET_S", 1.0)
    taken = ray.util.placement_group([{"CPU": 3}])
    ray.get(taken.ready())

    class Reader(io.StringIO):
        def write(self, text: str) -> int:
            if "Ray waits for room" in text:
                ray.util.remove_placement_group(taken)
            return super().write(text)

    with contextlib.redirect_stdout(Reader()) as said:
        run = launch_training(recipe_of(builtin_shards, tmp_path, train__steps=2), preflight=False)
    assert (
        "Ray waits for room: 2 workers need {'CPU': 1.0} each, and 1 CPU are free. Other jobs of this cluster hold the "
        "rest (`ray status`); end one, or lower cluster.workers\n"
    ) in said.getvalue()
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_checkpoints_of_the_lowest_loss_stay_and_the_newest(
    local_ray: None, builtin_shards: Path, tmp_path: Path, recipe_of
):
    settings = {"train__keep_by": "loss", "train__keep_checkpoints": 2, "train__checkpoint_every": 2}
    mean = {}
    for steps in (8, 14):  # the second time a new controller of Ray's is told of what is there
        run = launch_training(recipe_of(builtin_shards, tmp_path, train__steps=steps, **settings))
        kept = {step: read_state(path) for step, path in complete_checkpoints(run / "checkpoints")}
        losses = [line["loss"] for line in lines(run / "metrics.jsonl")]
        mean = {step: (losses[step - 2] + losses[step - 1]) / 2 for step in range(2, steps + 1, 2)}
        assert all(state["loss"] == pytest.approx(mean[step]) for step, state in kept.items())
        assert set(kept) == {*sorted(mean, key=mean.__getitem__)[:2], steps}


@pytest.mark.slow
def test_fresh_begins_anew_only_where_it_was_told_to_overwrite(
    local_ray: None, builtin_shards: Path, tmp_path: Path, recipe_of
):
    run = tmp_path / "tiny"
    first = recipe_of(builtin_shards, tmp_path, train__steps=2)
    launch_training(first, fresh=True)  # nothing is there: nothing to refuse
    before = lines(run / "metrics.jsonl")
    with pytest.raises(UserError, match=r"holds a run with checkpoints up to step_00000002.*--overwrite"):
        launch_training(first, fresh=True)
    assert lines(run / "metrics.jsonl") == before
    launch_training(recipe_of(builtin_shards, tmp_path, train__steps=3, train__seed=1), fresh=True, overwrite=True)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [3]
    assert [event["event"] for event in lines(run / "events.jsonl")] == ["start", "checkpoint", "end"]
