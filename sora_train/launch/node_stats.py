"""CPU, RAM, disk and GPU use of every node, for wandb: read from the metrics endpoint of Ray's agent on each node.

wandb's own system metrics cover the driver's machine only. The driver asks over HTTP, which costs the training nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import ray

EVERY_S, TIMEOUT_S = 15.0, 2.0
MAX_NODES = 32  # wandb would draw thousands of curves; Ray's own metrics have all nodes
MAX_BYTES = 8 * 2**20
KEYS = {
    "ray_node_cpu_utilization": ("cpu", 1.0),
    "ray_node_mem_used": ("memory_gb", 1e-9),
    "ray_node_disk_utilization_percentage": ("disk", 1.0),
    "ray_node_gpus_utilization": ("gpu", 1.0),
    "ray_node_gram_used": ("gpu_memory_gb", 2**20 / 1e9),  # documented as bytes, reported in MiB
}
"""Ray's name -> our name and the factor to percent or 10⁹ bytes."""
LINE = re.compile(r"(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
GPU = re.compile(r'GpuIndex="(\d+)"')


class NodeStats:
    """Reads all nodes, at most every `EVERY_S`."""

    def __init__(self) -> None:
        self.read_at = float("-inf")

    def read(self) -> dict[str, float]:
        """`node/HOST/cpu`, `memory_gb`, `disk`, and of each GPU `gpu0`, `gpu0_memory_gb`.

        Empty if it is too early. A node that does not answer is left out. Never raises.
        """
        if time.monotonic() - self.read_at < EVERY_S:
            return {}
        self.read_at = time.monotonic()
        with contextlib.suppress(Exception):  # must never cost a training
            return read_nodes() if ray.is_initialized() else {}
        return {}


def read_nodes() -> dict[str, float]:
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=node_name)[:MAX_NODES]
    names = [node_name(node) for node in nodes]
    if len(set(names)) < len(names):  # several Ray nodes on one machine
        names = [f"{name}-{node['NodeManagerPort']}" for name, node in zip(names, nodes, strict=True)]
    with ThreadPoolExecutor(max_workers=len(nodes) or 1) as pool:
        found = dict(zip(names, pool.map(fetch_metrics, nodes), strict=True))
    return {f"node/{name}/{key}": value for name, text in found.items() for key, value in parse_metrics(text).items()}


def node_name(node: dict) -> str:
    return str(node["NodeManagerHostname"] or node["NodeManagerAddress"]).replace("/", "_")


def fetch_metrics(node: dict) -> str:
    """The node's metrics as Prometheus text; empty if it does not answer."""
    address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
    host = f"[{address}]" if ":" in address else address
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=TIMEOUT_S) as answer:
            return answer.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def parse_metrics(text: str) -> dict[str, float]:
    """The values of `KEYS` under our names."""
    found: dict[str, float] = {}
    for name, tags, value in LINE.findall(text):
        if name in KEYS:
            key, scale = KEYS[name]
            gpu = GPU.search(tags)
            found[key.replace("gpu", f"gpu{gpu[1]}", 1) if gpu else key] = float(value) * scale
    return found
