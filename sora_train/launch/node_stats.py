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
MOST_NODES = 32  # beyond them wandb would have thousands of curves; Ray's own metrics have all
MOST_BYTES = 8 * 2**20
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

    def look(self) -> dict[str, float]:
        """`node/HOST/cpu`, `…/memory_gb`, `…/disk` and, of each GPU, `…/gpu0` and `…/gpu0_memory_gb`; or nothing where
        it is not yet time. A node that does not answer is left out. Never raises.
        """
        if time.monotonic() - self.asked_at < EVERY_S:
            return {}
        self.asked_at = time.monotonic()
        with contextlib.suppress(Exception):  # whatever goes wrong with figures for wandb must not cost a training
            if ray.is_initialized():
                return look()
        return {}


def look() -> dict[str, float]:
    """The figures of all nodes that answer."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=name_of)[:MOST_NODES]
    names = [name_of(node) for node in nodes]
    if len(set(names)) < len(names):  # several raylets of one machine
        names = [f"{name}-{node['NodeManagerPort']}" for name, node in zip(names, nodes, strict=True)]
    with ThreadPoolExecutor(max_workers=len(nodes) or 1) as pool:
        texts = pool.map(text_of, nodes)
        return {
            f"node/{name}/{key}": value
            for name, text in zip(names, texts, strict=True)
            for key, value in figures(text).items()
        }


def name_of(node: dict) -> str:
    return str(node["NodeManagerHostname"] or node["NodeManagerAddress"]).replace("/", "_")


def text_of(node: dict) -> str:
    """What a node's agent shows; nothing where it does not answer."""
    address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
    host = f"[{address}]" if ":" in address else address
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=WAIT_S) as answer:
            return answer.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""


def figures(text: str) -> dict[str, float]:
    """A node's figures by our names."""
    found: dict[str, float] = {}
    for name, tags, value in LINE.findall(text):
        if name in KEYS:
            key, scale = KEYS[name]
            gpu = GPU.search(tags)
            found[key.replace("gpu", f"gpu{gpu[1]}", 1) if gpu else key] = float(value) * scale
    return found
