"""Opens the headers of a sample of the sources: clips per bucket and length, or the reason for none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from pyarrow import fs

from data_prep.lookup import data_root
from data_prep.reasons import ClipError
from data_prep.sources import SourceRow
from data_prep.stages import local_copy
from data_prep.video.decode_process import Decoder
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.log import log
from sora_train.provenance import usable_cores
from sora_train.storage import resolve

T = TypeVar("T")
MAX_FILES, MAX_REMOTE_FILES = 2000, 100  # opened; remote ones are fetched whole


@dataclass(frozen=True)
class ProbeResult:
    """One file: clips per bucket and length; or the reason for no clip."""

    clips: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    message: str = ""


def pick_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items, evenly spaced, the first among them."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def probe_files(rows: list[SourceRow], data: DataConfig, selection: SelectionConfig) -> dict[str, ProbeResult]:
    """Opens an even sample of the rows' files, by path. Logs its progress every 5 s."""
    system, _ = resolve(data_root(data))
    files = list(dict.fromkeys(row.path for row in rows))
    sample = pick_evenly(files, MAX_FILES if isinstance(system, fs.LocalFileSystem) else MAX_REMOTE_FILES)
    decoders = [Decoder(data, selection) for _ in range(max(1, min(8, usable_cores(), len(sample) // 8)))]
    free: SimpleQueue[Decoder] = SimpleQueue()
    for decoder in decoders:
        free.put(decoder)

    def probe(path: str) -> ProbeResult:
        decoder = free.get()
        try:
            with local_copy(system, path) as local:
                plan = decoder.plan_clips(local, headers_only=True)
            clips = Counter(span.bucket.name for span in plan.spans)
            return ProbeResult(dict(clips), plan.seconds)
        except ClipError as error:
            return ProbeResult(reason=error.reason, message=error.message)
        finally:
            free.put(decoder)

    results: dict[str, ProbeResult] = {}
    logged = time.monotonic()
    pool = ThreadPoolExecutor(len(decoders))
    try:
        for path, result in zip(sample, pool.map(probe, sample), strict=True):
            results[path] = result
            if time.monotonic() - logged >= 5:
                logged = time.monotonic()
                log.info(f"plan: {len(results)} of {len(sample)} files opened")
    finally:
        pool.shutdown(cancel_futures=True)
        for decoder in decoders:
            decoder.close()
    return results
