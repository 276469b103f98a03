"""What a run ran on, for `environment.json`: versions, commit, hardware."""

from __future__ import annotations

import os
import platform
from typing import Any

import ray

from sora_train.provenance import git_commit, package_versions

PACKAGES = ("sora_train", "torch", "ray", "deepspeed", "diffusers", "transformers", "pyarrow", "numpy", "wandb")


def environment() -> dict[str, Any]:
    """Versions and hardware of the driver's machine and of the cluster that it is connected to."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "commit": git_commit() or None,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nodes": [
            {"address": node["NodeManagerAddress"], **node["Resources"]} for node in ray.nodes() if node["Alive"]
        ],
    }
