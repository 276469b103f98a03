"""Broken set-ups: each is caught before training starts, with the remedy in its message. What one machine can't stage,
such as another version on another node, is made up as the facts that its node would tell.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

from sora_train.errors import RecipeError, UserError
from sora_train.launch.preflight import node_info
from sora_train.launch.preflight.allreduce import bandwidth, check_allreduce, sums
from sora_train.launch.preflight.gather import ask, gather, shared_folder
from sora_train.launch.preflight.node_info import NodeFacts, parse_gpus
from sora_train.launch.preflight.table import check_disk, check_files, check_memory, check_quickly, planned, preflight
from sora_train.launch.preflight.verdicts import (
    Check,
    judge_allreduce,
    judge_batch,
    judge_clocks,
    judge_code,
    judge_cores,
    judge_disk,
    judge_free,
    judge_memory,
    judge_nodes,
    judge_room,
    judge_shards_everywhere,
    judge_storage,
    judge_versions,
)
from sora_train.launch.preflight.wandb_reach import check_wandb
from sora_train.launch.trainer import launch_training
from sora_train.recipe import Recipe, check, save_recipe

HERE = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8"}
ON_GPU = HERE | {"CUDA": "12.8", "NCCL": "2.27.3"}
VALIDATED = {"validation__every": 4, "validation__prompts": ["a"]}
H100 = ("NVIDIA H100 80GB HBM3", 81559 * 2**20)


def node(number: int, **told: object) -> NodeFacts:
    """A sound node of two GPUs, but for what is told."""
    sound = NodeFacts(
        node=f"id{number}",
        address=f"10.0.0.{number}",
        resources={"CPU": 16.0, "GPU": 2.0},
        versions=ON_GPU,
        code="abc",
        gpus=(H100, H100),
        memory=256 * 2**30,
        free=10**12,
        encoding="e",
    )
    return replace(sound, **told)


def refused(found: Check, *words: str) -> None:
    assert found.state == "failed", found
    for word in words:
        assert word in found.said


def test_sound_nodes_pass():
    nodes = [node(1), node(2), node(3)]
    found = [
        judge_nodes(nodes),
        judge_versions(nodes, HERE),
        judge_code(nodes, "abc"),
        judge_clocks(nodes),
        judge_storage(nodes, "/shared"),
        judge_shards_everywhere(nodes, "e", "/shards"),
    ]
    assert {one.state for one in found} == {"passed"}
    assert "3 nodes, 48 CPUs, 6 GPUs (NVIDIA H100 80GB HBM3)" in found[0].said


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.12.0"), ("python", "3.12.1"), ("ray", "2.59.0"), ("deepspeed", "missing")]
)
def test_another_version_on_a_node_is_named_with_both(name: str, version: str):
    nodes = [node(1), node(2, versions=ON_GPU | {name: version})]
    refused(judge_versions(nodes, HERE), f"10.0.0.2 has {name} {version}", HERE[name], "constraints.txt")


def test_another_nccl_on_a_gpu_node_is_named():
    nodes = [node(1), node(2, versions=ON_GPU | {"NCCL": "2.21.5"})]
    refused(judge_versions(nodes, HERE), "10.0.0.2 has NCCL 2.21.5", "2.27.3")
    decoding = node(3, gpus=(), resources={"CPU": 64.0}, versions=HERE)
    assert judge_versions([node(1), decoding], HERE).state == "passed"  # a node without GPUs needs no CUDA


def test_other_code_on_a_node_is_named():
    refused(judge_code([node(1), node(2, code="def")], "abc"), "10.0.0.2 (def)", "--working-dir")


def test_a_gpu_that_ray_counts_and_the_driver_does_not_see_is_named():
    refused(judge_nodes([node(1), node(2, gpus=(H100,))]), "10.0.0.2: Ray counts 2 GPUs, the driver sees 1")


def test_a_node_that_does_not_answer_is_named():
    refused(judge_nodes([node(1), node(2, problem="no answer in 40 s")]), "10.0.0.2: no answer")


def test_a_clock_that_is_off_is_named():
    refused(judge_clocks([node(1), node(2, clock_s=-7.25)]), "10.0.0.2 by -7.2 s", "chrony")


def test_other_shards_on_a_node_are_named():
    nodes = [node(1), node(2, encoding="other"), node(3, encoding="!no manifest.json in /shards")]
    found = judge_shards_everywhere(nodes, "e", "/shards")
    refused(found, "10.0.0.2: other shards", "10.0.0.3: no manifest.json in /shards", "storage that all")


def test_a_folder_that_is_not_shared_is_found_by_what_its_nodes_write(tmp_path: Path):
    """Two nodes, each with a disk of its own at the same path."""
    nodes = []
    for number in (1, 2):
        folder = tmp_path / str(number) / ".preflight"
        folder.mkdir(parents=True)
        nodes.append(node(number, wrote=node_info.write(folder, f"id{number}")))
    for number in (1, 2):
        unread = node_info.unread(str(tmp_path / str(number) / ".preflight"), ["id1", "id2"], patience_s=0.3)
        nodes[number - 1] = replace(nodes[number - 1], unread=unread)
    refused(judge_storage(nodes, "/runs"), "10.0.0.1 does not see what 10.0.0.2 wrote", "--train.output", "Mount")


def test_a_folder_that_a_node_lacks_or_can_not_write_is_named(tmp_path: Path):
    lacks = node(1, wrote=node_info.write(tmp_path / "none" / ".preflight", "id1"))
    other = node(2, wrote=node_info.write(tmp_path / ".preflight", "id2"))
    (tmp_path / "file").write_text("")
    (tmp_path / ".whole").mkdir()
    (tmp_path / ".whole" / "id3").mkdir()  # where the node's file would be
    full = node(3, wrote=node_info.write(tmp_path / ".whole", "id3"))
    found = judge_storage([lacks, other, full], str(tmp_path))
    refused(found, "10.0.0.1: no folder", "10.0.0.2: ", "another folder there", "10.0.0.3: ", "can't be written")


def test_a_batch_that_does_not_divide_is_told_which_would(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, train__batch_size=16, train__micro_batch_size=3, cluster__workers=4)
    refused(judge_batch(recipe), "8 of 24 places are padding", "train.batch_size 12 or 24", "train.micro_batch_size 2")
    for sizes in ((12, 3), (24, 3)):
        even = {"train__batch_size": sizes[0], "train__micro_batch_size": sizes[1]}
        assert judge_batch(recipe_of(tmp_path, tmp_path, cluster__workers=4, **even)).state == "passed"


def test_more_workers_than_clips_of_a_batch_are_refused_with_the_recipe(recipe_of, tmp_path: Path):
    (sentence,) = check(recipe_of(tmp_path, tmp_path, train__batch_size=4, cluster__workers=5))
    assert "use at most 4 workers" in sentence


def test_too_little_disk_is_told_by_how_much():
    found = judge_disk(free=50 * 10**9, held=0, checkpoint=20 * 10**9, keep=3, output="/runs")
    refused(found, "take 80 GB", "50 GB free, 30 GB too little", "train.keep_checkpoints")
    assert judge_disk(50 * 10**9, 40 * 10**9, 20 * 10**9, 3, "/runs").state == "passed"  # what is there already


def test_checkpoints_that_are_larger_than_this_disk_are_told(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, train__keep_checkpoints=10**9)
    refused(check_disk(recipe), str(tmp_path), "too little: make room")
    assert check_disk(recipe_of(tmp_path, tmp_path)).state == "passed"


def test_a_gpu_too_small_for_the_recipe_is_told_what_would_fit(recipe_of, tmp_path: Path):
    recipe = recipe_of(
        tmp_path, tmp_path, data__height=256, data__width=256, data__frames=16, model__width=1152, model__depth=28,
        model__heads=16, train__batch_size=64, train__micro_batch_size=16,
    )  # fmt: skip
    small = node(2, gpus=(H100, ("NVIDIA A10", 24 * 2**30)))
    refused(check_memory(recipe, True, [node(1), small]), "it has 24 GB", "lower train.micro_batch_size to")


def test_a_machine_with_too_little_memory_for_its_processes_is_named(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path)
    nodes = [node(1, gpus=(), memory=2**30, resources={"CPU": 4.0})]
    refused(judge_memory(recipe, False, planned(recipe), [], nodes), "of a node, by the plan; it has 999 MB")


def test_sums_of_cpus_are_no_room_for_a_worker(recipe_of, tmp_path: Path):
    """Four nodes of 2 CPUs have 8, and no node 4."""
    recipe = recipe_of(tmp_path, tmp_path, cluster__cpus_per_worker=4)
    room = judge_room(recipe, False, [{"CPU": 2.0}] * 4)
    refused(room, "2 workers", "for 0", "cluster.cpus_per_worker", "`ray start --num-cpus 8`")


def test_more_workers_than_this_machine_has_cores_are_named(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__cpus_per_worker=2)
    assert judge_cores(recipe, 4).state == "passed"
    refused(judge_cores(recipe, 3), "2 workers of 2 CPUs on the 3 cores", "set cluster.workers to 1")


def test_no_node_with_room_for_the_validation_is_told(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, **VALIDATED, validation__resources={"GPU": 2.0})
    refused(judge_room(recipe, True, [{"CPU": 8.0, "GPU": 1.0}] * 4), "no node has {'GPU': 2.0}", "validation.every")
    # One node must go to the validation, so that one GPU too few is left.
    small = judge_room(recipe, True, [{"CPU": 8.0, "GPU": 3.0}])
    refused(small, "for 1; with the {'GPU': 2.0}")
    assert "num-cpus" not in small.said
    assert judge_room(recipe, True, [{"CPU": 8.0, "GPU": 2.0}] * 2).state == "passed"


def test_what_another_job_holds_is_not_free():
    need, there = {"GPU": 4.0, "CPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}
    refused(judge_free(need, there, {"CPU": 8.0, "GPU": 1.0}), "free are 1 of 4 GPU", "ray job stop")
    assert judge_free(need, there, there).state == "passed"
    assert judge_free(need, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}).state == "skipped"  # nobody holds what is not there


def test_a_rank_with_a_wrong_sum_is_named():
    refused(judge_allreduce([True, False, True], 20.0, "nccl"), "ranks [1]", "wrong sum")


def test_a_network_that_gpus_would_wait_for_is_refused():
    refused(judge_allreduce([True] * 8, 0.1, "nccl"), "too slow", "NCCL_SOCKET_IFNAME")
    assert judge_allreduce([True] * 8, 40.0, "nccl").state == "passed"


def test_an_all_reduce_of_whole_numbers_is_exact_and_a_ring_moves_twice_its_bytes():
    if not dist.is_initialized():  # all tests of a process share one: DeepSpeed keeps the first
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    exact, seconds = sums(1, 0, 5000, torch.device("cpu"))
    assert exact
    assert seconds > 0
    assert bandwidth(2, 10**9, 1.0) == 1.0
    assert bandwidth(64, 10**9, 1.0) == pytest.approx(2, rel=0.02)


def test_nvidia_smi_is_read():
    said = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA A10, 23028\n\n[N/A], [N/A]\n"
    assert parse_gpus(said) == (H100, ("NVIDIA A10", 23028 * 2**20))


class Wandb(BaseHTTPRequestHandler):
    """Knows the key `good`; leads `astray` to another host."""

    def do_POST(self) -> None:
        import base64

        key = base64.b64decode(self.headers["Authorization"].split()[1]).decode().partition(":")[2]
        self.rfile.read(int(self.headers["Content-Length"]))
        if key == "astray":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        viewer = {"username": "somebody"} if key == "good" else None
        self.wfile.write(json.dumps({"data": {"viewer": viewer}}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def wandb_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key of the machine's own may lie
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Wandb) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield os.environ["WANDB_BASE_URL"]
        server.shutdown()


def test_wandb_without_a_key_with_a_wrong_one_or_out_of_reach_is_told(wandb_host: str, monkeypatch: pytest.MonkeyPatch):
    refused(check_wandb("online"), "no API key", "WANDB_API_KEY", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "stale")
    refused(check_wandb("online"), "does not know the API key", wandb_host)
    monkeypatch.setenv("WANDB_API_KEY", "astray")
    refused(check_wandb("online"), "answers 302")
    monkeypatch.setenv("WANDB_API_KEY", "good")
    assert check_wandb("online").state == "passed"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    refused(check_wandb("online"), "can't be reached", "offline")
    assert check_wandb("off").state == check_wandb("offline").state == "passed"


def files(recipe: Recipe) -> dict[str, Check]:
    found: list[Check] = []
    check_files(recipe, found.append)
    return {one.name: one for one in found}


def test_shards_that_are_absent_of_another_recipe_or_cut_short_are_rows_of_the_table(
    builtin_shards: Path, tmp_path: Path, recipe_of
):
    assert {one.state for one in files(recipe_of(builtin_shards, tmp_path)).values()} == {"passed"}
    refused(files(recipe_of(tmp_path / "none", tmp_path))["shards"], "no manifest.json", "sora prep")
    other = files(recipe_of(builtin_shards, tmp_path, data__frames=9, model__text_width=7))
    refused(other["shards"], "text_width is 7", "hold 2x32x32")
    cut = tmp_path / "cut"
    shutil.copytree(builtin_shards, cut)
    (part,) = cut.glob("bucket=*/*.parquet")
    part.write_bytes(part.read_bytes()[:-100])
    refused(files(recipe_of(cut, tmp_path))["shards"], str(part), "run `sora prep` again")


def test_networks_that_did_not_make_the_shards_are_a_row(builtin_shards: Path, tmp_path: Path, recipe_of):
    found = files(recipe_of(builtin_shards, tmp_path, codec__vae=str(tmp_path / "none")))
    refused(found["networks"], "codec.vae")


def test_a_place_that_can_not_hold_runs_is_a_row(builtin_shards: Path, tmp_path: Path, recipe_of):
    (tmp_path / "file").write_text("")
    refused(files(recipe_of(builtin_shards, tmp_path / "file"))["run folder"], "--train.output")
    refused(files(recipe_of(builtin_shards, tmp_path, train__output="s3://b/runs"))["paths"], "is remote")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestWithRay:
    """On a Ray of this machine with 4 CPUs."""

    def test_a_sound_set_up_passes_every_check_and_leaves_nothing_behind(
        self, builtin_shards: Path, tmp_path: Path, recipe_of, capsys: pytest.CaptureFixture[str]
    ):
        preflight(recipe_of(builtin_shards, tmp_path / "runs", **VALIDATED))
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert {row[1] for row in rows if row[0] == "passed"} >= {
            *("shards", "networks", "batch", "cluster", "room", "free", "nodes", "versions", "code", "clocks"),
            *("storage", "disk", "memory", "network", "wandb"),
        }
        assert not [row for row in rows if row[0] in ("failed", "skipped")]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"cluster__gpu": "yes"}, "need 2 GPU (it has 0)"),
            (VALIDATED | {"cluster__workers": 4}, "set validation.every to 0"),
            ({"cluster__cpus_per_worker": 5}, "need 10 CPU (it has 4)"),
        ],
        ids=["gpu", "validation", "cpus"],
    )
    def test_what_the_cluster_or_the_disk_lacks_is_said(
        self, changes: dict, says: str, builtin_shards: Path, tmp_path: Path, recipe_of, capsys
    ):
        with pytest.raises(UserError, match=r"checks failed"):
            preflight(recipe_of(builtin_shards, tmp_path, **changes))
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
        assert any(says in line for line in failed), failed

    def test_training_is_not_started_where_the_disk_is_too_small_unless_told_to(
        self, builtin_shards: Path, tmp_path: Path, recipe_of
    ):
        recipe = recipe_of(builtin_shards, tmp_path, train__keep_checkpoints=10**9)
        with pytest.raises(UserError, match=r"(?s)the run would fail:\ndisk: .*--no-preflight"):
            launch_training(recipe)
        assert not (tmp_path / "tiny" / "metrics.jsonl").exists()

    def test_facts_of_this_node_are_its_own(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        (found,) = gather(recipe_of(builtin_shards, tmp_path), ray.nodes())
        assert (found.problem, found.wrote, found.unread) == ("", "", ())
        assert found.code == node_info.code_hash()
        assert found.versions == node_info.versions()
        assert abs(found.clock_s) < 1

    def test_a_node_that_raises_or_is_not_there_is_an_answer_in_words(self, tmp_path: Path):
        (here,) = [one["NodeID"] for one in ray.nodes()]
        nobody = "e" * len(here)
        answers = ask(shutil.copyfile, {here: (f"{tmp_path}/no/such", f"{tmp_path}/none"), nobody: ("a", "b")}, 5.0)
        assert "No such file" in str(answers[here])
        assert isinstance(answers[nobody], Exception)

    def test_workers_that_hold_all_there_is_leave_the_network_unmeasured(self, builtin_shards, tmp_path, recipe_of):
        found = check_allreduce(recipe_of(builtin_shards, tmp_path, cluster__workers=1), False)
        assert found.state == "skipped"

    @pytest.mark.slow  # Ray tries for half a minute
    def test_another_token_than_the_cluster_s_is_told(self, builtin_shards: Path, tmp_path: Path, recipe_of):
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
        assert "is its token this process's own?" in row
        assert "RAY_AUTH_TOKEN_PATH" in row


def test_a_plan_that_is_no_number_is_refused():
    from sora_train import cli

    with pytest.raises(RecipeError, match="--memory"):
        cli.run("preflight", ["jobs/quickstart.yaml", "--plan", "--memory", "much"])


def test_the_quick_part_asks_no_node_where_there_is_one(
    builtin_shards: Path, tmp_path: Path, recipe_of, local_ray, capsys: pytest.CaptureFixture[str]
):
    from sora_train.launch.checks import check_shards

    recipe = recipe_of(builtin_shards, tmp_path, train__batch_size=4, train__micro_batch_size=2)
    manifest, disk = check_shards(recipe), check_disk(recipe)
    check_quickly(recipe, manifest, False, disk, own=False)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err
    batch = {"train__batch_size": 5, "train__micro_batch_size": 2}
    odd = recipe_of(builtin_shards, tmp_path, **batch, cluster__cpus_per_worker=1000)
    check_quickly(odd, manifest, False, disk, own=True)
    said = capsys.readouterr().err
    assert "are padding, which costs as much as clips" in said
    assert "2 workers of 1000 CPUs on the" in said


def test_a_node_that_left_while_it_was_asked_fails_nothing(
    builtin_shards: Path, tmp_path: Path, recipe_of, local_ray, capsys: pytest.CaptureFixture[str]
):
    (here,) = [node for node in ray.nodes() if node["Alive"]]
    gone = here | {"NodeID": here["NodeID"][::-1], "NodeManagerAddress": "192.0.2.1"}
    (found,) = gather(recipe_of(builtin_shards, tmp_path), [here, gone])
    assert (found.node, found.problem) == (here["NodeID"], "")
    assert "192.0.2.1 left the cluster" in capsys.readouterr().err


def test_a_folder_in_which_another_run_has_begun_meanwhile_stays(tmp_path: Path):
    with shared_folder(tmp_path / "runs"):
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    with shared_folder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
