"""How a cluster's processors are shared among the stages of `sora prep`. Arithmetic, but for `cores`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sora_train.data.config import PrepConfig


@dataclass(frozen=True)
class StageResources:
    """How many workers a stage has, and what each takes."""

    workers: int
    cpus: float
    gpus: float = 0.0
    threads: int = 1


@dataclass(frozen=True)
class Allocation:
    """The three stages' allocation."""

    decode: StageResources
    vae: StageResources
    text: StageResources


def allocate_cpus(cpus: int, gpus: int, prep: PrepConfig) -> Allocation:
    """A cluster's processors among decoders, VAEs and text encoders, as `prep` has it or else by the cluster's size.

    Without GPUs the VAE is the work: a process on every core, but no more than eight, which then take several threads
    each (two processes of a thread were 1.06 to 1.2 times as fast as one of two threads); the others take what is left
    over, being mostly idle. With GPUs each holds a VAE, one in eight a text encoder beside it, and the cores decode.
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


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
