"""The stages between a source and a shard: decode, VAE, text encoder. Each is a Ray actor from Arrow table to table.

Failures cost single clips: a row with a `reason` passes through the later stages unchanged, since an exception would
end the whole Ray Data job. Only the actors that need torch import it, not the driver.
"""

from __future__ import annotations

import functools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import fs

from data_prep.lookup import data_root
from data_prep.reasons import ClipError
from data_prep.schemas import CLIPS, DECODED, ENCODED, END_OF_SOURCE, NOT_STARTED, SOURCE, WITH_LATENTS
from data_prep.sources import sample_id
from data_prep.video.decode_process import Decoder
from data_prep.watchdog import DeviceLost
from sora_train.codec import CodecConfig
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError, error_line
from sora_train.schema import SHARD_SCHEMA, bucket_size, encode_row
from sora_train.storage import resolve

CACHE_BYTES = 2**30
"""Embeddings that an actor caches, to embed each distinct caption once. A full cache is emptied."""

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def local_copy(system: fs.FileSystem, path: str) -> Iterator[str]:
    """A local path of a file. A remote file is copied to a temporary one, since decoders seek.

    Raises ClipError `fetch_failed`.
    """
    if isinstance(system, fs.LocalFileSystem):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as local:
        try:
            with system.open_input_stream(path) as file:
                while chunk := file.read(1 << 22):
                    local.write(chunk)
            local.flush()
        except OSError as error:
            raise ClipError("fetch_failed", f"{path} can't be fetched: {error}") from None
        yield local.name


def report_start_error(schema: pa.Schema) -> Callable[[type[A]], type[A]]:
    """Makes a stage whose constructor fails return, for each table, a row NOT_STARTED with the message.

    If the constructor raised, Ray would restart the actor and print a traceback each time; if the first call raised,
    Ray Data would add two.
    """

    def decorate(stage: type[A]) -> type[A]:
        construct, call = stage.__init__, stage.__call__

        @functools.wraps(construct)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            self.start_error = ""
            try:
                construct(self, *args, **kwargs)
            except UserError as error:
                self.start_error = str(error)
            except Exception as error:
                why = f"a worker of prep ({stage.__name__}) can't start: {error_line(error)}"
                self.start_error = f"{why}. If memory ran out, lower prep.vae_workers or prep.text_workers"

        def process(self: Any, table: pa.Table) -> Any:
            if not self.start_error:
                return call(self, table)
            (row,) = table.slice(0, 1).to_pylist()
            failed = {"reason": NOT_STARTED, "message": self.start_error}
            return pa.Table.from_pylist([row if row.get("reason") == NOT_STARTED else row | failed], schema)

        stage.__init__, stage.__call__ = init, process
        return stage

    return decorate


@report_start_error(DECODED)
class Decode:
    """Sources to clips, by a child process. The rows of a source are its clips, then an END_OF_SOURCE."""

    def __init__(self, data: DataConfig, selection: SelectionConfig, batch: int):
        self.system, _ = resolve(data_root(data))
        self.decoder = Decoder(data, selection)
        self.batch = batch

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        pending: list[dict] = []
        good, began = 0, time.monotonic()
        for source in table.to_pylist():
            for clip in self.clips(source):
                pending.append(clip)
                good += "frames" in clip
                if good >= self.batch:
                    add_work(pending, "decode", began)
                    yield pa.Table.from_pylist(pending, DECODED)
                    pending, good, began = [], 0, time.monotonic()
        if pending:
            add_work(pending, "decode", began)
            yield pa.Table.from_pylist(pending, DECODED)

    def clips(self, source: dict) -> Iterator[dict]:
        """Rows of DECODED for one source."""
        common = {name: source[name] for name in SOURCE}
        whole = common | {"sample_id": source["row_id"], "start_s": 0.0, "end_s": 0.0}
        asked: list[str] = []
        remarks: set[str] = set()
        skip = set(source["skip"])
        try:
            with local_copy(self.system, source["path"]) as path:
                cut = self.decoder.plan_clips(path)
                remark = cut.remark
                remarks.add(remark)
                for span in cut.spans:
                    sample = sample_id(source["source"], span.start_s, span.end_s, tuple(source["captions"]))
                    asked.append(sample)
                    if sample in skip or f"{span.bucket.name}/{sample}" in skip:
                        continue
                    row = common | {"sample_id": sample, "start_s": span.start_s, "end_s": span.end_s}
                    row |= {"bucket": span.bucket.name, "remark": remark}
                    try:
                        clip = self.decoder.read(path, span, sample)
                    except ClipError as error:
                        yield row | {"reason": error.reason, "message": error.message}
                        continue
                    remarks.add(clip.remark)
                    row |= {"content_hash": clip.content_hash, "perceptual_hash": clip.perceptual_hash}
                    yield row | {"frames": clip.frames.tobytes(), "remark": clip.remark or remark}
                    remark = ""
        except ClipError as error:
            asked = [source["row_id"]]
            yield whole | {"reason": error.reason, "message": error.message}
        yield whole | {"reason": END_OF_SOURCE, "asked": asked, "remark": "; ".join(sorted(filter(None, remarks)))}


@report_start_error(WITH_LATENTS)
class EncodeVideo:
    """Frames to raw latents by the VAE, in float32."""

    def __init__(self, codec: CodecConfig, threads: int, device: str):
        import torch

        from sora_train.codec.vae import vae_of

        torch.set_num_threads(threads)
        self.vae = vae_of(codec, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        began, rows = time.monotonic(), table.drop_columns(["frames"]).to_pylist()
        column = table.column("frames")
        by_bucket: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if not row["reason"]:
                by_bucket.setdefault(row["bucket"], []).append(i)
        for bucket, indices in by_bucket.items():
            clips = [np.frombuffer(column[i].as_buffer(), np.uint8).reshape(*bucket_size(bucket), 3) for i in indices]
            encoded = run_batch(self.encode, clips, "VAE", self.vae.model.device)
            for i, latents in zip(indices, encoded, strict=True):
                if isinstance(latents, str):
                    rows[i] |= {"reason": "encode_failed", "message": latents}
                else:
                    rows[i] |= {"latents": latents.tobytes()}
        add_work(rows, "VAE", began)
        return with_notes(rows, self.vae.remarks, WITH_LATENTS)

    def encode(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """Float32 latents of each clip."""
        import torch

        return list(self.vae.encode(torch.from_numpy(np.stack(clips))).numpy())


@report_start_error(ENCODED)
class EmbedText:
    """Captions to embeddings by the text encoder, and complete shard rows.

    The first row of each table also has the empty prompt's embedding. `latent_shapes` are those of a bucket's latents
    `[moments, f, c, h, w]`.
    """

    def __init__(
        self, codec: CodecConfig, latent_shapes: dict[str, tuple[int, ...]], batch: int, threads: int, device: str
    ):
        import torch

        from sora_train.codec.text import text_encoder_of

        torch.set_num_threads(threads)
        self.latent_shapes = latent_shapes
        self.encoder = text_encoder_of(codec, device, batch)
        self.empty_text: bytes | None = None
        self.cache: dict[str, np.ndarray] = {}

    def __call__(self, table: pa.Table) -> pa.Table:
        began, rows = time.monotonic(), table.to_pylist()
        embeddings = self.embed({caption for row in rows if not row["reason"] for caption in row["captions"]})
        encoded = [self.encode(row, embeddings) for row in rows]
        encoded[0]["empty_text"] = self.empty_prompt()
        add_work(encoded, "text encoder", began)
        return with_notes(encoded, self.encoder.remarks, ENCODED)

    def empty_prompt(self) -> bytes | None:
        """The empty prompt's embedding, computed once; None if the encoder fails on it."""
        from sora_train.codec.text import null_tokens

        if self.empty_text is None:
            (made,) = run_batch(lambda _: [null_tokens(self.encoder)], [""], "text encoder", self.encoder.model.device)
            self.empty_text = made if isinstance(made, bytes) else None
        return self.empty_text

    def embed(self, captions: set[str]) -> dict[str, np.ndarray | str]:
        """Float16 `[tokens, width]` of each caption, infinite if that overflows; or the error message."""
        if sum(embedding.nbytes for embedding in self.cache.values()) > CACHE_BYTES:
            self.cache.clear()
        new = sorted(captions - self.cache.keys())
        failed: dict[str, np.ndarray | str] = {}
        embedded = run_batch(self.encoder.encode, new, "text encoder", self.encoder.model.device)
        for caption, embedding in zip(new, embedded, strict=True):
            if isinstance(embedding, str):
                failed[caption] = embedding
                continue
            with np.errstate(over="ignore"):
                self.cache[caption] = embedding.numpy().astype(np.float16)
        return failed | {caption: self.cache[caption] for caption in captions - failed.keys()}

    def encode(self, row: dict, embeddings: dict[str, np.ndarray | str]) -> dict:
        """The row with all columns of the shard, or with the reason why it has none."""
        latents = row.pop("latents")
        if row["reason"] == END_OF_SOURCE and any(map(self.encoder.cut_off, row["captions"])):
            row["remark"] = "; ".join(filter(None, (row["remark"], "long_caption: has more than codec.max_tokens")))
        if row["reason"]:
            return row
        text = [embeddings[caption] for caption in row["captions"]]
        if failed := [message for message in text if isinstance(message, str)]:
            return row | {"reason": "encode_failed", "message": failed[0]}
        try:
            return row | encode_row(
                **{name: row[name] for name in CLIPS.names if name in SHARD_SCHEMA.names},
                latents=np.frombuffer(latents, np.float32).reshape(self.latent_shapes[row["bucket"]]),
                text=[embedding for embedding in text if not isinstance(embedding, str)],
            )
        except ValueError as error:
            return row | {"reason": "not_finite", "message": str(error)}


def run_batch(
    work: Callable[[list[A]], list[B]], items: list[A], network: str, device: torch.device | str
) -> list[B | str]:
    """The result of `work` for each item, or an error message. If a batch fails, its items are tried one by one.

    Raises DeviceLost if the device itself no longer works, since then no item is at fault.
    """
    from sora_train.codec.memory import still_works

    try:
        return list(work(items))
    except (RuntimeError, MemoryError) as error:
        if not still_works(device):
            raise DeviceLost(f"{network}: {device} no longer works: {error}") from None
        if len(items) == 1:
            return [f"{network}: {error}"]
    return [run_batch(work, [item], network, device)[0] for item in items]  # here the error's memory is free again


def add_work(rows: list[dict], stage: str, began: float) -> None:
    """Has the first row carry how long this process worked on the rows."""
    worker = f"{socket.gethostname()} {os.getpid()}"
    work = {"stage": stage, "worker": worker, "seconds": time.monotonic() - began}
    rows[0]["work"] = [*(rows[0].get("work") or []), work]


def with_notes(rows: list[dict], remarks: list[str], schema: pa.Schema) -> pa.Table:
    """Rows as a table, whose first row carries a network's remarks; empties `remarks`."""
    if remarks:
        rows[0]["note"] = "; ".join(filter(None, (rows[0]["note"], *remarks)))
        remarks.clear()
    return pa.Table.from_pylist(rows, schema)
