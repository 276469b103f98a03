"""What a node is and sees, for `preflight`: plain functions, which Ray runs on every node.

They are pickled by name, so that a node imports them from the sora_train that a worker there would import.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.provenance import package_versions
from sora_train.storage import free_bytes

PACKAGES = ("torch", "ray", "deepspeed")
PATIENCE_S = 5.0  # for a file to be seen on another node: network file systems remember what was not there


@dataclass(frozen=True)
class NodeFacts:
    """One node, by itself; `problem` says why nothing is known of it."""

    node: str
    """Ray's id of it."""
    address: str
    resources: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, packages, CUDA and NCCL, by name."""
    code: str = ""
    """Hash of the source of sora_train and data_prep that is imported there."""
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and bytes of every GPU that the driver of the node sees."""
    memory: int = 0
    """Bytes of the machine's memory."""
    free: int = 0
    """Bytes on the disk of the run's folder."""
    encoding: str = ""
    """The shards' encoding hash as read there, or why they can't be read, after `!`."""
    wrote: str = ""
    """Why the node could not write into the run's folder; empty where it could."""
    unread: tuple[str, ...] = ()
    """Files of other nodes that it does not see."""
    clock_s: float = 0.0
    """By how many seconds at least its clock is off the driver's."""
    problem: str = ""


def look(node: str, address: str, folder: str, shards: str) -> NodeFacts:
    """Of the machine that this runs on; writes a file into `folder`, where it is there, for others to read."""
    return NodeFacts(
        node=node,
        address=address,
        versions=versions(),
        code=code_hash(),
        gpus=gpus(),
        memory=psutil.virtual_memory().total,
        free=free_bytes(folder),
        encoding=encoding(shards),
        wrote=write(Path(folder), node),
    )


def versions() -> dict[str, str]:
    """Of what ranks must have alike."""
    import torch

    found, installed = {"python": platform.python_version()}, package_versions(PACKAGES)
    for name in PACKAGES:
        found[name] = installed.get(name, "missing").partition("+")[0]  # without `+cpu` or `+cu128`
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        if torch.distributed.is_nccl_available():
            from torch.cuda import nccl

            found["NCCL"] = ".".join(map(str, nccl.version()))
    return found


def code_hash() -> str:
    """Hash over the source of both packages: of two nodes with different code some rank would wait for ever."""
    root, digest = Path(__file__).parents[3], hashlib.sha256()
    for package in ("data_prep", "sora_train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gpus() -> tuple[tuple[str, int], ...]:
    """As NVIDIA's driver lists them: a task without a GPU of its own sees none through CUDA."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(said)


def parse_gpus(said: str) -> tuple[tuple[str, int], ...]:
    """Name and bytes from lines such as `NVIDIA H100 80GB HBM3, 81559`."""
    rows = [line.rpartition(",") for line in said.splitlines() if "," in line]
    return tuple((name.strip(), int(mib) * 2**20) for name, _, mib in rows if mib.strip().isdigit())


def encoding(shards: str) -> str:
    """The encoding hash in a shard folder's manifest, or `!` and why it can't be read."""
    try:
        return Manifest.load(shards).encoding_hash
    except (UserError, OSError) as error:
        return f"!{error}"


def write(folder: Path, node: str) -> str:
    """Leaves this node's file in a folder that the driver made; returns why that failed, or an empty string."""
    if not folder.parent.is_dir():
        return f"no folder {folder.parent} there"
    if not seen(folder):
        return f"{folder.parent} is another folder there"
    try:
        (folder / node).write_text(node, encoding="utf-8")
    except OSError as error:
        return f"{folder.parent} can't be written: {error.strerror or error}"
    return ""


def unread(folder: str, nodes: list[str], patience_s: float = PATIENCE_S) -> tuple[str, ...]:
    """Those nodes whose files can't be read here with what they must hold."""

    def reads(node: str) -> bool:
        path = Path(folder) / node
        return seen(path, patience_s) and path.read_text(encoding="utf-8") == node

    return tuple(node for node in nodes if not reads(node))


def seen(path: Path, patience_s: float = PATIENCE_S) -> bool:
    """Whether a path comes to be seen within so many seconds."""
    ends = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > ends:
            return False
        if path.parent.is_dir():
            os.listdir(path.parent)  # has NFS look again
        time.sleep(0.2)
    return True


def now() -> float:
    """The node's clock."""
    return time.time()
