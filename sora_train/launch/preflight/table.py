"""`sora preflight`: a table of what a run needs, each line passed, or failed with its remedy, before it costs money.

Facts are gathered by one Ray task a node (`gather.py`, `node_info.py`) and judged by pure functions (`verdicts.py`).
`sora train` does the quick part of it at its start.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import ray

from sora_train.errors import UserError
from sora_train.launch.checks import (
    check_cluster,
    check_codec,
    check_shards,
    check_text,
    resolve_recipe,
    run_resources,
)
from sora_train.launch.clips import read_clips
from sora_train.launch.preflight import node_info
from sora_train.launch.preflight.allreduce import check_allreduce
from sora_train.launch.preflight.gather import gather
from sora_train.launch.preflight.node_info import NodeFacts
from sora_train.launch.preflight.verdicts import (
    USABLE,
    Check,
    failed,
    judge_batch,
    judge_clocks,
    judge_code,
    judge_cores,
    judge_disk,
    judge_free,
    judge_memory,
    judge_nodes,
    judge_room,
    judge_shards_everywhere,
    judge_storage,
    judge_versions,
    passed,
)
from sora_train.launch.preflight.wandb_reach import check_wandb
from sora_train.launch.resume import check_resume
from sora_train.launch.run_folder import check_writable
from sora_train.launch.start import check_initial_weights
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.plan.estimate import Estimate, estimate
from sora_train.plan.states import checkpoint_bytes
from sora_train.plan.table import facts_of, heaviest, remedies_for
from sora_train.ray_cluster.connection import connect
from sora_train.recipe import Recipe
from sora_train.storage import free_bytes
from sora_train.terminal import print_result

T = TypeVar("T")
LOCAL_S = 20.0
"""Seconds that a check of files may take."""


def preflight(recipe: Recipe) -> None:
    """Checks everything and prints it as it goes; UserError where a check failed."""
    began, checks = time.monotonic(), list[Check]()

    def tell(check: Check) -> None:
        checks.append(check)
        print_result(f"{check.state:<8}{check.name:<14}{check.said}")

    recipe, manifest = check_files(recipe, tell)
    tell(judge_batch(recipe))
    tell(check_wandb(recipe.tracking.wandb))
    try:
        need = run_resources(recipe, gpu=False, most=True)
        with connect(recipe.cluster.address, min_cpus=int(-(-need.get("CPU", 0) // 1)), log_to_driver=False) as own:
            if own:
                tell(judge_cores(recipe, cores()))
            check_nodes(recipe, manifest, tell)
    except UserError as error:
        tell(failed("cluster", str(error)))
    wrong = [check.name for check in checks if check.state == "failed"]
    print_result(f"{len(checks)} checks in {time.monotonic() - began:.0f} s")
    if wrong:
        raise UserError(f"{len(wrong)} of {len(checks)} checks failed: {', '.join(wrong)}")


def check_files(recipe: Recipe, tell: Callable[[Check], None]) -> tuple[Recipe, Manifest | None]:
    """What can be checked without a cluster; the recipe with absolute folders, and the shards' manifest if they fit."""
    placed = told("paths", tell, lambda: resolve_recipe(recipe), lambda it: it.train.output)
    recipe = placed or recipe
    run = Path(recipe.train.output) / recipe.name
    manifest = told("shards", tell, lambda: check_shards(recipe), say_shards)
    told("run folder", tell, lambda: check_writable(run), lambda _: str(run))
    at = None
    if manifest is not None:
        at = told("resume", tell, lambda: check_resume(run, recipe, manifest, read_clips(recipe)), say_resume)
        told("networks", tell, lambda: check_codec(recipe, manifest), lambda _: "those of the shards")
        null = f"null prompt: {recipe.codec.null_prompt}"
        told("captions", tell, lambda: check_text(recipe, manifest), lambda _: null)
    if recipe.model.init_from and at is None:
        told("start", tell, lambda: check_initial_weights(recipe), lambda _: recipe.model.init_from)
    return recipe, manifest


def check_nodes(recipe: Recipe, manifest: Manifest | None, tell: Callable[[Check], None]) -> None:
    """What the cluster that this process is connected to has for the recipe."""
    gpu = told("cluster", tell, lambda: check_cluster(recipe), lambda it: "with GPUs" if it else "on CPUs")
    alive = [node for node in ray.nodes() if node["Alive"]]
    tell(judge_room(recipe, bool(gpu), [node["Resources"] for node in alive]))
    need = run_resources(recipe, bool(gpu))
    there, free = ray.cluster_resources(), ray.available_resources()
    tell(judge_free(need, *({kind: float(count) for kind, count in of.items()} for of in (there, free))))
    nodes = gather(recipe, alive)
    for check in judged(recipe, manifest, nodes):
        tell(check)
    tell(check_disk(recipe))
    tell(check_memory(recipe, bool(gpu), nodes))
    tell(check_allreduce(recipe, bool(gpu)) if gpu is not None else Check("network", "skipped", "see cluster"))


def check_quickly(recipe: Recipe, manifest: Manifest, gpu: bool, disk: Check, own: bool) -> None:
    """What `sora train` checks of the cluster at its start, beside its own checks: disk (by `check_disk`) and memory,
    and where there are several nodes what must be alike on them. Warns where micro-batches hold padding, and, where
    Ray was started here (`own`), of more workers than cores; UserError where something failed.
    """
    for check in (judge_batch(recipe), *([judge_cores(recipe, cores())] if own else [])):
        if check.state == "failed":
            log.warning(check.said)
    alive = [node for node in ray.nodes() if node["Alive"]]
    checks = [disk]
    nodes: list[NodeFacts] = []
    if len(alive) > 1:
        nodes = gather(recipe, alive)
        checks += judged(recipe, manifest, nodes)
        checks.append(judge_room(recipe, gpu, [node["Resources"] for node in alive]))
    elif gpu:
        nodes = [NodeFacts("", "", gpus=node_info.gpus())]
    if gpu:
        checks.append(check_memory(recipe, gpu, nodes))
    if wrong := [f"{check.name}: {check.said}" for check in checks if check.state == "failed"]:
        lines = "\n".join(wrong)
        raise UserError(f"the run would fail:\n{lines}\n`sora preflight` shows all checks, --no-preflight skips these")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def judged(recipe: Recipe, manifest: Manifest | None, nodes: list[NodeFacts]) -> list[Check]:
    """What the nodes' facts come to."""
    found = [
        judge_nodes(nodes),
        judge_versions(nodes, node_info.versions()),
        judge_code(nodes, node_info.code_hash()),
        judge_clocks(nodes),
        judge_storage([node for node in nodes if not node.problem], recipe.train.output),
    ]
    if manifest is not None:
        found.append(judge_shards_everywhere(nodes, manifest.encoding_hash, recipe.data.output))
    return found


def check_disk(recipe: Recipe) -> Check:
    """Room for the checkpoints that will be kept; what this run's earlier ones take will be free again."""
    run = Path(recipe.train.output) / recipe.name
    held = sum(path.stat().st_size for path in run.glob("checkpoints/step_*/*") if path.is_file())
    free = free_bytes(recipe.train.output)
    return judge_disk(free, held, checkpoint_bytes(recipe.model), recipe.train.keep_checkpoints, recipe.train.output)


def check_memory(recipe: Recipe, gpu: bool, nodes: list[NodeFacts]) -> Check:
    """The memory plan beside what the nodes have."""
    answering = [node for node in nodes if not node.problem]
    if not answering:
        return Check("memory", "skipped", "no node answered")
    plan, smallest = planned(recipe), min((size for node in answering for _, size in node.gpus), default=0)
    _, sizes = heaviest(recipe, facts_of(recipe))
    sizes = replace(sizes, b=recipe.train.micro_batch_size)
    remedies = remedies_for(recipe, sizes, int(USABLE * smallest)) if gpu and smallest else []
    return judge_memory(recipe, gpu, plan, remedies, answering)


def planned(recipe: Recipe) -> Estimate:
    """The memory plan of the recipe's heaviest bucket at its fewest workers."""
    _, sizes = heaviest(recipe, facts_of(recipe))
    sizes = replace(sizes, b=recipe.train.micro_batch_size)
    return estimate(recipe.model, recipe.train, sizes, recipe.cluster.fewest)


def told(name: str, tell: Callable[[Check], None], act: Callable[[], T], say: Callable[[T], str]) -> T | None:
    """What a check that raises UserError gives, told as a row: None where it failed, or took too long."""
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:
            errors.append(error)

    # A thread that nobody waits for at the end: a file system that hangs can't be interrupted.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LOCAL_S)
    if thread.is_alive():
        tell(failed(name, f"no answer in {LOCAL_S:g} s: is the storage, or the network to it, alive?"))
        return None
    if errors:
        kind = "" if isinstance(errors[0], UserError) else f"{type(errors[0]).__name__}: "
        tell(failed(name, f"{kind}{' '.join(str(errors[0]).split())}"))
        return None
    tell(passed(name, say(result[0])))
    return result[0]


def say_shards(manifest: Manifest) -> str:
    return f"{sum(manifest.buckets.values()):,} clips in {', '.join(manifest.buckets)}"


def say_resume(step: int | None) -> str:
    return "begins at step 0" if step is None else f"goes on from step {step}"
