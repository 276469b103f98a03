"""Ray tasks that read blocks of clips and write shards, so clips never pass through the driver.

A block is a table of ENCODED in Ray's object store. The driver gets its facts, which are small, decides which rows to
keep, and starts writers, which get the block itself. Ray repeats a task whose worker or node is lost; a writer then
writes the same clips under the same name again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray import ObjectRef

from data_prep.executor import fetch
from data_prep.schemas import FACTS
from data_prep.shards import next_number, pick_rows, shard_name, write_shard
from data_prep.watchdog import WRITE_TIMEOUT_S, PipelineStalled
from sora_train.errors import UserError
from sora_train.schema import ROW_GROUP, SHARD_SCHEMA
from sora_train.storage import resolve

WRITERS_PER_NODE, CPUS_OF_A_WRITER = 2, 4
"""Most writers of a node, and CPUs for each of them: on 2 CPUs two writers were half as fast as one."""
MAX_WRITE_DELAY_S = 30.0
"""After this time a shard is written although it is not full, which bounds the work that a kill can lose."""
HELD_SHARE, HELD_SHARDS = 0.2, 4
"""Clips that wait for a shard or are being written take at most this share of the object store, in which these many
shards must fit. Ray Data itself uses up to half of it."""
VISIBLE_TIMEOUT_S = 30.0
"""Longest wait until the driver sees a shard that another node wrote; NFS caches listings."""


def facts_of(block: pa.Table) -> pa.Table:
    """What the driver must know of a block's rows: FACTS."""
    columns = zip(block.column("latents"), block.column("text"), strict=True)
    sizes = [
        sum(value.as_buffer().size for value in (latents, *(text.values or ())) if value.is_valid)
        for latents, text in columns
    ]
    return block.append_column("bytes", pa.array(sizes, pa.int64())).select(FACTS.names).cast(FACTS)


@ray.remote(num_cpus=0)
def block_facts(block: pa.Table) -> pa.Table:
    """The facts of a block's rows."""
    return facts_of(block)


def empty_text_of(block: pa.Table) -> bytes:
    """The empty prompt's embedding, if the block has it."""
    return next((value.as_py() for value in block.column("empty_text") if value.is_valid), b"")


@ray.remote(num_cpus=0)
def block_empty_text(block: pa.Table) -> bytes:
    """The empty prompt's embedding, if the block has it."""
    return empty_text_of(block)


@ray.remote(num_cpus=0)
def cut_block(block: pa.Table, parts: list[list[int]]) -> list[pa.Table] | pa.Table:
    """Copies of some rows, so that what a few clips of a rare bucket hold in memory is not the whole block."""
    tables = [block.select(SHARD_SCHEMA.names).take(rows) for rows in parts]
    return tables if len(tables) > 1 else tables[0]  # Ray takes one return value as it is


@ray.remote(num_cpus=0, max_retries=3)
def write_blocks(
    folder: str, path: str, encoding_hash: str, rows: list[list[int]], *blocks: pa.Table
) -> tuple[int, str]:
    """Writes these rows of each block as the shard `path`. Returns its size in bytes, and this node's address."""
    system, _ = resolve(folder)
    tables = (part for block, which in zip(blocks, rows, strict=True) for part in pick_rows(block, which))
    write_shard(system, path, encoding_hash, tables)
    return int(system.get_file_info(path).size or 0), ray.util.get_node_ip_address()


@dataclass(frozen=True)
class Block:
    """A block of ENCODED in Ray's object store, and the task of its facts, if any."""

    table: Any
    task: Any

    def facts(self) -> pa.Table:
        """The facts. Raises as `fetch`."""
        what = "the facts of a block"
        return fetch(self.task, what) if self.task else facts_of(fetch(self.table, what))


@dataclass
class Shard:
    """Clips of one bucket: `rows` of each of the `blocks`, and the facts of all."""

    bucket: str
    blocks: list[ObjectRef] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    facts: list[dict] = field(default_factory=list)
    bytes: int = 0
    """Bytes of latents and text."""
    since: float = field(default_factory=time.monotonic)
    """When the bucket's previous shard was started, or its first clip came."""
    path: str = ""
    size: int = 0
    """Bytes of the finished file."""

    def add(self, block: ObjectRef, rows: list[int], facts: list[dict]) -> None:
        """Adds rows of a block."""
        self.blocks.append(block)
        self.rows.append(rows)
        self.facts += facts
        self.bytes += sum(row["bytes"] for row in facts)

    def split(self, count: int) -> tuple[Shard, Shard]:
        """The first `count` rows, and the others."""
        first, rest = Shard(self.bucket), Shard(self.bucket)
        start = 0
        for block, rows in zip(self.blocks, self.rows, strict=True):
            facts = self.facts[start : start + len(rows)]
            taken = min(len(rows), max(0, count - start))
            start += len(rows)
            if taken:
                first.add(block, rows[:taken], facts[:taken])
            if taken == 0:
                rest.add(block, rows, facts)
            elif taken < len(rows):
                (copy,) = cut(block, [rows[taken:]])
                rest.add(copy, list(range(len(rows) - taken)), facts[taken:])
        return first, rest


class ShardWriters:
    """Collects the clips that the driver keeps, and has tasks write them as shards."""

    def __init__(self, folder: str, encoding_hash: str, shard_bytes: int):
        self.system, self.path = resolve(folder)
        self.folder = folder if "://" in folder else self.path  # Ray's workers have another working folder
        self.encoding_hash, self.number = encoding_hash, next_number(folder)
        store = ray.cluster_resources().get("object_store_memory", 0)
        self.max_bytes = HELD_SHARE * store
        self.shard_bytes = min(shard_bytes, self.max_bytes / HELD_SHARDS)
        self.collecting: dict[str, Shard] = {}
        self.running: dict[ObjectRef, Shard] = {}
        self.finished: list[Shard] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of the clips that are in no finished shard yet."""
        return sum(shard.bytes for shard in (*self.collecting.values(), *self.running.values()))

    def add(self, block: ObjectRef, rows: dict[str, list[int]], facts: list[dict]) -> None:
        """Adds rows of a block by bucket, and starts writers for full and late shards. May wait for writers.

        Raises as `fetch`.
        """
        parts = list(rows.values())
        tables = cut(block, parts) if len(parts) > 1 else [block] * len(parts)
        for table, (bucket, numbers) in zip(tables, rows.items(), strict=True):
            shard = self.collecting.setdefault(bucket, Shard(bucket))
            inside = list(range(len(numbers))) if len(parts) > 1 else numbers
            shard.add(table, inside, [facts[row] for row in numbers])
        for shard in list(self.collecting.values()):
            late = time.monotonic() - shard.since > MAX_WRITE_DELAY_S
            if (shard.bytes >= self.shard_bytes or late) and len(shard.facts) >= ROW_GROUP:
                while len(self.running) >= self._most_writers():
                    self._wait(WRITE_TIMEOUT_S)
                self._start(shard, len(shard.facts) - len(shard.facts) % ROW_GROUP)
        while self.held_bytes > self.max_bytes:
            if not self.running:
                most = max(self.collecting.values(), key=lambda shard: shard.bytes)
                self._start(most, len(most.facts))
            self._wait(WRITE_TIMEOUT_S)
        self._wait(0)

    def empty_text(self, block: ObjectRef) -> bytes:
        """The empty prompt's embedding, if the block has it. Raises as `fetch`."""
        what = "the empty prompt's embedding"
        return empty_text_of(fetch(block, what)) if single_node() else fetch(block_empty_text.remote(block), what)

    def take_finished(self) -> list[Shard]:
        """The shards that were finished since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def unwritten(self) -> set[str]:
        """The ids of the clips that are in no finished shard yet."""
        shards = (*self.collecting.values(), *self.running.values(), *self.finished)
        return {fact["sample_id"] for shard in shards for fact in shard.facts}

    def flush(self, timeout_s: float) -> None:
        """Writes all clips, and waits for it. Raises as `fetch`, after those shards that can be written."""
        errors: list[Exception] = []
        while self.collecting or self.running:
            running = len(self.running)
            try:
                if self.collecting and running < self._most_writers():
                    shard = next(iter(self.collecting.values()))
                    self._start(shard, len(shard.facts))
                else:
                    self._wait(timeout_s)
            except (UserError, PipelineStalled) as error:
                errors.append(error)
                if len(self.running) == running:  # no writer finishes any more
                    break
        if errors:
            raise errors[0]

    def cancel(self) -> None:
        """Ends all writers. Clips that are in no shard by then are encoded again by the next run."""
        for task in self.running:
            ray.cancel(task, force=True)
        self.collecting.clear()
        self.running.clear()

    def _most_writers(self) -> int:
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        return sum(min(WRITERS_PER_NODE, max(1, count // CPUS_OF_A_WRITER)) for count in cpus)

    def _start(self, shard: Shard, count: int) -> None:
        """Starts a writer for the first `count` clips."""
        first, rest = shard.split(count)
        del self.collecting[shard.bucket]
        if rest.facts:
            self.collecting[shard.bucket] = rest
        first.path = f"{self.path}/bucket={shard.bucket}/{shard_name(self.number)}"
        self.number += 1
        task = write_blocks.remote(self.folder, first.path, self.encoding_hash, first.rows, *first.blocks)
        self.running[task] = first

    def _wait(self, timeout_s: float) -> None:
        """Waits until a writer has finished. With `timeout_s` 0 it only takes what is finished already."""
        if not self.running:
            return
        done, _ = ray.wait(list(self.running), num_returns=1 if timeout_s else len(self.running), timeout=timeout_s)
        if timeout_s and not done:
            raise PipelineStalled(f"no shard was written for {timeout_s:.0f} s")
        for task in done:
            shard = self.running.pop(task)
            shard.size, node = fetch(task, f"the shard {shard.path}")
            self._check_visible(shard, node)
            self.finished.append(shard)

    def _check_visible(self, shard: Shard, node: str) -> None:
        until = time.monotonic() + VISIBLE_TIMEOUT_S
        while self.system.get_file_info(shard.path).size != shard.size:
            if time.monotonic() > until:
                raise UserError(
                    f"data.output: {shard.path} was written on node {node}, but this machine does not see it. Set "
                    "data.output to a folder that every node sees, or to a URI such as s3://bucket/shards",
                    code="paths",
                )
            time.sleep(0.2)


def single_node() -> bool:
    """Whether all blocks are on the driver's node."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def with_facts(blocks: Iterable[Any]) -> Iterator[Block]:
    """Starts a task for the facts of each block.

    On a single node the driver reads them in place, in shared memory, which copies no clip. A task would cost more:
    Ray ends idle workers after a second if there are more than CPUs, and a new one takes a second of CPU.
    """
    alone = single_node()
    for table in blocks:
        yield Block(table, None if alone else block_facts.remote(table))


def cut(block: ObjectRef, parts: list[list[int]]) -> list[ObjectRef]:
    """A small block for each part."""
    made = cut_block.options(num_returns=len(parts)).remote(block, parts)
    return made if isinstance(made, list) else [made]
