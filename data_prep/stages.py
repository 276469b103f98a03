"""The three stages between a source and a shard, each an actor that takes and gives Arrow tables.

What fails, fails clip by clip: a row that has a `reason` passes through the later stages untouched, since an exception
would end Ray Data's whole job. torch is imported by the actors that need it, not by the driver.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import fs

from data_prep.reasons import ClipError
from data_prep.schemas import DECODED, ENCODED, END_OF_SOURCE, WITH_LATENTS
from data_prep.sources import data_root, sample_id
from data_prep.video.decode_process import Decoder
from data_prep.watchdog import DeviceLost
from sora_train.codec import CodecConfig
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.schema import bucket_size, encode_row
from sora_train.storage import resolve

CAPTION_BYTES = 2**30  # embeddings that an actor keeps, so that each distinct caption is embedded once

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def local_copy(system: fs.FileSystem, path: str) -> Iterator[str]:
    """A local path of a file; of a remote one by way of a temporary file, since decoders seek.

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


class Decode:
    """Sources to clips, through a child process; a source gives as many rows as clips, and then its END_OF_SOURCE."""

    def __init__(self, data: DataConfig, selection: SelectionConfig, vae_batch_size: int):
        self.system, _ = resolve(data_root(data))
        self.decoder = Decoder(data, selection)
        self.vae_batch_size = vae_batch_size

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        pending: list[dict] = []
        good = 0
        for source in table.to_pylist():
            for clip in self.clips(source):
                pending.append(clip)
                good += "frames" in clip
                if good >= self.vae_batch_size:
                    yield pa.Table.from_pylist(pending, DECODED)
                    pending, good = [], 0
        if pending:
            yield pa.Table.from_pylist(pending, DECODED)

    def clips(self, source: dict) -> Iterator[dict]:
        """Rows of DECODED for one source."""
        common = {name: source[name] for name in ("row_id", "source", "captions", "size", "version")}
        whole = common | {"sample_id": source["row_id"], "start_s": 0.0, "end_s": 0.0}
        asked: list[str] = []
        remarks: set[str] = set()
        done = set(source["done"])
        try:
            with local_copy(self.system, source["path"]) as path:
                cut = self.decoder.plan_clips(path)
                remark = cut.remark
                remarks.add(remark)
                for span in cut.spans:
                    sample = sample_id(source["source"], span.start_s, span.end_s, tuple(source["captions"]))
                    asked.append(sample)
                    if sample in done or f"{span.bucket.name}/{sample}" in done:
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


class EncodeVideo:
    """Frames to raw latents, float32 until the row is made."""

    def __init__(self, codec: CodecConfig, threads: int, device: str):
        import torch

        from sora_train.codec.vae import vae_of

        torch.set_num_threads(threads)
        self.vae = vae_of(codec, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.drop_columns(["frames"]).to_pylist()
        column = table.column("frames")
        by_bucket: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if not row["reason"]:
                by_bucket.setdefault(row["bucket"], []).append(i)
        for bucket, places in by_bucket.items():
            clips = [np.frombuffer(column[i].as_buffer(), np.uint8).reshape(*bucket_size(bucket), 3) for i in places]
            for i, latents in zip(places, run_batch(self.encode, clips, "VAE", self.vae.model.device), strict=True):
                if isinstance(latents, str):
                    rows[i] |= {"reason": "encode_failed", "message": latents}
                else:
                    rows[i] |= {"latents": latents.tobytes()}
        return with_notes(rows, self.vae.remarks, WITH_LATENTS)

    def encode(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """Float32 latents of each clip."""
        import torch

        return list(self.vae.encode(torch.from_numpy(np.stack(clips))).numpy())


class EmbedText:
    """Captions to embeddings, and the row of the shard; the first row of each table carries the empty prompt's too.

    `moments` and `latent_shapes`, axes `f c h w` per bucket, say how the latents lie in their bytes.
    """

    def __init__(
        self,
        codec: CodecConfig,
        moments: int,
        latent_shapes: dict[str, tuple[int, ...]],
        batch: int,
        threads: int,
        device: str,
    ):
        import torch

        from sora_train.codec.text import text_encoder_of

        torch.set_num_threads(threads)
        self.moments, self.latent_shapes = moments, latent_shapes
        self.encoder = text_encoder_of(codec, device, batch)
        self.empty_text: bytes | None = None
        self.known: OrderedDict[str, np.ndarray] = OrderedDict()
        self.known_bytes = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        embeddings = self.embed({*(caption for row in rows if not row["reason"] for caption in row["captions"])})
        encoded = [self.encode(row, embeddings) for row in rows]
        encoded[0]["empty_text"] = self.null()
        return with_notes(encoded, self.encoder.remarks, ENCODED)

    def null(self) -> bytes | None:
        """The empty prompt's embedding, made once; None while the encoder fails on it."""
        from sora_train.codec.text import null_tokens

        if self.empty_text is None:
            (made,) = run_batch(lambda _: [null_tokens(self.encoder)], [""], "text encoder", self.encoder.model.device)
            self.empty_text = made if isinstance(made, bytes) else None
        return self.empty_text

    def embed(self, captions: set[str]) -> dict[str, np.ndarray | str]:
        """Float16 `[tokens, width]` of each caption, infinite where that overflows; or what went wrong with it."""
        new = sorted(captions - self.known.keys())
        found: dict[str, np.ndarray | str] = {}
        embedded = run_batch(self.encoder.encode, new, "text encoder", self.encoder.model.device)
        for caption, embedding in zip(new, embedded, strict=True):
            if isinstance(embedding, str):
                found[caption] = embedding
                continue
            with np.errstate(over="ignore"):
                self.known[caption] = embedding.numpy().astype(np.float16)
            self.known_bytes += self.known[caption].nbytes
        for caption in captions - found.keys():
            self.known.move_to_end(caption)
            found[caption] = self.known[caption]
        while self.known_bytes > CAPTION_BYTES:
            self.known_bytes -= self.known.popitem(last=False)[1].nbytes
        return found

    def encode(self, row: dict, embeddings: dict[str, np.ndarray | str]) -> dict:
        """The row with all that the shard has, or with its reason."""
        latents = row.pop("latents")
        if row["reason"]:
            return row
        text = [embeddings[caption] for caption in row["captions"]]
        if failed := [message for message in text if isinstance(message, str)]:
            return row | {"reason": "encode_failed", "message": failed[0]}
        good = [embedding for embedding in text if not isinstance(embedding, str)]
        shape = (self.moments, *self.latent_shapes[row["bucket"]])
        try:
            return row | encode_row(
                **{name: row[name] for name in ("sample_id", "source", "start_s", "end_s", "captions")},
                source_size=row["size"],
                source_version=row["version"],
                content_hash=row["content_hash"],
                perceptual_hash=row["perceptual_hash"],
                latents=np.frombuffer(latents, np.float32).reshape(shape),
                text=good,
            )
        except ValueError as error:
            return row | {"reason": "not_finite", "message": str(error)}


def run_batch(
    work: Callable[[list[A]], list[B]], items: list[A], name: str, device: torch.device | str
) -> list[B | str]:
    """What `work` makes of each item, or the error message of one that fails alone. A batch that fails is tried again
    item by item.

    Raises DeviceLost where the device itself no longer works: that is no item's fault.
    """
    from sora_train.codec.memory import still_works

    try:
        return list(work(items))
    except (RuntimeError, MemoryError) as error:
        if not still_works(device):
            raise DeviceLost(f"{name}: {device} no longer works: {error}") from None
        if len(items) == 1:
            return [f"{name}: {error}"]
    return [run_batch(work, [item], name, device)[0] for item in items]  # not above: the error holds the batch's memory


def with_notes(rows: list[dict], remarks: list[str], schema: pa.Schema) -> pa.Table:
    """Rows as a table, of which the first carries what a network had to say; `remarks` is emptied."""
    if remarks:
        rows[0]["note"] = "; ".join(filter(None, (rows[0]["note"], *remarks)))
        remarks.clear()
    return pa.Table.from_pylist(rows, schema)
