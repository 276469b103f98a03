"""What each node of the cluster has and sees, collected by one Ray task a node.

The tasks' functions are pickled by name, so a node imports the sora_train that a training worker there would import.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sora_train.errors import UserError
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.provenance import package_versions
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe

T = TypeVar("T")
PACKAGES = ("torch", "ray", "deepspeed")
ANSWER_S = 40.0
"""How long a node's answer may take; it may have to import torch."""
FILE_DELAY_S = 5.0  # network file systems cache that a file does not exist


@dataclass(frozen=True)
class NodeInfo:
    """One node's versions, hardware and view of the storage."""

    id: str
    """Ray's id of the node."""
    address: str
    resources: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, packages, CUDA and NCCL by name; of `sora_train` a hash of the imported source."""
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and bytes of each GPU that the node's driver lists."""
    memory: int = 0
    """Bytes of the node's RAM."""
    encoding: str = ""
    """Encoding hash of the shards as read there; "!" and the reason if they can't be read."""
    write_error: str = ""
    """Why the node does not share `train.output` with this machine, if so."""
    clock_s: float = 0.0
    """Its clock; from `collect` the least difference to this machine's clock in seconds."""
    error: str = ""
    """Why nothing is known of the node, if so."""


def collect(recipe: Recipe, alive: list[dict[str, Any]]) -> list[NodeInfo]:
    """Asks all nodes at once. A node that leaves the cluster meanwhile is reported on stderr and ignored."""
    began, found = time.time(), list[NodeInfo]()
    with probe_folder(Path(recipe.train.output)) as folder:
        given = {node["NodeID"]: (str(folder), node["NodeID"], recipe.data.output) for node in alive}
        answers = ask(describe_node, given, ANSWER_S)
        ended, there = time.time(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in alive:
            key, address, answer = node["NodeID"], node["NodeManagerAddress"], answers[node["NodeID"]]
            if key not in there:
                log.warning(f"{address} left the cluster during preflight")
            elif not isinstance(answer, NodeInfo):
                found.append(NodeInfo(key, address, node["Resources"], error=str(answer)))
            else:
                error = answer.write_error
                if not error and not wait_for(folder / key):
                    error = "files that it writes there are not visible here"
                offset = min(0.0, answer.clock_s - began) + max(0.0, answer.clock_s - ended)
                about = {"address": address, "resources": node["Resources"]}
                found.append(replace(answer, **about, write_error=error, clock_s=offset))
    return found


@contextmanager
def probe_folder(output: Path) -> Iterator[Path]:
    """A temporary folder in `train.output`, for files of each node."""
    created = not output.exists()
    folder = output / f".preflight-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created:
            with suppress(OSError):  # another run has started in it meanwhile
                os.rmdir(output)


def ask(function: Callable[..., T], arguments: dict[str, tuple], timeout_s: float) -> dict[str, T | Exception]:
    """Runs a function on nodes, given by id with its arguments. A node that fails has an exception that says why."""
    tasks = {
        key: ray.remote(function)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False))
        .remote(*given)
        for key, given in arguments.items()
    }
    done, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=timeout_s) if tasks else ([], [])
    answers: dict[str, T | Exception] = {}
    for key, task in tasks.items():
        if task not in done:
            ray.cancel(task, force=True)
            answers[key] = TimeoutError(f"no answer in {timeout_s:g} s. Restart Ray there, or remove the node")
            continue
        try:
            answers[key] = ray.get(task)
        except Exception as error:
            answers[key] = RuntimeError(
                f"{root_cause(error)}. A worker there can't run this sora_train: install it there, or submit with `ray "
                "job submit --working-dir .`"
            )
    return answers


def describe_node(folder: str, node: str, shards: str) -> NodeInfo:
    """Describes the machine that this runs on, and writes a file named `node` into `folder`."""
    return NodeInfo(
        id=node,
        address="",
        versions=versions(),
        gpus=list_gpus(),
        memory=psutil.virtual_memory().total,
        encoding=read_encoding(shards),
        write_error=write_file(Path(folder), node),
        clock_s=time.time(),
    )


def versions() -> dict[str, str]:
    """Everything that must be the same on all ranks."""
    import torch

    found, installed = {"python": platform.python_version(), "sora_train": source_hash()}, package_versions(PACKAGES)
    for name in PACKAGES:
        found[name] = installed.get(name, "missing").partition("+")[0]  # without `+cpu` or `+cu128`
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            from torch.cuda import nccl

            found["NCCL"] = ".".join(map(str, nccl.version()))
    return found


def source_hash() -> str:
    """Hash of both packages' source files. Ranks that run different code may wait for each other for ever."""
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
    rows = [line.rpartition(",") for line in output.splitlines() if "," in line]
    return tuple((name.strip(), int(mib) * 2**20) for name, _, mib in rows if mib.strip().isdigit())


def read_encoding(shards: str) -> str:
    """The encoding hash of the shards' manifest; "!" and the reason if it can't be read."""
    try:
        return Manifest.load(shards).encoding_hash
    except (UserError, OSError) as error:
        return f"!{error}"


def write_file(folder: Path, node: str) -> str:
    """Writes a node's file into the folder that the driver made. Returns why it can't, or an empty string."""
    if not wait_for(folder):
        return f"{folder.parent} is another folder there" if folder.parent.is_dir() else f"no folder {folder.parent}"
    try:
        (folder / node).write_text(node, encoding="utf-8")
    except OSError as error:
        return f"{folder.parent} can't be written: {error.strerror or error}"
    return ""


def wait_for(path: Path) -> bool:
    """Whether a path exists, or does within `FILE_DELAY_S`."""
    ends = time.monotonic() + FILE_DELAY_S
    while not path.exists():
        if time.monotonic() > ends:
            return False
        if path.parent.is_dir():
            os.listdir(path.parent)  # has NFS ask the server again
        time.sleep(0.2)
    return True
