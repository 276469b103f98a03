"""What every node of the cluster is busy with, for wandb: read off the metrics that Ray's agent on each shows anyway.

The driver asks over HTTP, so that it costs the training nothing, and needs no process of its own on any node. Ray
measures with psutil and NVIDIA's library every few seconds; the text is Prometheus'
(https://prometheus.io/docs/instrumenting/exposition_formats).
"""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import ray

EVERY_S, WAIT_S = 15.0, 2.0
MAX_NODES = 32  # beyond them wandb would have thousands of curves; Ray's own metrics have all
MAX_BYTES = 8 * 2**20
KEYS = {
    "ray_node_cpu_utilization": ("cpu", 1.0),
    "ray_node_mem_used": ("memory_gb", 1e-9),
    "ray_node_disk_utilization_percentage": ("disk", 1.0),
    "ray_node_gpus_utilization": ("gpu", 1.0),
    "ray_node_gram_used": ("gpu_memory_gb", 2**20 / 1e9),  # Ray says bytes, and gives mebibytes
}
"""Ray's names, ours, and what one times to get the other: percent and 1e9 bytes."""
LINE = re.compile(r"(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
GPU = re.compile(r'GpuIndex="(\d+)"')


class NodeStats:
    """Asks the nodes that are there, at most every `EVERY_S`; nothing where this process is not connected to Ray."""

    def __init__(self) -> None:
        self.asked_at = float("-inf")

    def read(self) -> dict[str, float]:
        """`node/HOST/cpu`, `…/memory_gb`, `…/disk` and, of each GPU, `…/gpu0` and `…/gpu0_memory_gb`; or nothing where
        it is not yet time. A node that does not answer is left out. Never raises.
        """
        if time.monotonic() - self.asked_at < EVERY_S:
            return {}
        self.asked_at = time.monotonic()
        with contextlib.suppress(Exception):  # whatever goes wrong with figures for wandb must not cost a training
            if ray.is_initialized():
                return read_nodes()
        return {}


def read_nodes() -> dict[str, float]:
    """The figures of all nodes that answer."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=node_name)[:MAX_NODES]
    names = [node_name(node) for node in nodes]
    if len(set(names)) < len(names):  # several raylets of one machine
        names = [f"{name}-{node['NodeManagerPort']}" for name, node in zip(names, nodes, strict=True)]
    with ThreadPoolExecutor(max_workers=len(nodes) or 1) as pool:
        texts = pool.map(fetch_metrics, nodes)
        return {
            f"node/{name}/{key}": value
            for name, text in zip(names, texts, strict=True)
            for key, value in parse_metrics(text).items()
        }


def node_name(node: dict) -> str:
    return str(node["NodeManagerHostname"] or node["NodeManagerAddress"]).replace("/", "_")


def fetch_metrics(node: dict) -> str:
    """What a node's agent shows; nothing where it does not answer."""
    address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
    host = f"[{address}]" if ":" in address else address
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=WAIT_S) as answer:
            return answer.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def parse_metrics(text: str) -> dict[str, float]:
    """A node's figures by our names."""
    found: dict[str, float] = {}
    for name, tags, value in LINE.findall(text):
        if name in KEYS:
            key, scale = KEYS[name]
            gpu = GPU.search(tags)
            found[key.replace("gpu", f"gpu{gpu[1]}", 1) if gpu else key] = float(value) * scale
    return found
