"""Broken set-ups are caught before training starts, with the remedy in the message."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group

from sora_train.errors import RecipeError, UserError
from sora_train.launch import checks
from sora_train.launch.checks import check_shards, check_worker, count_workers, idle_gpus, split_groups
from sora_train.launch.preflight import node_info, table, verdicts
from sora_train.launch.preflight.allreduce import check_allreduce, run_ranks, time_sum
from sora_train.launch.preflight.node_info import NodeInfo, ask, collect, describe_node, parse_gpus, versions
from sora_train.launch.preflight.table import Table, check_files, check_quickly, preflight
from sora_train.launch.trainer import launch_training
from sora_train.manifest import Manifest
from sora_train.plan.states import host_memory
from sora_train.recipe import check, save_recipe

VALIDATED = {"validation__every": 4, "validation__prompts": ["a"]}
H100 = ("NVIDIA H100 80GB HBM3", 81559 * 2**20)


def fails(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as raised:
        act()
    assert not [word for word in words if word not in str(raised.value)], raised.value


def test_sound_nodes_pass():
    nodes = [NodeInfo(f"10.0.0.{n}", {"CPU": 16.0, "GPU": 2.0}, (H100, H100)) for n in range(3)]
    assert verdicts.check_nodes(nodes) == "3 nodes, 48 CPUs, 6 GPUs (NVIDIA H100 80GB HBM3)"


def test_a_problem_of_several_nodes_is_said_once():
    nodes = [NodeInfo("10.0.0.1", problems=("a", "b")), NodeInfo("10.0.0.2", problems=("b",))]
    fails(lambda: verdicts.check_nodes(nodes), "10.0.0.1: a; 10.0.0.1, 10.0.0.2: b")


@pytest.mark.parametrize("name", ["torch", "python", "deepspeed", "sora_train"])
def test_another_version_on_a_node_is_named_with_both(name: str, tmp_path: Path):
    here = versions()
    (problem,) = describe_node(tmp_path / "id1", here | {name: "another"}, "", "").problems
    assert problem.startswith(f"{name} is {here[name]} there and another here. Install the same")


def test_other_shards_on_a_node_are_named(builtin_shards: Path, tmp_path: Path):
    encoding = Manifest.load(str(builtin_shards)).encoding_hash
    assert describe_node(tmp_path / "id1", versions(), str(builtin_shards), encoding).problems == ()
    (other,) = describe_node(tmp_path / "id2", versions(), str(builtin_shards), "another").problems
    assert f"{encoding} there and another here" in other
    (none,) = describe_node(tmp_path / "id3", versions(), str(tmp_path), encoding).problems
    assert "no manifest.json" in none


def test_a_folder_that_a_node_lacks_or_can_not_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_info, "FILE_DELAY_S", 0.3)
    (lacks,) = describe_node(tmp_path / "none" / ".preflight" / "id1", versions(), "", "").problems
    assert f"{tmp_path / 'none'} is missing" in lacks
    (tmp_path / ".there").write_text("")  # where the driver's folder would be
    (full,) = describe_node(tmp_path / ".there" / "id2", versions(), "", "").problems
    assert "can't be written" in full
    assert "Mount" in full


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"train__compile": "yes"}, "compile", "train.compile is yes, but there is no C compiler (no-such-compiler). "),
        ({"train__precision": "fp8"}, "package", "train.precision is fp8, which needs torchao"),
        ({"lora__rank": 4, "model__init_from": "a"}, "package", "lora.rank is above 0, which needs peft"),
        ({}, "package", "workers use GPUs, and torch"),
    ],
)
def test_what_a_worker_would_lack_is_named_before_it_starts(
    changes: dict, code: str, says: str, recipe_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, gpu = recipe_of(tmp_path, tmp_path, **changes), not changes
    worker = recipe.train, bool(recipe.lora.rank), gpu
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check_worker(*worker)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        check_worker(*worker)
    assert raised.value.code == code
    assert str(raised.value).startswith(says)
    (tmp_path / ".there").mkdir()
    assert describe_node(tmp_path / ".there/id", versions(), "", "", worker).lacks == str(raised.value)


def test_what_a_node_without_room_for_a_worker_lacks_does_not_matter():
    head, node = (NodeInfo(name, {"CPU": 8.0, "GPU": n}, lacks="no compiler") for name, n in (("head", 0), ("node", 8)))
    fails(lambda: verdicts.check_nodes([head, node], {"CPU": 1.0, "GPU": 1.0}), "node: no compiler")
    assert verdicts.check_nodes([head], {"CPU": 1.0, "GPU": 1.0}).startswith("1 nodes")


def test_a_batch_that_does_not_divide_is_told_which_would(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, train__batch_size=16, train__micro_batch_size=3, cluster__workers=4)
    words = "8 of 24 slots are padding", "train.batch_size 12 or 24", "train.micro_batch_size 2"
    fails(lambda: verdicts.check_batch(recipe), *words)
    for size in (12, 24):
        even = {"train__batch_size": size, "train__micro_batch_size": 3}
        verdicts.check_batch(recipe_of(tmp_path, tmp_path, cluster__workers=4, **even))
    shared = {"cluster__workers": 8, "cluster__sequence_parallel": 2, "train__batch_size": 8}
    assert verdicts.check_batch(recipe_of(tmp_path, tmp_path, **shared)).startswith("8 clips over 4 groups of 2 worke")
    wide = shared | {"cluster__sequence_parallel": 8}
    said = verdicts.check_batch(recipe_of(tmp_path, tmp_path, **wide))
    assert "2 latent frames, so 6 of the 8 workers" in said


def test_with_balanced_steps_a_table_of_the_buckets_is_the_message(recipe_of, tmp_path: Path):
    names = ["1x32x32", "2x32x32"]
    balanced = {"train__balance": 1, "train__micro_batch_size": 3, "cluster__workers": 4}
    rows = verdicts.check_batch(recipe_of(tmp_path, tmp_path, data__buckets=names, **balanced)).splitlines()
    assert [row.split()[0] for row in rows[2:4]] == names
    uneven = recipe_of(tmp_path, tmp_path, data__buckets=names, train__batch_size=9, **balanced)
    fails(lambda: verdicts.check_batch(uneven), "9 clips over 4 workers", "3 of 12 slots are padding")


def test_more_workers_than_clips_of_a_batch_are_refused(recipe_of, tmp_path: Path):
    (sentence,) = check(recipe_of(tmp_path, tmp_path, train__batch_size=4, cluster__workers=5))
    assert "use at most 4 workers" in sentence


def test_too_little_disk_is_told_by_how_much(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, train__keep_checkpoints=3)
    size = verdicts.checkpoint_bytes(recipe.model)
    words = "3 kept checkpoints and one being written", str(tmp_path), "too little", "train.keep_checkpoints"
    fails(lambda: verdicts.check_disk(recipe, free=4 * size - 1, existing=0), *words)
    verdicts.check_disk(recipe, free=2 * size, existing=2 * size)
    large = recipe_of(tmp_path, tmp_path, train__keep_checkpoints=10**9)
    fails(lambda: table.check_disk(large), "too little")
    table.check_disk(recipe)


def test_a_gpu_too_small_for_the_recipe_is_told_what_would_fit(recipe_of, tmp_path: Path):
    recipe = recipe_of(
        tmp_path, tmp_path, data__height=256, data__width=256, data__frames=16, model__width=1152, model__depth=28,
        model__heads=16, train__batch_size=64, train__micro_batch_size=16,
    )  # fmt: skip
    small = NodeInfo(gpus=(H100, ("NVIDIA A10", 24 * 2**30)))
    words = "24 GB are usable", "lower train.micro_batch_size to"
    fails(lambda: verdicts.check_memory(recipe, [NodeInfo(gpus=(H100,)), small]), *words)
    assert "not compared" in verdicts.check_memory(recipe, [NodeInfo()])


def test_a_node_with_too_little_cpu_memory_is_told_what_takes_it(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__workers=2, train__zero_stage=2)
    parts, averaged = host_memory(recipe.model, recipe.train, 2)
    need = 2 * sum(parts.values()) + averaged
    enough = {"CPU": 4.0, "GPU": 2.0, "memory": need - 100.0, "object_store_memory": 100.0}
    assert verdicts.check_ram(recipe, [enough], gpu=True).endswith("on rank 0 at a checkpoint")
    with pytest.raises(UserError, match=r"2 workers on a node take .*\(a checkpoint's copy.*\), and on rank 0"):
        verdicts.check_ram(recipe, [enough | {"memory": need - 101.0}], gpu=True)
    one_each = [enough | {"GPU": 1.0, "memory": need / 2 + averaged}] * 2
    verdicts.check_ram(recipe, one_each, gpu=True)


def test_a_sum_of_cpus_is_no_room_for_a_worker(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__cpus_per_worker=4)
    assert count_workers(recipe, False, [{"CPU": 2.0}] * 4) == 0
    assert count_workers(recipe, False, [{"CPU": 9.0}, {"CPU": 2.0}, {"CPU": 4.0}]) == 3


def test_a_validation_takes_the_room_of_as_few_workers_as_it_can(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, **VALIDATED, validation__resources={"GPU": 2.0})
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 1.0}] * 4) == 0
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 3.0}]) == 1
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 2.0}] * 2) == 2
    assert count_workers(recipe, True, [{"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 8.0}]) == 9


def test_gpus_that_training_leaves_idle_are_named_with_the_remedy(recipe_of, tmp_path: Path):
    two = recipe_of(tmp_path, tmp_path, cluster__workers=2)
    start = "training uses no GPU: 2 workers need 2 GPUs, and the cluster has 1. Set cluster.workers to 1"
    assert idle_gpus(two, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]).startswith(start)
    enough, none = [{"CPU": 8.0, "GPU": 2.0}], [{"CPU": 8.0}]
    decided = recipe_of(tmp_path, tmp_path, cluster__workers=2, cluster__gpu="no")
    assert [idle_gpus(two, enough), idle_gpus(two, none), idle_gpus(decided, [{"GPU": 1.0}])] == ["", "", ""]
    validated = recipe_of(tmp_path, tmp_path, cluster__workers=1, **VALIDATED, validation__resources={"GPU": 1.0})
    words = "1 worker and the validation's {'GPU': 1.0} need 2 GPUs", "Take GPU out of validation.resources"
    assert all(word in idle_gpus(validated, [{"GPU": 1.0}]) for word in words)


def test_a_group_that_may_be_on_two_nodes_is_told(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__workers=8, cluster__sequence_parallel=4)
    eight, six, none = ({"CPU": 64.0, "GPU": count} for count in (8.0, 6.0, 0.0))
    why = split_groups(recipe, True, [eight, six])
    assert why.startswith("cluster.sequence_parallel is 4, and nodes have room for 6 workers")
    assert why.endswith("or nodes with a multiple of 4 GPUs")
    one = recipe_of(tmp_path, tmp_path, cluster__workers=8)
    fine = [(recipe, [eight, eight]), (recipe, [six, none]), (one, [eight, six])]
    assert [split_groups(each, True, nodes) for each, nodes in fine] == ["", "", ""]


def test_an_all_reduce_is_exact():
    if not dist.is_initialized():  # all tests of a process share one: DeepSpeed keeps the first
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert time_sum(0, 1, 5000, torch.device("cpu")) > 0
    with pytest.raises(ArithmeticError):
        time_sum(1, 1, 5000, torch.device("cpu"))  # a rank that this group does not have


def test_nvidia_smi_is_read():
    output = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA A10, 23028\n\n[N/A], [N/A]\n"
    assert parse_gpus(output) == (H100, ("NVIDIA A10", 23028 * 2**20))


def test_a_check_that_hangs_or_breaks_fails_its_row_alone(capsys: pytest.CaptureFixture[str]):
    rows = Table()
    rows.check("hangs", threading.Event().wait, timeout_s=0.1)
    rows.check("breaks", lambda: 1 // 0)
    assert rows.check("passes", lambda: 7) == 7
    assert rows.failures["hangs"].startswith("no answer in 0.1 s")
    assert rows.failures["breaks"].startswith("ZeroDivisionError")
    assert "passed  passes        7" in capsys.readouterr().out


def test_a_table_that_can_not_be_printed_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        fails(lambda: Table().add("disk", "passed", ""), "stdout can't be written: No space left on device")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def file_checks(recipe) -> Table:
    rows = Table(print_rows=False)
    check_files(recipe, rows)
    return rows


def test_shards_that_are_absent_or_damaged_fail(builtin_shards: Path, tmp_path: Path, recipe_of):
    assert set(file_checks(recipe_of(builtin_shards, tmp_path)).states.values()) == {"passed"}
    absent = file_checks(recipe_of(tmp_path / "none", tmp_path)).failures["shards"]
    assert "no manifest.json" in absent
    other = file_checks(recipe_of(builtin_shards, tmp_path, data__frames=9, model__text_width=7)).failures["shards"]
    assert "text_width is 7" in other
    assert "hold 2x32x32" in other
    cut = tmp_path / "cut"
    shutil.copytree(builtin_shards, cut)
    (part,) = cut.glob("bucket=*/*.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    assert str(part) in file_checks(recipe_of(cut, tmp_path)).failures["shards"]


def test_networks_that_did_not_make_the_shards_fail(builtin_shards: Path, tmp_path: Path, recipe_of):
    found = file_checks(recipe_of(builtin_shards, tmp_path, codec__vae=str(tmp_path / "none")))
    assert "codec.vae" in found.failures["networks"]


def test_a_place_that_can_not_hold_runs_fails(builtin_shards: Path, tmp_path: Path, recipe_of):
    (tmp_path / "file").write_text("")
    assert "--train.output" in file_checks(recipe_of(builtin_shards, tmp_path / "file")).failures["run folder"]
    remote = recipe_of(builtin_shards, tmp_path, train__output="s3://b/runs")
    assert "is remote" in file_checks(remote).failures["paths"]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestWithRay:
    """On a Ray of this machine with 4 CPUs."""

    def test_a_sound_set_up_passes_and_leaves_nothing_behind(
        self, builtin_shards: Path, tmp_path: Path, recipe_of, capsys: pytest.CaptureFixture[str]
    ):
        preflight(recipe_of(builtin_shards, tmp_path / "runs", **VALIDATED))
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert {row[1] for row in rows if row[0] == "passed"} >= {
            *("shards", "networks", "batch", "cluster", "nodes", "disk", "network"),
        }
        assert not [row for row in rows if row[0] == "failed"]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"cluster__gpu": "yes"}, "room for 0 workers of {'CPU': 1.0, 'GPU': 1.0}, and 2 are needed"),
            (
                VALIDATED | {"cluster__gpu": "yes", "validation__resources": {"GPU": 1.0, "CPU": 1.0}},
                "To use CPUs alone: --cluster.gpu no --validation.resources.GPU 0. Lower",
            ),
            (VALIDATED | {"cluster__workers": 4}, "set validation.every to 0"),
            ({"cluster__cpus_per_worker": 5}, "nodes have 4 CPU and 0 GPU. Lower"),
        ],
        ids=["gpu", "both gpus", "validation", "cpus"],
    )
    def test_what_the_cluster_or_the_disk_lacks_is_said(
        self, changes: dict, says: str, builtin_shards: Path, tmp_path: Path, recipe_of, capsys
    ):
        with pytest.raises(UserError) as raised:
            preflight(recipe_of(builtin_shards, tmp_path, **changes))
        assert raised.value.code == "preflight"
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
        assert any(says in line for line in failed), failed

    def test_training_does_not_start_if_the_disk_is_too_small(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        recipe = recipe_of(builtin_shards, tmp_path, train__keep_checkpoints=10**9)
        with pytest.raises(UserError, match=r"(?s)the run would fail:\ndisk: .*--no-preflight"):
            launch_training(recipe)
        assert not (tmp_path / "tiny" / "metrics.jsonl").exists()

    def test_training_does_not_start_without_the_compiler_that_it_needs(
        self, builtin_shards: Path, tmp_path: Path, recipe_of, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(UserError, match="train.compile is yes, but there is no C compiler") as raised:
            launch_training(recipe_of(builtin_shards, tmp_path, train__compile="yes"))
        assert raised.value.code == "compile"
        assert not (tmp_path / "tiny" / "recipe.yaml").exists()

    def test_every_node_is_asked_what_a_worker_would_lack(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        (found,) = collect(recipe_of(builtin_shards, tmp_path), gpu=True)
        assert found.lacks.startswith("workers use GPUs, and torch") == (torch.version.cuda is None)

    def test_this_node_has_no_problem(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        (found,) = collect(recipe_of(builtin_shards, tmp_path), Manifest.load(str(builtin_shards)).encoding_hash)
        assert (found.problems, found.resources["CPU"]) == ((), 4)

    def test_a_node_with_gpus_that_nobody_sees_is_named(self, tmp_path: Path):
        (here,) = [node for node in ray.nodes() if node["Alive"]]
        claims = here | {"Resources": {"GPU": 1000.0}}
        (found,) = ask([claims], tmp_path, versions(), "", "")
        assert "Ray counts 1000 GPUs" in found.problems[0]

    def test_a_node_that_fails_says_why(self, tmp_path: Path):
        (here,) = [node for node in ray.nodes() if node["Alive"]]
        (found,) = ask([here], tmp_path, "no versions", "", "")
        assert "A worker there can't run this sora_train" in found.problems[0]

    def test_one_worker_leaves_the_network_unmeasured(self, builtin_shards, tmp_path, recipe_of):
        assert "one worker" in check_allreduce(recipe_of(builtin_shards, tmp_path, cluster__workers=1), False)

    def test_an_all_reduce_that_fails_names_rank_and_node(self):
        if dist.is_nccl_available() and torch.cuda.device_count() > 1:
            pytest.skip("NCCL works here")
        group = placement_group([{"CPU": 1.0}] * 2)
        with pytest.raises(UserError, match=rf"rank 0 on {ray.util.get_node_ip_address()}: .*NCCL_SOCKET_IFNAME"):
            run_ranks(group, {"CPU": 1.0}, 2, "nccl")
        remove_placement_group(group)

    @pytest.mark.slow  # Ray tries for half a minute
    def test_a_wrong_token_is_told(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        save_recipe(recipe_of(builtin_shards, tmp_path), tmp_path / "r.yaml")
        address = ray.get_runtime_context().gcs_address
        words = ["preflight", str(tmp_path / "r.yaml"), "--cluster.address", address]
        done = subprocess.run(
            [sys.executable, "-m", "sora_train.cli", *words],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 1
        (row,) = [line for line in done.stdout.splitlines() if line.startswith("failed  cluster")]
        assert "Is its token" in row
        assert "RAY_AUTH_TOKEN_PATH" in row


def test_a_memory_that_is_no_number_is_refused():
    from sora_train import cli

    with pytest.raises(RecipeError, match="--memory"):
        cli.run("preflight", ["jobs/quickstart.yaml", "--plan", "--memory", "much"])


def test_the_quick_checks_ask_no_node_if_there_is_only_one(
    builtin_shards: Path, tmp_path: Path, recipe_of, local_ray, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_of(builtin_shards, tmp_path, train__batch_size=4, train__micro_batch_size=2)
    manifest = check_shards(recipe)
    check_quickly(recipe, manifest, False)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err
    batch = {"train__batch_size": 5, "train__micro_batch_size": 2}
    odd = recipe_of(builtin_shards, tmp_path, **batch)
    check_quickly(odd, manifest, False)
    said = capsys.readouterr().err
    assert "are padding, which costs as much as clips" in said


def test_a_node_that_left_while_it_was_asked_fails_nothing(
    tmp_path: Path, local_ray, capsys: pytest.CaptureFixture[str]
):
    (here,) = [node for node in ray.nodes() if node["Alive"]]
    gone = here | {"NodeID": here["NodeID"][::-1], "NodeManagerAddress": "192.0.2.1"}
    (found,) = ask([here, gone], tmp_path, versions(), "", "")
    assert (found.address, found.problems) == (here["NodeManagerAddress"], ())
    assert "192.0.2.1 left the cluster" in capsys.readouterr().err


@pytest.mark.ray
def test_a_folder_in_which_another_run_has_begun_stays(builtin_shards: Path, tmp_path: Path, recipe_of, local_ray):
    (tmp_path / "runs" / "other").mkdir(parents=True)
    collect(recipe_of(builtin_shards, tmp_path / "runs"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    collect(recipe_of(builtin_shards, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
