"""Broken set-ups are caught before training starts, with the remedy in the message.

What one machine can't stage, such as another version on another node, is given as the `NodeInfo` of such a node.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group

from sora_train.errors import RecipeError, UserError
from sora_train.launch.checks import check_shards, count_workers
from sora_train.launch.preflight import node_info, table, verdicts
from sora_train.launch.preflight.allreduce import bandwidth, check_allreduce, run_ranks, time_sums
from sora_train.launch.preflight.node_info import NodeInfo, ask, collect, parse_gpus, probe_folder, write_file
from sora_train.launch.preflight.table import Table, check_files, check_quickly, preflight
from sora_train.launch.preflight.verdicts import Skip
from sora_train.launch.trainer import launch_training
from sora_train.recipe import check, save_recipe

HERE = {"python": "3.11.7", "sora_train": "abc", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8"}
ON_GPU = HERE | {"CUDA": "12.8", "NCCL": "2.27.3"}
VALIDATED = {"validation__every": 4, "validation__prompts": ["a"]}
GOOD_KEY = "9" * 40
H100 = ("NVIDIA H100 80GB HBM3", 81559 * 2**20)


def node(number: int, **changes: object) -> NodeInfo:
    """A sound node of two GPUs, except for `changes`."""
    sound = NodeInfo(
        id=f"id{number}",
        address=f"10.0.0.{number}",
        resources={"CPU": 16.0, "GPU": 2.0},
        versions=ON_GPU,
        gpus=(H100, H100),
        memory=256 * 2**30,
        encoding="e",
    )
    return replace(sound, **changes)


def fails(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as raised:
        act()
    assert not [word for word in words if word not in str(raised.value)], raised.value


def test_sound_nodes_pass():
    nodes = [node(1), node(2), node(3)]
    assert verdicts.check_nodes(nodes) == "3 nodes, 48 CPUs, 6 GPUs (NVIDIA H100 80GB HBM3)"
    verdicts.check_versions(nodes, HERE)
    verdicts.check_clocks(nodes)
    verdicts.check_storage(nodes, "/shared")
    verdicts.check_shards_match(nodes, "e", "/shards")


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.12.0"), ("python", "3.12.1"), ("deepspeed", "missing"), ("sora_train", "def"), ("NCCL", "2.21.5")],
)
def test_another_version_on_a_node_is_named_with_both(name: str, version: str):
    nodes = [node(1), node(2, versions=ON_GPU | {name: version})]
    words = f"10.0.0.2 has {name} {version}, others have {ON_GPU[name]}", "constraints.txt", "--working-dir"
    fails(lambda: verdicts.check_versions(nodes, HERE), *words)


def test_a_node_without_gpus_needs_no_cuda():
    decoding = node(3, gpus=(), resources={"CPU": 64.0}, versions=HERE)
    verdicts.check_versions([node(1), decoding], ON_GPU)


def test_a_gpu_that_the_driver_does_not_see_is_named():
    nodes = [node(1), node(2, gpus=(H100,))]
    fails(lambda: verdicts.check_nodes(nodes), "10.0.0.2: Ray counts 2 GPUs, the driver sees 1")


def test_a_node_that_does_not_answer_is_named():
    fails(lambda: verdicts.check_nodes([node(1), node(2, error="no answer in 40 s")]), "10.0.0.2: no answer")


def test_a_clock_that_is_off_is_named():
    fails(lambda: verdicts.check_clocks([node(1), node(2, clock_s=-7.25)]), "10.0.0.2 by -7.2 s", "chrony")


def test_other_shards_on_a_node_are_named():
    nodes = [node(1), node(2, encoding="other"), node(3, encoding="!no manifest.json in /shards")]
    words = "10.0.0.2: other shards", "10.0.0.3: no manifest.json in /shards"
    fails(lambda: verdicts.check_shards_match(nodes, "e", "/shards"), *words)


def test_a_folder_that_a_node_lacks_or_can_not_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_info, "FILE_DELAY_S", 0.3)
    lacks = node(1, write_error=write_file(tmp_path / "none" / ".preflight", "id1"))
    other = node(2, write_error=write_file(tmp_path / ".preflight", "id2"))
    (tmp_path / ".there" / "id3").mkdir(parents=True)  # where the node's file would be
    full = node(3, write_error=write_file(tmp_path / ".there", "id3"))
    words = "10.0.0.1: no folder", "10.0.0.2: ", "another folder there", "10.0.0.3: ", "can't be written", "Mount"
    fails(lambda: verdicts.check_storage([lacks, other, full], str(tmp_path)), *words)
    assert write_file(tmp_path / ".there", "id4") == ""


def test_a_batch_that_does_not_divide_is_told_which_would(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, train__batch_size=16, train__micro_batch_size=3, cluster__workers=4)
    words = "8 of 24 slots are padding", "train.batch_size 12 or 24", "train.micro_batch_size 2"
    fails(lambda: verdicts.check_batch(recipe), *words)
    for size in (12, 24):
        even = {"train__batch_size": size, "train__micro_batch_size": 3}
        verdicts.check_batch(recipe_of(tmp_path, tmp_path, cluster__workers=4, **even))


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
    small = node(2, gpus=(H100, ("NVIDIA A10", 24 * 2**30)))
    words = "24 GB are usable", "lower train.micro_batch_size to"
    fails(lambda: verdicts.check_memory(recipe, True, [node(1), small]), *words)
    for nodes in ([], [node(1, gpus=())]):
        with pytest.raises(Skip):
            verdicts.check_memory(recipe, True, nodes)


def test_a_node_with_too_little_memory_is_named(recipe_of, tmp_path: Path):
    nodes = [node(1, gpus=(), memory=2**30, resources={"CPU": 4.0})]
    words = "of a node by the plan; 999 MB are usable"
    fails(lambda: verdicts.check_memory(recipe_of(tmp_path, tmp_path), False, nodes), words)


def test_a_sum_of_cpus_is_no_room_for_a_worker(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__cpus_per_worker=4)
    assert count_workers(recipe, False, [{"CPU": 2.0}] * 4) == 0
    assert count_workers(recipe, False, [{"CPU": 9.0}, {"CPU": 2.0}, {"CPU": 4.0}]) == 3


def test_more_workers_than_this_machine_has_cores_are_named(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, cluster__cpus_per_worker=2)
    verdicts.check_cores(recipe, 4)
    words = "2 workers of 2 CPUs on the 3 cores", "Set cluster.workers to 1"
    fails(lambda: verdicts.check_cores(recipe, 3), *words)


def test_a_validation_takes_the_room_of_as_few_workers_as_it_can(recipe_of, tmp_path: Path):
    recipe = recipe_of(tmp_path, tmp_path, **VALIDATED, validation__resources={"GPU": 2.0})
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 1.0}] * 4) == 0
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 3.0}]) == 1
    assert count_workers(recipe, True, [{"CPU": 8.0, "GPU": 2.0}] * 2) == 2
    assert count_workers(recipe, True, [{"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 8.0}]) == 9


def test_an_all_reduce_is_exact_and_a_ring_moves_twice_its_bytes():
    if not dist.is_initialized():  # all tests of a process share one: DeepSpeed keeps the first
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    exact, seconds = time_sums(1, 0, 5000, torch.device("cpu"))
    assert exact
    assert seconds > 0
    assert bandwidth(2, 10**9, 1.0) == 1.0
    assert bandwidth(64, 10**9, 1.0) == pytest.approx(2, rel=0.02)


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


class Wandb(BaseHTTPRequestHandler):
    """Knows one key."""

    def do_POST(self) -> None:
        key = base64.b64decode(self.headers.get("Authorization", "Basic ").split()[1]).decode().partition(":")[2]
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        user = {"id": "1", "username": "somebody", "name": "s", "email": "e", "flags": "{}", "admin": False}
        nothing = {"entity": "e", "teams": {"edges": []}, "apiKeys": {"edges": []}, "userEntity": None}
        viewer = user | nothing | {"deletedAt": None} if key == GOOD_KEY else None
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


def test_a_wandb_key_that_lacks_or_is_unknown_is_told(wandb_host: str, monkeypatch: pytest.MonkeyPatch):
    fails(table.check_wandb, "No API key", "WANDB_API_KEY", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    fails(table.check_wandb, "invalid credentials", wandb_host)
    monkeypatch.setenv("WANDB_API_KEY", GOOD_KEY)
    assert table.check_wandb() == "logged in as somebody"


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
            *("shards", "networks", "batch", "cluster", "nodes", "versions", "clocks"),
            *("storage", "disk", "memory", "network"),
        }
        assert not [row for row in rows if row[0] in ("failed", "skipped")]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"cluster__gpu": "yes"}, "room for 0 workers of {'CPU': 1.0, 'GPU': 1.0}, and 2 are needed"),
            (VALIDATED | {"cluster__workers": 4}, "set validation.every to 0"),
            ({"cluster__cpus_per_worker": 5}, "nodes have 4 CPU. Lower"),
        ],
        ids=["gpu", "validation", "cpus"],
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

    def test_the_info_of_this_node_is_its_own(self, builtin_shards: Path, tmp_path: Path, recipe_of):
        (found,) = collect(recipe_of(builtin_shards, tmp_path), ray.nodes())
        assert (found.error, found.write_error) == ("", "")
        assert found.versions == node_info.versions()
        assert abs(found.clock_s) < 1

    def test_a_node_that_fails_gives_an_exception_as_its_answer(self, tmp_path: Path):
        (here,) = [one["NodeID"] for one in ray.nodes()]
        nobody = "e" * len(here)
        answers = ask(shutil.copyfile, {here: (f"{tmp_path}/no/such", f"{tmp_path}/none"), nobody: ("a", "b")}, 5.0)
        assert "No such file" in str(answers[here])
        assert isinstance(answers[nobody], Exception)

    def test_one_worker_leaves_the_network_unmeasured(self, builtin_shards, tmp_path, recipe_of):
        with pytest.raises(Skip, match="one worker"):
            check_allreduce(recipe_of(builtin_shards, tmp_path, cluster__workers=1), False)

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
    check_quickly(recipe, manifest, False, own=False)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err
    batch = {"train__batch_size": 5, "train__micro_batch_size": 2}
    odd = recipe_of(builtin_shards, tmp_path, **batch, cluster__cpus_per_worker=1000)
    check_quickly(odd, manifest, False, own=True)
    said = capsys.readouterr().err
    assert "are padding, which costs as much as clips" in said
    assert "2 workers of 1000 CPUs on the" in said


def test_a_node_that_left_while_it_was_asked_fails_nothing(
    builtin_shards: Path, tmp_path: Path, recipe_of, local_ray, capsys: pytest.CaptureFixture[str]
):
    (here,) = [node for node in ray.nodes() if node["Alive"]]
    gone = here | {"NodeID": here["NodeID"][::-1], "NodeManagerAddress": "192.0.2.1"}
    (found,) = collect(recipe_of(builtin_shards, tmp_path), [here, gone])
    assert (found.id, found.error) == (here["NodeID"], "")
    assert "192.0.2.1 left the cluster" in capsys.readouterr().err


def test_a_folder_in_which_another_run_has_begun_meanwhile_stays(tmp_path: Path):
    with probe_folder(tmp_path / "runs"):
        (tmp_path / "runs" / "other").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    with probe_folder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
