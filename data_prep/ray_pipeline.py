"""One chain of Ray Data: sources -> clips -> VAE -> text, and what comes out of it brought in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from data_prep.buckets import Bucket, buckets_of
from data_prep.progress import Progress
from data_prep.resume import PendingSource
from data_prep.schemas import to_table
from data_prep.sink import ShardSink
from data_prep.watchdog import PipelineStalled, with_watchdog
from data_prep.workers import StageResources, allocate_cpus
from sora_train.codec.files import VaeFiles
from sora_train.log import log
from sora_train.recipe import Recipe

BLOCK_BYTES, BLOCK_BYTES_GPU = 2**23, 2**27  # frames that travel between two stages at once: the VAE's batch
BLOCK_SOURCES = 32


def encode(
    recipe: Recipe, buckets: tuple[Bucket, ...], vae: VaeFiles, todo: list[PendingSource], sink: ShardSink
) -> None:
    """Sends sources down the chain and brings in what comes out. Raises UserError where too many are bad, and
    PipelineStalled where Ray waits without end for what it lost, or a GPU fails: this process has left Ray then.
    """
    import ray

    from sora_train.ray_cluster.connection import connect, resources_in_use

    with connect(recipe.cluster.address, log_to_driver=False) as own, Progress(len(todo), run=recipe.name) as progress:
        if not own and (held := resources_in_use()):
            log.info(f"prep: other jobs of this cluster hold {held}; prep waits for what it lacks")
        failures, seen, reasons = sink.stats.failures, 0, Counter[str]()
        try:
            for table in with_watchdog(run_stages(recipe, buckets, vae, todo)):
                counts = sink.consume(table)
                reasons.update(failure["reason"] for failure in failures[seen:])
                seen = len(failures)
                progress.add(*counts, reasons)
        except PipelineStalled as error:
            error.made_progress = progress.written > 0
            ray.shutdown()  # only this frees actors that hang, also in a Ray that the caller had connected to
            raise


def run_stages(
    recipe: Recipe, buckets: tuple[Bucket, ...], vae: VaeFiles, todo: list[PendingSource]
) -> Iterator[pa.Table]:
    """Tables of ENCODED, in the order of `todo`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from data_prep.stages import Decode, EmbedText, EncodeVideo

    quiet_ray_data()
    DataContext.get_current().execution_options.preserve_order = True  # the same captions give the same shards
    total = ray.cluster_resources()
    allocation = allocate_cpus(int(total.get("CPU", 1)), int(total.get("GPU", 0)), recipe.prep)
    device = "cuda" if allocation.vae.gpus else "cpu"
    at_once = vae_batch_size(recipe, gpus=allocation.vae.gpus)
    shapes = {b.name: vae.latent_shape(b.frames, b.height, b.width) for b in buckets}

    def stage(dataset: ray.data.Dataset, work: type, share: StageResources, **arguments: object) -> ray.data.Dataset:
        pool = ActorPoolStrategy(size=share.workers)
        return dataset.map_batches(
            work, fn_constructor_kwargs=arguments, batch_size=None, batch_format="pyarrow",
            compute=pool, num_cpus=share.cpus, num_gpus=share.gpus or None,
        )  # fmt: skip

    codec = recipe.codec.absolute()  # Ray's workers have another working folder
    size = max(1, min(BLOCK_SOURCES, at_once, -(-len(todo) // (2 * allocation.decode.workers))))
    sources = ray.data.from_arrow([to_table(todo[i : i + size]) for i in range(0, len(todo), size)])
    clips = stage(
        sources, Decode, allocation.decode, data=recipe.data, selection=recipe.selection, vae_batch_size=at_once
    )
    latents = stage(clips, EncodeVideo, allocation.vae, codec=codec, threads=allocation.vae.threads, device=device)
    encoded = stage(
        latents, EmbedText, allocation.text, codec=codec, moments=vae.moments, latent_shapes=shapes,
        batch=recipe.prep.text_batch, threads=allocation.text.threads, device=device if allocation.text.gpus else "cpu",
    )  # fmt: skip
    encoded.set_name(f"prep {recipe.name}")  # as Ray's dashboard and metrics show it
    for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


def quiet_ray_data() -> None:
    """Keeps Ray Data from telling of itself: `sora` has progress lines of its own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # DeviceLost stays one
    context.issue_detectors_config.detectors = []  # they warn of the memory that importing torch takes
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that the bars are off


def vae_batch_size(recipe: Recipe, gpus: float) -> int:
    """Clips that travel between two stages at once, which is what the VAE gets."""
    block = BLOCK_BYTES_GPU if gpus else BLOCK_BYTES
    return recipe.prep.vae_batch or max(1, block // max(bucket.clip_bytes for bucket in buckets_of(recipe.data)))
