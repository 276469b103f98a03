"""`sora train` on a local Ray: one undisturbed run, with which the others are compared."""

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.launch.trainer import launch_training
from sora_train.launch.validation import ValidationStatus
from sora_train.ray_cluster.metrics import METRICS
from sora_train.train.checkpoint import complete_checkpoints, read_state
from sora_train.train.tracking import offline_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def unbroken(start_local_ray, builtin_shards: Path, recipe_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with a checkpoint and a validation every 4, each of which sleeps 5 s, and wandb offline."""
    start_local_ray()
    recipe = recipe_of(
        builtin_shards,
        tmp_path_factory.mktemp("runs"),
        validation__every=4,
        validation__prompts=["a red circle", "a blue square"],
        validation__steps=2,
        tracking__wandb="offline",
        data__holdout_fraction=0.2,
    )
    run = launch_training(recipe)
    time.sleep(2)  # Ray's report interval here, twice
    (run.parent / "metrics.txt").write_text(metrics_endpoint())
    return run


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the unbroken run that a test may change."""
    return Path(shutil.copytree(unbroken, tmp_path / "runs" / unbroken.name, symlinks=True))


def metrics_endpoint() -> str:
    """What the agent of this one node shows to Prometheus."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return urllib.request.urlopen(address, timeout=10).read().decode()


def shown(text: str) -> dict[tuple[str, ...], float]:
    """Our metrics, {(name, run, another tag): value}, read by Prometheus' own library."""
    return {
        (sample.name, *(sample.labels[tag] for tag in ("run", "kind", "outcome") if tag in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_sora_")
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl") if "validation" not in line]


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def test_a_run_leaves_what_the_design_says(unbroken: Path):
    assert [step for step, _ in losses(unbroken)] == list(range(1, 13))
    assert [step for step, _ in complete_checkpoints(unbroken / "checkpoints")] == [4, 8, 12]
    assert {path.name for path in (unbroken / "checkpoints/step_00000012").iterdir()} == {
        "part_00000_of_00002.safetensors",
        "part_00001_of_00002.safetensors",
        "ema.safetensors",
        "state.json",
        "recipe.yaml",
        "manifest.json",
    }
    for name in ("recipe.yaml", "environment.json", "manifest.json", "prompts.safetensors"):
        assert (unbroken / name).is_file()
    assert [event["step"] for event in events(unbroken, "checkpoint")] == [4, 8, 12]
    assert events(unbroken, "end")


def test_validation_makes_no_step_wait(unbroken: Path):
    """The one of step 4 sleeps 5 s: training reaches step 8, and drops its validation, while that one still runs."""
    order = [(event["event"], event["step"]) for event in lines(unbroken / "events.jsonl")]
    assert order.index(("validation_dropped", 8)) < order.index(("validation_done", 4))
    assert [event["step"] for event in events(unbroken, "validation_done")] == [4, 12]
    assert [event["step"] for event in events(unbroken, "validation_dropped")] == [8]
    assert not events(unbroken, "validation_failed")
    for step in (4, 12):
        names = {path.name for path in (unbroken / f"samples/step_{step:08d}").iterdir()}
        assert {"000-a-red-circle.mp4", "001-a-blue-square.mp4", "sheet.png", "result.json", "samples.json"} <= names


def test_a_validation_measures_and_writes_the_report(unbroken: Path):
    measured = [line for line in lines(unbroken / "metrics.jsonl") if line.get("validation")]
    assert [line["step"] for line in measured] == [4, 12]
    for line in measured:
        bins = [line[f"holdout_loss_{i}"] for i in range(10)]
        assert line["holdout_loss"] == pytest.approx(sum(bins) / 10)
    assert measured[0]["holdout_loss"] != measured[1]["holdout_loss"]
    assert "a blue square" in (unbroken / "report.html").read_text()


def test_wandb_holds_what_metrics_hold_and_the_videos(unbroken: Path):
    told = list(offline_rows(unbroken))
    (folder,) = (unbroken / "wandb").glob("offline-run-*")
    for section, key in (("train", "loss"), ("validation", "holdout_loss")):
        ours = [(line["step"], line[key]) for line in lines(unbroken / "metrics.jsonl") if key in line]
        theirs = [(row["train_step"], row[f"{section}/{key}"]) for row in told if f"{section}/{key}" in row]
        assert sorted(theirs) == sorted(ours)
    videos = sorted(path.suffix for path in (folder / "files/media/videos/samples").iterdir())
    assert videos == [".mp4"] * 4


def test_prometheus_sees_the_last_lines_of_metrics(unbroken: Path):
    found = shown((unbroken.parent / "metrics.txt").read_text())
    written = lines(unbroken / "metrics.jsonl")
    training = [line for line in written if "validation" not in line]
    newest = {key: value for line in written for key, value in line.items() if value is not None}
    for name, metric in METRICS.items():
        if metric.key in newest:
            assert found.pop((f"ray_{name}", "tiny")) == newest[metric.key], name
    assert found.pop(("ray_sora_step", "tiny")) == training[-1]["step"] == 12
    kinds = Counter(event["event"] for event in lines(unbroken / "events.jsonl"))
    for kind, count in kinds.items():  # other tests' runs of this name count on
        assert found[("ray_sora_events_total", "tiny", kind)] >= count
    assert {"checkpoint_s", "checkpoint_stall_s", "validation_s", "holdout_loss", "loss", "lr"} <= newest.keys()


def test_a_checkpoint_and_a_validation_say_how_long_they_took(unbroken: Path):
    written = lines(unbroken / "metrics.jsonl")
    at = [line["step"] for line in written if "checkpoint_s" in line]
    assert len(at) == 2  # the last one is on disk after the last line
    assert 4 < at[0] <= 8 < at[1] <= 12
    for line in written:
        if "checkpoint_s" in line:
            assert min(line["checkpoint_stall_s"], line["checkpoint_s"]) > 0
        if "validation" in line:
            assert line["validation_s"] > 0


def test_rays_dashboard_knows_a_run_and_its_workers(unbroken: Path):
    actor = ray.get_actor("train_v2_state_actor", namespace="_train_state_actor")
    runs = {run.name: run for run in ray.get(actor.get_train_runs.remote()).values()}
    assert runs["tiny"].status.name == "FINISHED"
    ((attempt,),) = (
        of.values() for key, of in ray.get(actor.get_train_run_attempts.remote()).items() if key == runs["tiny"].id
    )
    assert sorted(worker.world_rank for worker in attempt.workers) == [0, 1]


def kill_a_worker_at(step: int, run: Path) -> threading.Thread:
    """Kills one training worker of this process's Ray with SIGKILL, once a step is logged."""

    def kill() -> None:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and any(done >= step for done, _ in losses(run))):
            time.sleep(0.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        os.kill(workers[-1].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_run_with_a_killed_worker_has_the_same_losses(
    unbroken: Path, builtin_shards: Path, tmp_path: Path, recipe_of
):
    recipe = recipe_of(builtin_shards, tmp_path, name="killed", data__holdout_fraction=0.2)
    killer = kill_a_worker_at(6, tmp_path / "killed")
    run = launch_training(recipe)
    assert not killer.is_alive()
    assert len(events(run, "worker_lost")) == 1
    assert [event["step"] for event in events(run, "resume")] in (
        [],
        [4],
        [8],
    )  # written in the background: on a busy machine that of step 4 may not be whole yet
    assert losses(run) == losses(unbroken)
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [4, 8, 12]
    last = "checkpoints/step_00000012/ema.safetensors"
    ours, theirs = load_file(run / last), load_file(unbroken / last)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_same_command_resumes_and_keeps_new_checkpoints(finished: Path, builtin_shards: Path, recipe_of):
    """Here with two workers that share each clip, which changes no loss."""
    before = losses(finished)
    torn = finished / "checkpoints/step_00000012/part_00001_of_00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    recipe = recipe_of(
        builtin_shards, finished.parent, data__holdout_fraction=0.2, train__steps=14, train__keep_checkpoints=2,
        cluster__sequence_parallel=2,
    )  # fmt: skip
    run = launch_training(recipe)
    assert run == finished
    (resumed,) = events(run, "resume")
    assert (resumed["step"], "2 workers on cpu in groups of 2 that share clips" in resumed["reason"]) == (8, True)
    assert losses(run)[:12] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in before]
    assert [step for step, _ in losses(run)] == list(range(1, 15))
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [12, 14]


def test_a_finished_run_says_so_and_starts_nothing(finished: Path, builtin_shards: Path, recipe_of, capsys):
    launch_training(recipe_of(builtin_shards, finished.parent, data__holdout_fraction=0.2))
    assert "is finished: 12 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_reruns_a_validation_that_was_cut_off(finished: Path, builtin_shards: Path, recipe_of, capsys):
    steps_validated = [line["step"] for line in lines(finished / "metrics.jsonl") if line.get("validation")]
    shutil.rmtree(finished / "samples/step_00000012")
    ValidationStatus(finished).set(12, "running")
    recipe = recipe_of(
        builtin_shards,
        finished.parent,
        data__holdout_fraction=0.2,
        validation__every=4,
        validation__prompts=["a red circle"],
        validation__steps=2,
    )
    wanted = recipe.validation.model_copy(update={"resources": {"CPU": 1.0, "GPU": 1.0}})
    with pytest.raises(UserError) as raised:  # no GPU here: none is taken, nothing runs
        launch_training(recipe.model_copy(update={"validation": wanted}))
    assert raised.value.code == "cluster"
    assert "the validations of steps [12] were cut off" in capsys.readouterr().out
    assert ValidationStatus(finished).get(12) == "running"
    launch_training(recipe)
    assert ValidationStatus(finished).get(12) == "done"
    validated = [line["step"] for line in lines(finished / "metrics.jsonl") if line.get("validation")]
    assert validated == [*steps_validated, 12]
    assert list((finished / "samples/step_00000012").glob("*.mp4"))


def test_a_run_of_another_recipe_is_refused_by_its_keys(finished: Path, builtin_shards: Path, recipe_of):
    recipe = recipe_of(
        builtin_shards, finished.parent, data__holdout_fraction=0.2, train__steps=20, model__width=32, train__seed=1
    )
    with pytest.raises(UserError, match=r"model.width was 16 and is 32; train.seed was 0 and is 1"):
        launch_training(recipe)


@pytest.mark.slow
def test_new_data_keeps_step_and_optimizer_and_starts_an_epoch(
    finished: Path, builtin_shards: Path, write_noise_shards, recipe_of, tmp_path: Path, capsys
):
    more = tmp_path / "more"
    more.mkdir()
    write_noise_shards(more, [1 + i % 4 for i in range(26)], 64)  # the 21 clips of before, and five more
    shutil.copy(builtin_shards / "manifest.json", more)
    ids = {split: clip_ids(more, split) for split in ("train", "holdout")}
    added = ids["train"] - clip_ids(builtin_shards, "train")
    assert 0 < len(added) < 5  # some are held out
    steps = -(-len(ids["train"]) // 4)
    (epoch,) = [line["epoch"] for line in lines(finished / "metrics.jsonl") if line["step"] == 12 and "epoch" in line]
    recipe = recipe_of(
        more, finished.parent, data__holdout_fraction=0.2, train__steps=12 + steps, train__log_samples=True
    )
    with pytest.raises(UserError, match=r"other clips than .*--new-data"):
        launch_training(recipe)
    assert launch_training(recipe, new_data=True) == finished

    (event,) = events(finished, "new_data")
    assert event["step"] == 12
    assert f"added: {len(added)} clips" in event["reason"]
    assert f"new data at step 12: {event['reason']}" in capsys.readouterr().out
    assert [event["step"] for event in events(finished, "resume")] == [12]
    assert [step for step, _ in losses(finished)] == list(range(1, 13 + steps))
    trained = [line for file in (finished / "trained").glob("rank_*.jsonl") for line in lines(file)]
    assert Counter(name for line in trained for name in line["sample_ids"]) == Counter(ids["train"])
    new = [line["epoch"] for line in lines(finished / "metrics.jsonl") if line["step"] > 12]
    assert new == [epoch + 1] * steps
    state = read_state(finished / f"checkpoints/step_{12 + steps:08d}")
    assert state is not None
    assert (state["updates"], state["data_from"]) == (12 + steps, 12)


def clip_ids(shards: Path, split) -> set[str]:
    """Ids of the clips of a split, with the hold-out share of this file."""
    found = ShardSet(str(shards), 0.2, split)
    columns = [found.columns(bucket, ["sample_id"])["sample_id"] for bucket in found.rows]
    return {str(name) for column in columns for name in column.to_pylist()}


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(builtin_shards: Path, tmp_path: Path, recipe_of):
    recipe = recipe_of(builtin_shards, tmp_path, cluster__workers=4, validation__every=4, validation__prompts=["a"])
    with pytest.raises(UserError, match=r"room for 3 workers .*, and 4 are needed.* have 4 CPU"):
        launch_training(recipe)
    assert not (tmp_path / "tiny").exists()
