"""What a run ran on: versions, commit, hardware. Goes into `environment.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray

PACKAGES = ("sora_train", "torch", "ray", "deepspeed", "diffusers", "transformers", "pyarrow", "numpy", "wandb")


def environment() -> dict[str, Any]:
    """Of the driver's machine and the cluster that it is connected to."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nodes": [
            {"address": node["NodeManagerAddress"], **node["Resources"]} for node in ray.nodes() if node["Alive"]
        ],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the code is at, `+` where it was changed since; None outside a repository."""
    here = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
