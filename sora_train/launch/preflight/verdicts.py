"""Facts of a cluster to passed or failed, each failure with its remedy: pure functions of `facts.NodeFacts`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sora_train.launch.checks import add_resources_hint, run_resources, worker_resources
from sora_train.launch.preflight.node_info import NodeFacts
from sora_train.plan.estimate import Estimate
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes

USABLE = 0.93
"""Share of a GPU's memory that tensors can have: the rest is CUDA's, NCCL's, and lost in gaps."""
PROCESS = 600 * 2**20
"""Bytes of a training process on the CPU beside its tensors."""
CLOCK_S = 2.0
NCCL_GBPS = 1.0  # less is a network that GPUs would wait for; what CPUs train takes its time anyway


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    state: Literal["passed", "failed", "skipped"]
    said: str
    """What was found; of a failure, with the remedy."""


def passed(name: str, said: str) -> Check:
    return Check(name, "passed", said)


def failed(name: str, said: str) -> Check:
    return Check(name, "failed", said)


def judge_batch(recipe: Recipe) -> Check:
    """Whether micro-batches come out even over the workers."""
    train, world = recipe.train, recipe.cluster.most
    taken = -(-train.batch_size // (world * train.micro_batch_size)) * world * train.micro_batch_size
    shares = f"{train.batch_size} clips over {world} workers, {train.micro_batch_size} at a time"
    if taken == train.batch_size:
        return passed("batch", f"{shares}: {taken // world // train.micro_batch_size} micro-batches each")
    unit = world * train.micro_batch_size
    sizes = " or ".join(str(n) for n in (train.batch_size // unit * unit, taken) if n)
    fits = [m for m in range(train.micro_batch_size, 0, -1) if train.batch_size % (world * m) == 0]
    micro = f", or train.micro_batch_size {fits[0]}" if fits else ""
    return failed(
        "batch",
        f"{shares}: {taken - train.batch_size} of {taken} places are padding, which costs as much as clips; use "
        f"train.batch_size {sizes}{micro}",
    )


def judge_cores(recipe: Recipe, cores: int) -> Check:
    """Whether a Ray that is started on this machine alone has a core for each CPU that its workers take."""
    cluster = recipe.cluster
    said = f"{cluster.most} workers of {cluster.cpus_per_worker} CPUs on the {cores} cores of this machine"
    if cluster.most * cluster.cpus_per_worker <= cores:
        return passed("cores", said)
    fits = max(1, cores // cluster.cpus_per_worker)
    return failed("cores", f"{said} wait for each other: set cluster.workers to {fits}, or join a cluster")


def judge_nodes(nodes: list[NodeFacts]) -> Check:
    """Whether every node answers and has the GPUs that Ray counts there."""
    wrong = [f"{node.address}: {node.problem}" for node in nodes if node.problem]
    for node in nodes:
        counted = int(node.resources.get("GPU", 0))
        if not node.problem and counted > len(node.gpus):
            wrong.append(
                f"{node.address}: Ray counts {counted} GPUs, the driver sees {len(node.gpus)} (nvidia-smi): mend the "
                "driver or the container there, or `ray start` it with --num-gpus"
            )
    if wrong:
        return failed("nodes", "; ".join(wrong))
    kinds = sorted({name for node in nodes for name, _ in node.gpus})
    total = {kind: sum(node.resources.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = f", {total['GPU']:g} GPUs ({', '.join(kinds)})" if total["GPU"] else ""
    return passed("nodes", f"{len(nodes)} nodes, {total['CPU']:g} CPUs{gpus}")


def judge_versions(nodes: list[NodeFacts], here: dict[str, str]) -> Check:
    """Whether all nodes have the driver's versions; CUDA and NCCL alike where there are GPUs."""
    wrong: list[str] = []
    with_gpus = [node for node in nodes if node.gpus]
    for name in (*here, "CUDA", "NCCL"):
        expected = with_gpus[0].versions.get(name) if name in ("CUDA", "NCCL") and with_gpus else here.get(name)
        for node in with_gpus if name in ("CUDA", "NCCL") else nodes:
            has = node.versions.get(name, "none")
            line = f"{node.address} has {name} {has}, others have {expected}"
            if not node.problem and has != expected and line not in wrong:
                wrong.append(line)
    if wrong:
        return failed(
            "versions", f"{'; '.join(wrong)}: install the same there (pip install -c constraints.txt), then ray start"
        )
    return passed("versions", ", ".join(f"{name} {said}" for name, said in here.items()))


def judge_code(nodes: list[NodeFacts], here: str) -> Check:
    """Whether a worker on every node would import the driver's code."""
    other = [f"{node.address} ({node.code or 'none'})" for node in nodes if not node.problem and node.code != here]
    if other:
        return failed(
            "code",
            f"another sora_train is imported on {', '.join(other)} than here ({here}): submit with `ray job submit "
            "--working-dir .`, which brings this one everywhere, or check out the same commit there",
        )
    return passed("code", f"the same on all nodes ({here})")


def judge_clocks(nodes: list[NodeFacts]) -> Check:
    """Whether clocks agree, by which events and checkpoints are ordered, and signatures of S3 accepted."""
    off = [f"{node.address} by {node.clock_s:.1f} s" for node in nodes if abs(node.clock_s) > CLOCK_S]
    if off:
        return failed("clocks", f"off this machine's: {', '.join(off)}; start chrony or ntpd there")
    return passed("clocks", f"within {CLOCK_S:g} s")


def judge_storage(nodes: list[NodeFacts], output: str) -> Check:
    """Whether what one node writes into the runs' folder is read by the others."""
    names = {node.node: node.address for node in nodes}
    wrong = [f"{node.address}: {node.wrote}" for node in nodes if node.wrote]
    wrong += [
        f"{node.address} does not see what {', '.join(names.get(one, 'the driver') for one in node.unread)} wrote"
        for node in nodes
        if node.unread and not node.wrote
    ]
    if wrong:
        return failed(
            "storage",
            f"train.output {output} is not one folder for all: {'; '.join(wrong)}. Mount the same shared folder (NFS, "
            "Lustre, a volume) at this path on every node, or name one that is: --train.output",
        )
    return passed("storage", f"{output}: what each of {len(nodes)} nodes writes the others read")


def judge_shards_everywhere(nodes: list[NodeFacts], encoding: str, shards: str) -> Check:
    """Whether every node reads the same shards as the driver."""
    wrong = [
        f"{node.address}: {node.encoding[1:] if node.encoding.startswith('!') else 'other shards are there'}"
        for node in nodes
        if not node.problem and node.encoding != encoding
    ]
    if wrong:
        return failed(
            "shards there",
            f"data.output {shards} is not the same everywhere: {'; '.join(wrong)}. Put the shards on storage that all "
            "nodes see under this name",
        )
    return passed("shards there", "all nodes read them")


def judge_disk(free: int, held: int, checkpoint: int, keep: int, output: str) -> Check:
    """Whether there is room for the checkpoints that are kept and one that is being written; `held` bytes of them are
    there already.
    """
    need = checkpoint * (keep + 1) - held
    said = f"{keep} checkpoints kept and one being written take {in_bytes(checkpoint * (keep + 1))}"
    if need > free:
        return failed(
            "disk",
            f"{said}; {output} has {in_bytes(free)} free, {in_bytes(need - free)} too little: make room, lower "
            "train.keep_checkpoints, or give another place with --train.output",
        )
    return passed("disk", f"{said}; {in_bytes(free)} free")


def judge_room(recipe: Recipe, gpu: bool, nodes: Iterable[dict[str, float]]) -> Check:
    """Whether workers and the validation beside them can be laid out over nodes of these resources: sums may suffice
    where no node has room for a whole worker.
    """
    nodes, worker = [dict(node) for node in nodes], worker_resources(recipe, gpu)
    beside = dict(recipe.validation.resources) if recipe.validation.every else {}

    def workers_on(node: dict[str, float]) -> int:
        return int(min((node.get(kind, 0) + 1e-9) // count for kind, count in worker.items() if count))

    def without(node: dict[str, float]) -> dict[str, float]:
        return {kind: count - beside.get(kind, 0) for kind, count in node.items()}

    hosts = [i for i, node in enumerate(nodes) if all(node.get(kind, 0) >= count for kind, count in beside.items())]
    if beside and not hosts:
        return failed(
            "room",
            f"no node has {beside} for validation.resources; lower them, set validation.every to 0, or add such a node",
        )
    places = [[without(node) if beside and i == host else node for i, node in enumerate(nodes)] for host in hosts]
    most = max((sum(map(workers_on, layout)) for layout in places), default=0)
    if most < recipe.cluster.fewest:
        cpus = 0.0 if gpu else run_resources(recipe, gpu)["CPU"]
        room = f"; with the {beside} that validation takes beside them" if beside else ""
        return failed(
            "room",
            f"{recipe.cluster.fewest} workers of {worker} need room, the nodes have it for {most}{room}: lower "
            f"cluster.workers or cluster.cpus_per_worker, set validation.every to 0, or {add_resources_hint(cpus)}",
        )
    return passed("room", f"for {most} workers of {worker}" + (f" beside validation's {beside}" if beside else ""))


def judge_free(need: dict[str, float], there: dict[str, float], free: dict[str, float]) -> Check:
    """Whether what the run needs, of what is there in all, is free now."""
    if any(count > there.get(kind, 0) for kind, count in need.items()):
        return Check("free now", "skipped", "see cluster")
    taken = [f"{free.get(kind, 0):g} of {count:g} {kind}" for kind, count in need.items() if free.get(kind, 0) < count]
    if taken:
        return failed(
            "free now",
            f"another job holds the rest: free are {', '.join(taken)}; `ray job list` and `ray job stop` it, or wait",
        )
    return passed("free now", ", ".join(f"{count:g} {kind}" for kind, count in need.items()))


def judge_memory(recipe: Recipe, gpu: bool, plan: Estimate, remedies: list[str], nodes: list[NodeFacts]) -> Check:
    """Whether a training step fits the smallest GPU, or on CPUs the smallest node."""
    if gpu:
        sizes = [memory for node in nodes for _, memory in node.gpus]
        if not sizes:
            return Check("memory", "skipped", "nvidia-smi lists no GPU")
        room, need, what = int(USABLE * min(sizes)), plan.total, "a GPU"
    else:
        # A bucket that is never filled takes no memory there.
        each, per_node = plan.total - plan.states.bucket + PROCESS, 0
        for node in nodes:
            cores = int(node.resources.get("CPU", 1)) // recipe.cluster.cpus_per_worker
            per_node = max(per_node, min(cores, recipe.cluster.fewest))
        room, need, what = int(USABLE * min(node.memory for node in nodes)), each * max(1, per_node), "a node"
    said = f"a step takes {in_bytes(need)} of {what}, by the plan; it has {in_bytes(room)} for it"
    if need > room:
        mend = "; or ".join(remedies) or "see `sora preflight --plan`"
        return failed("memory", f"{said}: {mend}")
    return passed("memory", said)


def judge_allreduce(exact: list[bool], gbps: float, backend: str) -> Check:
    """Whether every rank got the exact sum, and how fast."""
    rate = f"{backend} over {len(exact)} ranks: {gbps:.3g} GB/s"
    if not all(exact):
        wrong = [rank for rank, right in enumerate(exact) if not right]
        return failed(
            "network",
            f"{backend}: ranks {wrong} got a wrong sum: a broken link, GPU or library; try without these nodes, or "
            "NCCL_P2P_DISABLE=1",
        )
    if backend == "nccl" and gbps < NCCL_GBPS:
        return failed("network", f"{rate}, too slow to train on: {interfaces(backend)}")
    return passed("network", f"{rate}, sums exact")


def interfaces(backend: str) -> str:
    """The usual remedy where ranks don't find each other."""
    return (
        f"ranks may be on the wrong network interface: set {backend.upper()}_SOCKET_IFNAME to the one that the nodes "
        "share (`ip addr` lists them), and let them reach each other on all ports"
    )
