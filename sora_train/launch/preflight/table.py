"""`sora preflight`: runs all checks and prints a table. `sora train` runs the quick ones before it starts.

`node_info.py` collects what the nodes have, `verdicts.py` compares it with the recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

import ray

from sora_train.errors import UserError, one_line
from sora_train.launch import checks
from sora_train.launch.clips import read_clips
from sora_train.launch.images import read_images
from sora_train.launch.init_from import check_base_unchanged, check_initial_weights
from sora_train.launch.preflight import node_info, verdicts
from sora_train.launch.preflight.allreduce import check_allreduce
from sora_train.launch.preflight.node_info import NodeInfo
from sora_train.launch.resume import check_resume
from sora_train.launch.run_folder import check_writable
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.ray_cluster.connection import connect
from sora_train.recipe import Recipe
from sora_train.storage import free_bytes
from sora_train.terminal import print_result

T = TypeVar("T")
FILES_S, HASH_S, NETWORK_S = 20.0, 600.0, 120.0
"""How long a check of files, the hash of large ones, and the all-reduce may take."""


class Table:
    """Runs checks one after another; a row for each is printed at once, and failures are collected."""

    def __init__(self, print_rows: bool = True) -> None:
        self.print_rows, self.states, self.failures = print_rows, dict[str, str](), dict[str, str]()

    def check(
        self, name: str, act: Callable[[], T], describe: Callable[[T], str] = str, timeout_s: float = FILES_S
    ) -> T | None:
        """Runs a check. Returns its result, or None if it failed or took too long."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)

        # A daemon thread: a check that hangs in a dead file system can't be interrupted, and must not block the exit.
        Thread(target=run, daemon=True).start()
        try:
            result = future.result(timeout_s)
        except Exception as error:
            if not future.done():
                self.add(name, "failed", f"no answer in {timeout_s:g} s. Check the storage, and the network to it")
            else:
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                self.add(name, "failed", f"{kind}{one_line(str(error))}")
        else:
            self.add(name, "passed", describe(result))
            return result
        return None

    def add(self, name: str, state: str, message: str) -> None:
        self.states[name] = state
        if state == "failed":
            self.failures[name] = message
        if self.print_rows:
            print_result(f"{state:<8}{name:<14}{message}")


def preflight(recipe: Recipe) -> None:
    """Runs and prints all checks. UserError if one fails."""
    began, table = time.monotonic(), Table()
    recipe, manifest = check_files(recipe, table)
    table.check("batch", lambda: verdicts.check_batch(recipe))
    try:
        cpus = checks.run_resources(recipe, gpu=False, most=True).get("CPU", 0)
        with connect(recipe.cluster.address, min_cpus=math.ceil(cpus)):
            check_cluster(recipe, manifest, table)
    except UserError as error:
        table.add("cluster", "failed", str(error))
    print_result(f"{len(table.states)} checks in {time.monotonic() - began:.0f} s")
    if table.failures:
        raise UserError(
            f"{len(table.failures)} of {len(table.states)} checks failed: {', '.join(table.failures)}", code="preflight"
        )


def check_files(recipe: Recipe, table: Table) -> tuple[Recipe, Manifest | None]:
    """Checks that need no cluster. Returns the recipe with resolved paths, and the shards' manifest if it fits."""
    recipe = table.check("paths", lambda: checks.resolve_recipe(recipe), lambda it: it.train.output) or recipe
    run, step = Path(recipe.train.output) / recipe.name, None
    manifest = table.check("shards", lambda: checks.check_shards(recipe), lambda it: f"clips: {it.buckets}")
    table.check("run folder", lambda: check_writable(run), lambda _: str(run))
    if manifest is not None:
        step = table.check(
            "resume", lambda: check_resume(run, recipe, manifest, read_clips(recipe)), lambda it: f"from step {it or 0}"
        )
        table.check("networks", lambda: checks.check_codec(recipe, manifest), lambda _: "those of the shards")
        prompt = f"null prompt: {recipe.codec.null_prompt}"
        table.check("captions", lambda: checks.check_text(recipe, manifest), lambda _: prompt)
        if any(recipe.validation.images):
            images = ", ".join(recipe.validation.images)
            table.check("images", lambda: read_images(recipe, manifest), lambda _: images)
    if recipe.model.init_from and step is None:
        table.check("init_from", lambda: check_initial_weights(recipe), lambda _: recipe.model.init_from)
    elif recipe.lora.rank and step is not None:
        base = f"{recipe.model.init_from} is unchanged, hash "
        table.check("base", lambda: check_base_unchanged(recipe, run), lambda it: base + it[:12], timeout_s=HASH_S)
    return recipe, manifest


def check_cluster(recipe: Recipe, manifest: Manifest | None, table: Table) -> None:
    """Checks of the cluster that this process is connected to."""
    gpu = table.check("cluster", lambda: checks.check_cluster(recipe), lambda it: "with GPUs" if it else "on CPUs")
    if why := checks.idle_gpus(recipe, checks.alive_nodes()):
        table.add("gpus", "warning", why)
    if gpu is not None and (why := checks.split_groups(recipe, gpu, checks.alive_nodes())):
        table.add("groups", "warning", why)
    nodes = check_nodes(recipe, manifest, table, gpu)
    table.check("disk", lambda: check_disk(recipe))
    if gpu:
        table.check("memory", lambda: verdicts.check_memory(recipe, nodes))
    if gpu is not None:
        table.check("CPU memory", lambda: verdicts.check_ram(recipe, checks.alive_nodes(), gpu))
        table.check("network", lambda: check_allreduce(recipe, gpu), timeout_s=NETWORK_S)


def check_nodes(recipe: Recipe, manifest: Manifest | None, table: Table, gpu: bool | None) -> list[NodeInfo]:
    """Compares all nodes with this machine, with each other, and with what workers on CPUs or GPUs need, if known."""
    nodes = node_info.collect(recipe, manifest.encoding_hash if manifest else "", gpu)
    worker = None if gpu is None else checks.worker_resources(recipe, gpu)
    table.check("nodes", lambda: verdicts.check_nodes(nodes, worker))
    return nodes


def check_quickly(recipe: Recipe, manifest: Manifest, gpu: bool) -> None:
    """The checks of `sora train`: disk, memory, what workers need, and with several nodes what must be the same there.

    Warns if micro-batches hold padding. UserError if a check fails.
    """
    try:
        verdicts.check_batch(recipe)
    except UserError as error:
        log.warning(str(error))
    several = sum(node["Alive"] for node in ray.nodes()) > 1
    if not several:
        checks.check_worker(recipe.train, bool(recipe.lora.rank), gpu)
    table = Table(print_rows=False)
    table.check("disk", lambda: check_disk(recipe))
    table.check("CPU memory", lambda: verdicts.check_ram(recipe, checks.alive_nodes(), gpu))
    nodes = check_nodes(recipe, manifest, table, gpu) if several else [NodeInfo(gpus=node_info.list_gpus())]
    if gpu:
        table.check("memory", lambda: verdicts.check_memory(recipe, nodes))
    if table.failures:
        lines = "\n".join(f"{name}: {message}" for name, message in table.failures.items())
        raise UserError(
            f"the run would fail:\n{lines}\n`sora preflight` shows all checks, --no-preflight skips these",
            code="preflight",
        )


def check_disk(recipe: Recipe) -> str:
    """Space for checkpoints in `train.output`."""
    checkpoints = (Path(recipe.train.output) / recipe.name).glob("checkpoints/step_*/*")
    existing = sum(path.stat().st_size for path in checkpoints if path.is_file())
    return verdicts.check_disk(recipe, free_bytes(recipe.train.output), existing)
