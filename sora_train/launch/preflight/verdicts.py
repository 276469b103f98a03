"""Checks of a recipe against the nodes. Each returns a message, or raises UserError (failed) or Skip."""

from __future__ import annotations

from dataclasses import replace

from sora_train.errors import UserError
from sora_train.launch.preflight.node_info import NodeInfo
from sora_train.plan.estimate import estimate
from sora_train.plan.states import checkpoint_bytes
from sora_train.plan.table import largest_bucket, plan_inputs, remedies_for
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes

USABLE = 0.93
"""Share of a GPU's memory that tensors can use; the rest is CUDA, NCCL and fragmentation."""
PROCESS_BYTES = 600 * 2**20
"""RAM of a training process on the CPU without its tensors."""
MAX_CLOCK_S = 2.0
GPU_LIBRARIES = ("CUDA", "NCCL")


class Skip(Exception):  # noqa: N818  not an error
    """The check does not apply, or has nothing to look at. The message says why."""


def check_batch(recipe: Recipe) -> str:
    """Micro-batches fill the batch without padding."""
    train, world = recipe.train, recipe.cluster.most
    unit = world * train.micro_batch_size
    slots = -(-train.batch_size // unit) * unit
    batch = f"{train.batch_size} clips over {world} workers, {train.micro_batch_size} at a time"
    if slots == train.batch_size:
        return f"{batch}: {slots // unit} micro-batches each"
    sizes = " or ".join(str(size) for size in (slots - unit, slots) if size)
    fits = [m for m in range(train.micro_batch_size, 0, -1) if train.batch_size % (world * m) == 0]
    micro = f", or train.micro_batch_size {fits[0]}" if fits else ""
    raise UserError(
        f"{batch}: {slots - train.batch_size} of {slots} slots are padding, which costs as much as clips. Use "
        f"train.batch_size {sizes}{micro}"
    )


def check_cores(recipe: Recipe, cores: int) -> str:
    """A Ray started on this machine has a core for each CPU that its workers take."""
    cluster = recipe.cluster
    message = f"{cluster.most} workers of {cluster.cpus_per_worker} CPUs on the {cores} cores of this machine"
    if cluster.most * cluster.cpus_per_worker <= cores:
        return message
    fits = max(1, cores // cluster.cpus_per_worker)
    raise UserError(f"{message} wait for each other. Set cluster.workers to {fits}, or join a cluster")


def check_nodes(nodes: list[NodeInfo]) -> str:
    """Every node answers and has the GPUs that Ray counts there."""
    wrong = [f"{node.address}: {node.error}" for node in nodes if node.error]
    for node in nodes:
        counted = int(node.resources.get("GPU", 0))
        if not node.error and counted > len(node.gpus):
            wrong.append(
                f"{node.address}: Ray counts {counted} GPUs, the driver sees {len(node.gpus)} (nvidia-smi). Fix the "
                "driver or the container there, or set --num-gpus of `ray start`"
            )
    if wrong:
        raise UserError("; ".join(wrong))
    kinds = ", ".join(sorted({name for node in nodes for name, _ in node.gpus}))
    cpus, gpus = (sum(node.resources.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} nodes, {cpus:g} CPUs" + (f", {gpus:g} GPUs ({kinds})" if gpus else "")


def check_versions(nodes: list[NodeInfo], here: dict[str, str]) -> str:
    """All nodes have the versions and the source of this process; CUDA and NCCL are the same on all GPU nodes."""
    on_gpus = next((node.versions for node in nodes if node.gpus), {})
    common = {name: value for name, value in here.items() if name not in GPU_LIBRARIES}
    cuda = {name: value for name, value in on_gpus.items() if name in GPU_LIBRARIES}
    wrong = [
        f"{node.address} has {name} {node.versions.get(name, 'none')}, others have {value}"
        for node in nodes
        for name, value in (common | cuda if node.gpus else common).items()
        if node.versions.get(name) != value
    ]
    if wrong:
        raise UserError(
            f"{'; '.join(wrong)}. Install the same versions there (pip install -c constraints.txt) and restart Ray; "
            "for another sora_train, `ray job submit --working-dir .` brings this one to all nodes"
        )
    return ", ".join(f"{name} {value}" for name, value in here.items())


def check_clocks(nodes: list[NodeInfo]) -> str:
    """Clocks agree: events and checkpoints are ordered by them, and S3 rejects requests from a wrong one."""
    wrong = [f"{node.address} by {node.clock_s:.1f} s" for node in nodes if abs(node.clock_s) > MAX_CLOCK_S]
    if wrong:
        raise UserError(f"clocks differ from this machine's: {', '.join(wrong)}. Start chrony or ntpd there")
    return f"within {MAX_CLOCK_S:g} s"


def check_storage(nodes: list[NodeInfo], output: str) -> str:
    """All nodes and this machine share `train.output`."""
    wrong = [f"{node.address}: {node.write_error}" for node in nodes if node.write_error]
    if wrong:
        raise UserError(
            f"train.output {output} is not one folder on all nodes: {'; '.join(wrong)}. Mount the same shared folder "
            "(NFS, Lustre, a volume) at this path on every node, or set --train.output to one that is"
        )
    return f"{output} is shared by {len(nodes)} nodes"


def check_shards_match(nodes: list[NodeInfo], encoding: str, shards: str) -> str:
    """Every node reads the same shards as this process."""
    wrong = [
        f"{node.address}: {node.encoding[1:] if node.encoding.startswith('!') else 'other shards'}"
        for node in nodes
        if not node.error and node.encoding != encoding
    ]
    if wrong:
        raise UserError(
            f"data.output {shards} is not the same on all nodes: {'; '.join(wrong)}. Put the shards on storage that "
            "all nodes mount under this name"
        )
    return f"all nodes read {shards}"


def check_disk(recipe: Recipe, free: int, existing: int) -> str:
    """Space for the kept checkpoints and one being written. `existing` bytes of older ones will be freed."""
    keep, need = recipe.train.keep_checkpoints, checkpoint_bytes(recipe.model) * (recipe.train.keep_checkpoints + 1)
    message = f"{keep} kept checkpoints and one being written take {in_bytes(need)}; {in_bytes(free)} are free"
    if need - existing <= free:
        return message
    raise UserError(
        f"{message} in {recipe.train.output}, {in_bytes(need - existing - free)} too little. Free space there, lower "
        "train.keep_checkpoints, or set another folder with --train.output"
    )


def check_memory(recipe: Recipe, gpu: bool, nodes: list[NodeInfo]) -> str:
    """A training step, by the memory plan, fits the smallest GPU, or without GPUs the smallest node."""
    nodes = [node for node in nodes if not node.error]
    gpus = [memory for node in nodes for _, memory in node.gpus]
    if not nodes or (gpu and not gpus):
        raise Skip("nvidia-smi lists no GPU" if nodes else "no node answered")
    sizes = replace(largest_bucket(recipe, plan_inputs(recipe))[1], b=recipe.train.micro_batch_size)
    plan = estimate(recipe.model, recipe.train, sizes, recipe.cluster.fewest)
    if gpu:
        room, need, where = int(USABLE * min(gpus)), plan.total, "a GPU"
    else:  # a bucket that is never filled takes no RAM
        processes = max(int(node.resources.get("CPU", 1)) // recipe.cluster.cpus_per_worker for node in nodes)
        need = (plan.total - plan.states.bucket + PROCESS_BYTES) * max(1, min(processes, recipe.cluster.fewest))
        room, where = int(USABLE * min(node.memory for node in nodes)), "a node"
    message = f"a step takes {in_bytes(need)} of {where} by the plan; {in_bytes(room)} are usable"
    if need <= room:
        return message
    remedies = remedies_for(recipe, sizes, room) if gpu else []
    raise UserError(f"{message}. To fit: {'; or '.join(remedies) or 'see `sora preflight --plan`'}")
