"""A run's folder before Ray starts: nothing of value is removed, and problems are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sora_train.data.shards import ShardSet
from sora_train.errors import Stopped, UserError
from sora_train.launch.resume import changed_keys, check_resume, describe_changes
from sora_train.launch.run_folder import (
    check_some_complete,
    check_writable,
    quarantine_damaged,
    record_lost_driver,
    record_lost_validations,
)
from sora_train.launch.signals import SignalHandler
from sora_train.launch.trainer import run_until_end
from sora_train.launch.validation import ValidationStatus
from sora_train.launch.worker import read_start_state, warn_if_group_split
from sora_train.locks import run_lock
from sora_train.manifest import Manifest
from sora_train.model import Latte
from sora_train.recipe import save_recipe
from sora_train.train import checkpoint
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.loop import train
from sora_train.train.metrics import STOP_FILE, Events
from sora_train.train.run_dir import RunDir
from sora_train.train.weights import read_weights


@pytest.fixture(scope="module")
def recipe(tiny_shards: Path, recipe_of):
    changes = {"cluster__workers": 1, "train__zero_stage": 0, "train__steps": 3, "train__checkpoint_every": 1}
    return recipe_of(tiny_shards, Path("runs"), name="run", **changes)


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory, recipe) -> Path:
    """Three steps in this process with a checkpoint each. Once: DeepSpeed allows one process group per process."""
    folder = tmp_path_factory.mktemp("trained")
    save_recipe(recipe, folder / "recipe.yaml")
    Manifest.load(str(tiny_shards)).save(str(folder))
    shards = ShardSet(str(tiny_shards))
    train(recipe.train, recipe.model, recipe.diffusion, shards, device=torch.device("cpu"), run_dir=RunDir(folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_damaged_checkpoints_are_renamed_and_copies_left_alone(run: Path):
    folder = run / "checkpoints"
    (folder / "step_00000002/state.json").write_text("{")
    (folder / "step_00000003/state.json").unlink()
    (folder / "step_00000003/ema.safetensors").unlink()  # as a kill leaves it
    (folder / "step_00000001_mine").mkdir()
    (folder / "step_note.txt").write_text("a note")
    quarantine_damaged(run)
    assert sorted(path.name for path in folder.glob("*step_*")) == [
        "damaged_step_00000002",
        "step_00000001",
        "step_00000001_mine",
        "step_note.txt",
    ]
    (event,) = [line for line in map(json.loads, (run / "events.jsonl").open()) if line["event"] == "damaged"]
    assert "its state.json is cut short or damaged" in event["reason"]
    assert [step for step, _ in checkpoint.complete_checkpoints(folder)] == [1]


def test_a_run_without_a_complete_checkpoint_does_not_restart(run: Path):
    check_some_complete(run)
    for path in checkpoint.step_folders(run / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"step_00000001: it has no state.json.*--fresh --overwrite"):
        check_some_complete(run)


def test_weights_that_are_not_finite_never_become_a_checkpoint(run: Path, recipe):
    engine = Engine(Latte(recipe.model), recipe.train, accumulation=1, device=torch.device("cpu"))
    ema = Ema(engine, 0.9)
    assert checkpoint.snapshot(engine, ema, checkpoint.State())
    next(iter(engine.slices().values())).master[0] = torch.inf
    with pytest.raises(UserError, match="weights are no longer finite"):
        checkpoint.snapshot(engine, ema, checkpoint.State())


def test_a_flipped_byte_in_the_averaged_weights_is_noticed(run: Path):
    path = run / "checkpoints/step_00000003/ema.safetensors"
    assert read_weights(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match="another checksum"):
        read_weights(path)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    refused = pytest.raises(UserError, match=r"another `sora train` is running.*process \d+")
    with run_lock(str(tmp_path), "sora train"), refused, run_lock(str(tmp_path), "sora train"):
        pass
    with run_lock(str(tmp_path), "sora train"):
        pass


def test_on_resume_the_learning_rate_may_change_but_not_the_seed(tiny_shards: Path, run: Path, recipe):
    lower = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 1e-5})})
    manifest = Manifest.load(str(tiny_shards))
    assert check_resume(run, lower, manifest) == 3
    assert changed_keys(run, lower, ("train.",)) == ["train.learning_rate was 0.0001 and is 1e-05"]
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    with pytest.raises(UserError, match="train.seed was 0 and is 1"):
        check_resume(run, other, manifest)
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="recipe.yaml is missing"):
        check_resume(run, recipe, manifest)


@pytest.mark.parametrize(("then", "now", "same"), [(0, 1, False), (2, 0, False), (1, 3, True)])
def test_in_bf16_a_run_does_not_change_from_or_to_stage_0(
    tiny_shards: Path, run: Path, recipe, then: int, now: int, same: bool
):
    def of(stage: int, precision: str):
        changes = {"zero_stage": stage, "precision": precision}
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})

    manifest = Manifest.load(str(tiny_shards))
    save_recipe(of(then, "bf16"), run / "recipe.yaml")
    if same:
        assert check_resume(run, of(now, "bf16"), manifest) == 3
    else:
        with pytest.raises(UserError, match=f"train.zero_stage was {then} and is {now}: in bf16"):
            check_resume(run, of(now, "bf16"), manifest)
    save_recipe(of(then, "fp32"), run / "recipe.yaml")
    assert check_resume(run, of(now, "fp32"), manifest) == 3


def test_a_rate_that_only_warms_up_is_no_change(run: Path, recipe):
    """From step 3 to 4 of the warm-up the rate rises by a third."""

    def of(**changes: object):
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"warmup_steps": 100} | changes)})

    save_recipe(of(), run / "recipe.yaml")
    assert describe_changes(run, of(), 3) == ""
    assert describe_changes(run, of(guard_spike=7.0), 3) == "train.guard_spike was 5.0 and is 7.0"
    assert "the learning rate is 3e-06 at step 3 and 4e-05 at step 4" in describe_changes(run, of(warmup_steps=10), 3)


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [("bf16", "fp8", True), ("fp8", "bf16", True), ("fp32", "bf16", False), ("fp8", "fp32", False)],
)
def test_bf16_and_fp8_may_replace_each_other(tiny_shards: Path, run: Path, recipe, then: str, now: str, same: bool):
    def of(precision: str):
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})

    manifest = Manifest.load(str(tiny_shards))
    save_recipe(of(then), run / "recipe.yaml")
    if same:
        assert check_resume(run, of(now), manifest) == 3
        assert describe_changes(run, of(now), 3) == f"train.precision was {then!r} and is {now!r}"
    else:
        with pytest.raises(UserError, match=f"train.precision was {then} and is {now}"):
            check_resume(run, of(now), manifest)


def test_a_garbled_line_of_metrics_costs_only_itself(run: Path):
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "garbage", "{}", lines[1], lines[2]]) + "\n")
    RunDir(run).truncate(2)
    assert metrics.read_text().splitlines() == lines[:2]


@pytest.mark.parametrize(
    ("told", "is_lost"),
    [([], False), (["start", "checkpoint"], True), (["start", "end", "validation_done"], False),
     (["start", "interrupted"], False), (["start", "stopped", "resume", "worker_lost"], True),
     (["start", "preempted"], True), (["start", "driver_lost", "resume", "failed"], False)],
)  # fmt: skip
def test_a_previous_command_that_was_killed_becomes_an_event(tmp_path: Path, told: list[str], is_lost: bool):
    for event in told:
        Events(tmp_path).write(event, 3, "")
    record_lost_driver(tmp_path)
    seen = [event["event"] for event in Events(tmp_path).lines.read()]
    assert seen == told + ["driver_lost"] * is_lost


def test_a_lost_validation_without_its_checkpoint_is_an_event(run: Path):
    shutil.rmtree(run / "checkpoints/step_00000001")
    validations = ValidationStatus(run)
    for step, status in {1: "lost", 2: "running", 3: "done"}.items():
        validations.set(step, status)
    record_lost_validations(run)
    assert [validations.get(step) for step in (1, 2, 3)] == ["failed", "lost", "done"]
    record_lost_validations(run)
    (event,) = [event for event in Events(run).lines.read() if event["event"] == "validation_dropped"]
    assert (event["step"], event["reason"]) == (
        1, "it ended with its command, and its checkpoint has been deleted since"
    )  # fmt: skip


def test_the_report_of_a_stopped_run_says_that_it_stopped(run: Path):
    Events(run).write("start", 0, "")
    with pytest.raises(Stopped, match="stopped at step 3 after a request by the file"):
        run_until_end(run, SignalHandler(run), lambda: "a stop was requested")
    assert "stopped, can resume" in (run / "report.html").read_text()


def test_a_command_that_was_interrupted_lets_no_worker_start(run: Path):
    def train() -> str:
        (run / STOP_FILE).touch()  # as the signal's handler does
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until_end(run, SignalHandler(run), train)
    assert read_start_state(run) == ("stop requested before training resumed", [])
    record_lost_driver(run)
    assert [event["event"] for event in Events(run).lines.read()] == ["interrupted"]


@pytest.mark.parametrize("link", ["runs", "runs/tiny"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, link: str):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("nowhere")
    wrong = pytest.raises(UserError, match=rf"{tmp_path / link} is a symbolic link to nowhere, which does not exist")
    with wrong:
        check_writable(tmp_path / "runs/tiny")
    with wrong, run_lock(str(tmp_path / "runs/tiny"), "sora train"):
        pass


def test_a_group_of_workers_on_two_nodes_is_an_event(tmp_path: Path):
    events = Events(tmp_path)
    for rank in range(8):  # nodes of 4 workers, then of 6 and of 2
        warn_if_group_split(4, rank, rank % 4, events, 7)
    assert not (tmp_path / "events.jsonl").exists()
    for rank in range(8):
        warn_if_group_split(4, rank, rank % 6, events, 7)
    (event,) = events.lines.read()
    assert (event["event"], event["step"]) == ("group_split", 7)
    assert event["reason"].startswith("ranks 4 to 7 share")
