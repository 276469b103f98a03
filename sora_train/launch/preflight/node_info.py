"""What each node of the cluster has and sees, collected by one Ray task a node.

The task's function is pickled by name, so a node imports the sora_train that a training worker there would import.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sora_train.errors import UserError
from sora_train.launch.checks import check_worker
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.provenance import package_versions
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe

PACKAGES = ("torch", "ray", "deepspeed")
ANSWER_S = 40.0
"""How long a node's answer may take; it may have to import torch."""
FILE_DELAY_S = 5.0
"""How long a network file system may hide a new file from other nodes."""


INSTALL = (
    ". Install the same versions there (pip install -c constraints.txt) and restart Ray; `ray job submit --working-dir "
    ".` brings this sora_train to all nodes"
)
MOUNT = ". Mount the same shared folder (NFS, Lustre, a volume) at this path on every node, or set another one"


@dataclass(frozen=True)
class NodeInfo:
    """One node's hardware, and what is wrong with it."""

    address: str = ""
    resources: dict[str, float] = field(default_factory=dict)
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and bytes of each GPU that the node's driver lists."""
    problems: tuple[str, ...] = ()
    """What differs from this machine or is missing, each with what to do."""
    lacks: str = ""
    """What a worker there would lack."""


def collect(recipe: Recipe, encoding: str = "", gpu: bool | None = None) -> list[NodeInfo]:
    """Asks all nodes at once. They must read the shards of `encoding`, if given, and share `train.output`.

    `gpu` is whether workers use GPUs; None: what workers need is not asked.

    A node that leaves the cluster meanwhile is only a warning.
    """
    output = Path(recipe.train.output)
    created, folder = not output.exists(), output / f".preflight-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        worker = None if gpu is None else (recipe.train, bool(recipe.lora.rank), gpu)
        return ask(alive, folder, versions(), recipe.data.output, encoding, worker)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created:
            with suppress(OSError):  # another run has started in it meanwhile
                output.rmdir()


def ask(nodes: list[dict[str, Any]], folder: Path, *expected: Any) -> list[NodeInfo]:
    """Runs `describe_node` on nodes, as `ray.nodes()` gives them, with what it expects."""
    tasks = [
        ray.remote(describe_node)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(id_, soft=False))
        .remote(folder / id_, *expected)
        for id_ in (node["NodeID"] for node in nodes)
    ]
    done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_S)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    ends = time.monotonic() + FILE_DELAY_S  # for all nodes together: a thousand may not share the folder
    found: list[NodeInfo] = []
    for node, task in zip(nodes, tasks, strict=True):
        answer, address, resources = NodeInfo(), node["NodeManagerAddress"], node["Resources"]
        if node["NodeID"] not in alive:
            log.warning(f"{address} left the cluster during preflight")
            continue
        try:
            if task not in done:
                raise TimeoutError(f"no answer in {ANSWER_S:g} s; restart Ray there, or remove the node")
            answer, problem = ray.get(task), ""
            if not appears(folder / node["NodeID"], ends):
                problem = f"files that it writes into {folder.parent} are not visible here{MOUNT}"
            elif (counted := int(resources.get("GPU", 0))) > len(answer.gpus):
                problem = (
                    f"Ray counts {counted} GPUs, the driver sees {len(answer.gpus)} (nvidia-smi). Fix the driver or "
                    "the container there, or set --num-gpus of `ray start`"
                )
        except Exception as error:
            problem = f"{root_cause(error)}. A worker there can't run this sora_train{INSTALL}"
        problems = (*answer.problems, problem) if problem and not answer.problems else answer.problems
        found.append(replace(answer, address=address, resources=resources, problems=problems))
    return found


def describe_node(
    file: Path, expected: dict[str, str], shards: str, encoding: str, worker: tuple[Any, ...] | None = None
) -> NodeInfo:
    """Describes the machine that this runs on, and writes `file` into the folder that the driver made.

    `worker` has the arguments of `check_worker`.
    """
    there = versions()
    problems = [
        f"{name} is {there[name]} there and {value} here{INSTALL}"
        for name, value in expected.items()
        if there[name] != value and not (name == "CUDA" and "none" in (there[name], value))
    ]
    try:
        if not appears(file.parent):
            raise FileNotFoundError(f"{file.parent.parent} is missing, or is another folder")
        file.touch()
    except OSError as error:
        problems.append(f"train.output {file.parent.parent} can't be written there: {error}{MOUNT}")
    try:
        if encoding and (found := Manifest.load(shards).encoding_hash) != encoding:
            raise UserError(f"their encoding is {found} there and {encoding} here", code="shards")
    except (UserError, OSError) as error:
        problems.append(f"data.output {shards} does not hold the same shards: {error}{MOUNT}")
    lacks = ""
    try:
        if worker is not None:
            check_worker(*worker)
    except UserError as error:
        lacks = str(error)
    return NodeInfo(gpus=list_gpus(), problems=tuple(problems), lacks=lacks)


def versions() -> dict[str, str]:
    """Everything that must be the same on all ranks."""
    import torch

    installed = package_versions(PACKAGES)
    found = {name: installed.get(name, "missing").partition("+")[0] for name in PACKAGES}  # without `+cpu`
    cuda = torch.version.cuda or "none"
    return {"python": platform.python_version(), "sora_train": source_hash(), **found, "CUDA": cuda}


def source_hash() -> str:
    """Hash of both packages' source files. Ranks that run different code may wait for each other forever."""
    root, digest = Path(__file__).parents[3], hashlib.sha256()
    for package in ("data_prep", "sora_train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def list_gpus() -> tuple[tuple[str, int], ...]:
    """GPUs by nvidia-smi: a task that has no GPU of its own sees none through CUDA."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        return parse_gpus(subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout)
    except (OSError, subprocess.SubprocessError):
        return ()


def parse_gpus(output: str) -> tuple[tuple[str, int], ...]:
    """Name and bytes from lines such as `NVIDIA H100 80GB HBM3, 81559`."""
    rows = [line.rpartition(",") for line in output.splitlines()]
    return tuple((name.strip(), int(mib) * 2**20) for name, _, mib in rows if mib.strip().isdigit())


def appears(path: Path, ends: float | None = None) -> bool:
    """Whether a path exists, or does until `ends` (monotonic time), by default `FILE_DELAY_S` from now."""
    ends = time.monotonic() + FILE_DELAY_S if ends is None else ends
    while not path.exists() and time.monotonic() < ends:
        with suppress(OSError):
            os.listdir(path.parent)  # has NFS ask the server again
        time.sleep(0.2)
    return path.exists()
