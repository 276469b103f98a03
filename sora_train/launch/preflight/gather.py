"""The facts of every node of the cluster that this process is connected to."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sora_train.launch.preflight import node_info
from sora_train.launch.preflight.node_info import NodeFacts
from sora_train.log import log
from sora_train.recipe import Recipe

T = TypeVar("T")
NODE_S, SHORT_S = 40.0, 10.0
"""Seconds that a node's first answer, for which it may have to import torch, and its later ones may take."""


def gather(recipe: Recipe, alive: list[dict[str, Any]]) -> list[NodeFacts]:
    """Facts of every node, each asked at the same time; leaves nothing behind in the runs' folder.

    A node that went while it was asked is said on stderr and left out: of the cluster that is there now nothing is
    wrong.
    """
    with shared_folder(Path(recipe.train.output)) as folder:
        asked = {node["NodeID"]: node for node in alive}
        given = {key: (key, node["NodeManagerAddress"], str(folder), recipe.data.output) for key, node in asked.items()}
        found = ask(node_info.look, given, NODE_S)
        nodes = {
            key: answer
            if isinstance(answer := found[key], NodeFacts)
            else NodeFacts(key, node["NodeManagerAddress"], problem=str(answer))
            for key, node in asked.items()
        }
        wrote = [key for key, node in nodes.items() if not node.problem and not node.wrote]
        unread = ask(
            node_info.unread, {key: (str(folder), ["driver", *wrote]) for key in wrote}, SHORT_S + node_info.PATIENCE_S
        )
        clocks = ask_clocks([key for key, node in nodes.items() if not node.problem])
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for key in nodes.keys() - there:
        log.warning(f"{nodes.pop(key).address} left the cluster while it was asked")
    return [
        replace(
            node,
            resources=asked[key]["Resources"],
            unread=found if isinstance(found := unread.get(key, ()), tuple) else ("driver",),
            clock_s=clocks.get(key, 0.0),
        )
        for key, node in nodes.items()
    ]


@contextmanager
def shared_folder(output: Path) -> Iterator[Path]:
    """A folder in the runs' folder with the driver's own file, for as long as the block."""
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f".preflight-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        (folder / "driver").write_text("driver", encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with suppress(OSError):  # another run has begun in it meanwhile
                os.rmdir(output)


def ask(what: Callable[..., T], words: dict[str, tuple], timeout_s: float) -> dict[str, T | Exception]:
    """Runs a function on nodes by their ids; what one did not answer in time, or raised, is an exception in words."""
    tasks = {
        key: ray.remote(what)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False))
        .remote(*given)
        for key, given in words.items()
    }
    done, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=timeout_s) if tasks else ([], [])
    answers: dict[str, T | Exception] = {}
    for key, task in tasks.items():
        if task not in done:
            ray.cancel(task, force=True)
            answers[key] = TimeoutError(
                f"no answer in {timeout_s:g} s; `ray stop` and `ray start` it, or take it out of the cluster"
            )
            continue
        try:
            answers[key] = ray.get(task)
        except Exception as error:
            last = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            answers[key] = RuntimeError(
                f"{last[:300]}; a worker there can't run this sora_train: install it there, or submit with "
                "`ray job submit --working-dir .`"
            )
    return answers


def ask_clocks(nodes: list[str]) -> dict[str, float]:
    """Seconds by which each node's clock is off this one's at least: what the question's way took is given away."""
    off: dict[str, float] = {}
    for node in nodes:
        begin = time.time()
        there = ask(node_info.now, {node: ()}, SHORT_S)[node]
        end = time.time()
        if isinstance(there, float):
            off[node] = min(0.0, there - begin) + max(0.0, there - end)
    return off
