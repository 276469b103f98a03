"""The Ray Data pipeline: decode -> VAE -> text encoder -> writers, and the CPUs and GPUs of each stage."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.buckets import buckets_of
from data_prep.progress import Progress
from data_prep.resume import PendingSource
from data_prep.schemas import to_table
from data_prep.sink import ShardSink
from data_prep.watchdog import ENDING_TIMEOUT_S, PipelineStalled, with_watchdog
from sora_train.codec.files import VaeFiles
from sora_train.data.config import PrepConfig
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.recipe import Recipe

if TYPE_CHECKING:
    from data_prep.writers import Block

BLOCK_BYTES, BLOCK_BYTES_GPU = 2**23, 2**27  # of the frames in a block between two stages, which is a batch of the VAE
BLOCK_SOURCES = 32
ROUND_SOURCES, ROUND_BLOCKS = 400_000, 50_000
"""Sources, and blocks of them, that are handed to Ray Data at once. The stages start again for each such round, which
takes as long as loading the VAE and the text encoder; each block takes 1.4 ms before that, and 13 kB of the driver."""


def run_pipeline(recipe: Recipe, vae: VaeFiles, sink: ShardSink) -> None:
    """Sends the sources still to do through the stages and into the sink.

    Raises UserError if too many sources are bad, or a shard can't be written. Raises PipelineStalled if Ray waits for
    something that is lost, or a GPU fails. The stages' actors and the writers have ended then, and clips that were
    encoded are written.
    """
    from data_prep.executor import end_execution
    from sora_train.ray_cluster.connection import connect, resources_in_use

    total = sink.state.pending
    with connect(recipe.cluster.address) as own, Progress(total, run=recipe.name) as progress:
        if not own and (held := resources_in_use()):
            log.info(f"prep: other jobs of this cluster hold {held}; prep waits for what it lacks")
        try:
            try:
                for todo in sink.state.rounds(min(ROUND_SOURCES, ROUND_BLOCKS * block_sources(recipe))):
                    with closing(with_watchdog(run_stages(recipe, vae, todo), end_execution)) as blocks:
                        for block in blocks:
                            facts = block.facts()
                            began = time.monotonic()
                            counts = sink.consume(facts, block.table)
                            progress.add(*counts, sink.stats.reasons, facts, time.monotonic() - began)
            except BaseException:
                with contextlib.suppress(UserError, PipelineStalled):
                    sink.flush(ENDING_TIMEOUT_S)
                raise
            sink.flush()
        except PipelineStalled as error:
            error.made_progress = sink.shards > 0
            raise


def run_stages(recipe: Recipe, vae: VaeFiles, todo: list[PendingSource]) -> Iterator[Block]:
    """Yields blocks of ENCODED, in the order of `todo`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from data_prep.executor import lost_means_stalled, record_executor
    from data_prep.stages import Decode, EmbedText, EncodeVideo
    from data_prep.writers import with_facts

    quiet_ray_data()
    record_executor()
    context = DataContext.get_current()
    context.execution_options.preserve_order = True  # the same captions give the same shards
    total = ray.cluster_resources()
    allocation = allocate_cpus(int(total.get("CPU", 1)), int(total.get("GPU", 0)), recipe.prep)
    device = "cuda" if allocation.vae.gpus else "cpu"
    batch = vae_batch_size(recipe, gpus=allocation.vae.gpus)
    # Ray merges what Decode yields until it has more bytes than this; with its own 128 MiB the VAE would get that much.
    context.target_max_block_size = batch * max(bucket.clip_bytes for bucket in buckets_of(recipe.data))

    def stage(dataset: ray.data.Dataset, actor: type, resources: StageResources, **arguments: object):
        pool = ActorPoolStrategy(size=resources.workers)
        return dataset.map_batches(
            actor, fn_constructor_kwargs=arguments, batch_size=None, batch_format="pyarrow",
            compute=pool, num_cpus=resources.cpus, num_gpus=resources.gpus or None,
        )  # fmt: skip

    codec = recipe.codec.absolute()  # Ray's workers have another working folder
    size = max(1, min(block_sources(recipe), -(-len(todo) // (2 * allocation.decode.workers))))
    # Unlike `from_arrow` it starts no task for each block.
    sources = ray.data.from_blocks([to_table(todo[i : i + size]) for i in range(0, len(todo), size)])
    clips = stage(sources, Decode, allocation.decode, data=recipe.data, selection=recipe.selection, batch=batch)
    latents = stage(clips, EncodeVideo, allocation.vae, codec=codec, threads=allocation.vae.threads, device=device)
    shapes = {b.name: (vae.moments, *vae.latent_shape(b.frames, b.height, b.width)) for b in buckets_of(recipe.data)}
    encoded = stage(
        latents, EmbedText, allocation.text, codec=codec, latent_shapes=shapes, batch=recipe.prep.text_batch,
        threads=allocation.text.threads, device=device if allocation.text.gpus else "cpu",
    )  # fmt: skip
    encoded.set_name(f"prep {recipe.name}")  # as Ray's dashboard and metrics show it
    with lost_means_stalled("a block of clips"):
        yield from with_facts(ref for bundle in encoded.iter_internal_ref_bundles() for ref in bundle.block_refs)


def block_sources(recipe: Recipe) -> int:
    """Most sources in a block. Call it while connected to Ray."""
    import ray

    return min(BLOCK_SOURCES, vae_batch_size(recipe, ray.cluster_resources().get("GPU", 0)))


def quiet_ray_data() -> None:
    """Turns off Ray Data's own progress output; `sora` has progress lines of its own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else DeviceLost would be wrapped
    context.issue_detectors_config.detectors = []  # they warn of the memory that importing torch takes
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that the bars are off


def vae_batch_size(recipe: Recipe, gpus: float) -> int:
    """Clips that travel between two stages in one block, which is a batch of the VAE."""
    block = BLOCK_BYTES_GPU if gpus else BLOCK_BYTES
    return recipe.prep.vae_batch or max(1, block // max(bucket.clip_bytes for bucket in buckets_of(recipe.data)))


@dataclass(frozen=True)
class StageResources:
    """The number of workers of a stage, and the resources of each."""

    workers: int
    cpus: float
    gpus: float = 0.0
    threads: int = 1


@dataclass(frozen=True)
class Allocation:
    """The resources of the three stages."""

    decode: StageResources
    vae: StageResources
    text: StageResources


def allocate_cpus(cpus: int, gpus: int, prep: PrepConfig) -> Allocation:
    """Divides a cluster's CPUs and GPUs among the stages, by its size where `prep` gives no number.

    Without GPUs the VAE is the bottleneck: one process per core, at most eight, which then take several threads each
    (two processes with one thread were 1.06 to 1.2 times as fast as one with two). The other stages are mostly idle.
    With GPUs each holds a VAE, one in eight also a text encoder, and the CPUs decode.
    """
    if gpus:
        text = StageResources(prep.text_workers or -(-gpus // 8), 0.25, prep.text_gpus or 0.25)
        vae = StageResources(prep.vae_workers or gpus, 0.25, prep.vae_gpus or 0.75)
        spare = max(0.5, cpus - text.workers * text.cpus - vae.workers * vae.cpus - 1)
        decoders = prep.decode_workers or max(1, int(spare))
        return Allocation(StageResources(decoders, min(1.0, spare / decoders)), vae, text)
    vaes = prep.vae_workers or min(cpus, 8)
    decoders = prep.decode_workers or -(-cpus // 2)
    texts = prep.text_workers or 1
    return Allocation(
        StageResources(decoders, 0.25 * cpus / decoders),
        StageResources(vaes, 0.5 * cpus / vaes, threads=-(-cpus // vaes)),
        StageResources(texts, 0.1 * cpus / texts / 2, threads=max(1, cpus // 4)),
    )
