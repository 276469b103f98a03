"""Checks of a recipe against the nodes. Each returns a message, or raises UserError."""

from __future__ import annotations

from sora_train.errors import UserError, first_of
from sora_train.launch.checks import fitting, worker_resources
from sora_train.launch.preflight.node_info import NodeInfo
from sora_train.plan.states import checkpoint_bytes, host_memory
from sora_train.plan.steps import configs_of, step_table
from sora_train.plan.table import largest_bucket, plan_inputs, remedies_for
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes

USABLE = 0.93
"""Share of a GPU's memory that tensors can use; the rest is CUDA, NCCL and fragmentation."""

MOST = 10
"""Problems in a message."""


def check_batch(recipe: Recipe) -> str:
    """Micro-batches fill the batch without padding. With `train.balance`: the costliest bucket's; and a table.

    Names workers that share clips and would idle.
    """
    train, group, table = recipe.train, recipe.cluster.sequence_parallel, list[str]()
    world = recipe.cluster.most // group
    if train.balance or group > 1:
        buckets = plan_inputs(recipe)[0]
        table = step_table(recipe, buckets, recipe.cluster.most)
        train = min(configs_of(recipe, buckets, recipe.cluster.most).values(), key=lambda own: own.batch_size)
    unit = world * train.micro_batch_size
    slots = -(-train.batch_size // unit) * unit
    over = f"{world} workers" if group == 1 else f"{world} groups of {group} workers"
    batch = f"{train.batch_size} clips over {over}, {train.micro_batch_size} at a time"
    if slots == train.batch_size:
        return "\n".join([f"{batch}: {slots // unit} micro-batches each", *table])
    sizes = " or ".join(str(size) for size in (slots - unit, slots) if size)
    fits = [m for m in range(train.micro_batch_size, 0, -1) if train.batch_size % (world * m) == 0]
    micro = f", or train.micro_batch_size {fits[0]}" if fits else ""
    raise UserError(
        f"{batch}: {slots - train.batch_size} of {slots} slots are padding, which costs as much as clips. Use "
        f"train.batch_size {sizes}{micro}",
        code="preflight",
    )


def check_nodes(nodes: list[NodeInfo], worker: dict[str, float] | None = None) -> str:
    """Every node answers, has its GPUs, the same versions and folders, and if a worker fits on it what that needs."""
    wrong: dict[str, list[str]] = {}
    for node in nodes:
        lacks = (node.lacks,) if node.lacks and worker and fitting(node.resources, worker) else ()
        for problem in (*node.problems, *lacks):
            wrong.setdefault(problem, []).append(node.address)
    if wrong:
        message = "; ".join(f"{first_of(places)}: {problem}" for problem, places in list(wrong.items())[:MOST])
        raise UserError(message, code="cluster")
    kinds = ", ".join(sorted({name for node in nodes for name, _ in node.gpus}))
    cpus, gpus = (sum(node.resources.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} nodes, {cpus:g} CPUs" + (f", {gpus:g} GPUs ({kinds})" if gpus else "")


def check_disk(recipe: Recipe, free: int, existing: int) -> str:
    """Space for the kept checkpoints and one being written. `existing` bytes of older ones will be freed."""
    keep = recipe.train.keep_checkpoints
    need = checkpoint_bytes(recipe.model, recipe.lora) * (keep + 1)
    message = f"{keep} kept checkpoints and one being written take {in_bytes(need)}; {in_bytes(free)} are free"
    if need - existing <= free:
        return message
    raise UserError(
        f"{message} in {recipe.train.output}, {in_bytes(need - existing - free)} too little. Free space there, lower "
        "train.keep_checkpoints, or set another folder with --train.output",
        code="not_writable",
    )


def check_ram(recipe: Recipe, nodes: list[dict[str, float]], gpu: bool) -> str:
    """A checkpoint's copies, and what is offloaded, fit the CPU memory that Ray found on each node."""
    parts, averaged = host_memory(recipe.model, recipe.train, recipe.cluster.fewest, recipe.lora)
    each, worker = sum(parts.values()), worker_resources(recipe, gpu)
    for node in nodes:
        workers = min(recipe.cluster.most, fitting(node, worker))
        need = workers * each + averaged
        there = int(node.get("memory", 0) + node.get("object_store_memory", 0))
        if workers and 0 < there < need:
            names = ", ".join(name for name, count in parts.items() if count)
            raise UserError(
                f"{workers} workers on a node take {in_bytes(need)} of CPU memory, and it has {in_bytes(there)}: "
                f"{in_bytes(each)} each ({names}), and on rank 0 {in_bytes(averaged)} of the averaged weights. Use "
                "nodes with more memory, or more nodes with fewer workers each"
                + (", or train.offload none" if recipe.train.offload != "none" else ""),
                code="memory",
            )
    return f"{in_bytes(each)} a worker, and {in_bytes(averaged)} on rank 0 at a checkpoint"


def check_memory(recipe: Recipe, nodes: list[NodeInfo]) -> str:
    """A training step, by the memory plan, fits the smallest GPU."""
    gpus = [memory for node in nodes for _, memory in node.gpus]
    if not gpus:
        return "not compared: nvidia-smi lists no GPU"
    _, sizes, planned = largest_bucket(recipe, plan_inputs(recipe)[0])
    need, room = planned.total, int(USABLE * min(gpus))
    message = f"a step takes {in_bytes(need)} of a GPU by the plan; {in_bytes(room)} are usable"
    if need <= room:
        return message
    remedies = remedies_for(recipe, sizes, room)
    raise UserError(f"{message}. To fit: {'; or '.join(remedies) or 'see `sora preflight --plan`'}", code="memory")
