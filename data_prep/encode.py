"""The three stages between a row and a shard, each an actor that takes and gives Arrow tables.

What fails, fails clip by clip: a row that got a `reason` passes through the later stages untouched, since an exception
would end Ray Data's whole job. torch is imported by the actors that need it, not by the driver.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.buckets import Bucket
from data_prep.decoder import Decoder
from data_prep.reasons import ClipError
from data_prep.source import Row
from sora_train.codec import CodecConfig
from sora_train.places import resolve
from sora_train.schema import SHARD_SCHEMA, encode_row

REMEMBERED = 4096  # captions whose embeddings an actor keeps, so that each distinct one is embedded once
FAILED = pa.schema([("reason", pa.string()), ("message", pa.string())])
ROWS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)
KEPT = pa.schema([("content_hash", pa.string()), ("remark", pa.string())])
DECODED = pa.schema([*ROWS, *FAILED, *KEPT, pa.field("frames", pa.large_binary())])
WITH_LATENTS = pa.schema([*ROWS, *FAILED, *KEPT, pa.field("latents", pa.large_binary())])
ENCODED = pa.schema(
    [*SHARD_SCHEMA, *FAILED, pa.field("remark", pa.string()), pa.field("empty_text", pa.large_binary())]
)


@dataclass(frozen=True)
class Share:
    """How many workers a stage has, and what each takes."""

    workers: int
    cpus: float
    gpus: float = 0.0
    threads: int = 1


def share_out(cpus: int, gpus: int) -> tuple[Share, Share, Share]:
    """A cluster's processors among decoders, VAEs, and text encoders.

    Without GPUs the VAE is the work: its threads are on every core, and the others what they need beside it. With GPUs
    each holds a VAE and a text encoder, and the cores decode.
    """
    if gpus:
        spare = max(0.5, cpus - gpus)
        decoders = max(1, int(spare / 0.5) // 2)
        return Share(decoders, 0.5), Share(gpus, 0.25, 0.5), Share(gpus, 0.25, 0.5)
    vaes = -(-cpus // 4)
    decoders = -(-cpus // 2)
    return (
        Share(decoders, 0.25 * cpus / decoders),
        Share(vaes, 0.5 * cpus / vaes, threads=-(-cpus // vaes)),
        Share(1, 0.1, threads=-(-cpus // 4)),
    )


def to_table(rows: list[Row]) -> pa.Table:
    """Rows as the first stage takes them."""
    return pa.Table.from_pylist([asdict(row) for row in rows], ROWS)


class Decode:
    """Files to frames, through a child process."""

    def __init__(self, root: str, bucket: Bucket, timeout_s: float):
        self.system, _ = resolve(root)
        self.remote = "://" in root and not root.startswith("file:")
        self.decoder = Decoder(bucket, timeout_s)

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.decode(row) for row in table.to_pylist()], DECODED)

    def decode(self, row: dict) -> dict:
        try:
            clip = self.decoder.read(row["path"]) if not self.remote else self.fetched(row["path"])
        except ClipError as error:
            return row | {"reason": error.reason, "message": error.message}
        return row | {"frames": clip.frames.tobytes(), "content_hash": clip.content_hash, "remark": clip.remark}

    def fetched(self, path: str):
        """The clip of a remote file, by way of a temporary one: decoders seek."""
        with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as local:
            try:
                with self.system.open_input_stream(path) as file:
                    while chunk := file.read(1 << 22):
                        local.write(chunk)
            except OSError as error:
                raise ClipError("missing_file", f"can't be fetched: {error}") from None
            local.flush()
            return self.decoder.read(local.name)


class EncodeVideo:
    """Frames to raw latents, float32 until the row is made."""

    def __init__(self, codec: CodecConfig, bucket: Bucket, threads: int, device: str):
        import torch

        from sora_train.codec.vae import load_vae

        torch.set_num_threads(threads)
        self.bucket = bucket
        self.vae = load_vae(codec.vae, device)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.drop_columns(["frames"]).to_pylist()
        good = [i for i, row in enumerate(rows) if not row["reason"]]
        column, shape = table.column("frames"), (self.bucket.frames, self.bucket.height, self.bucket.width, 3)
        clips = [np.frombuffer(column[i].as_buffer(), np.uint8).reshape(shape) for i in good]
        for i, latents in zip(good, self.encode(clips), strict=True):
            failed = isinstance(latents, str)
            rows[i] |= {"reason": "encode_failed", "message": latents} if failed else {"latents": latents.tobytes()}
        return pa.Table.from_pylist(rows, WITH_LATENTS)

    def encode(self, clips: list[np.ndarray]) -> list[np.ndarray | str]:
        """Float32 latents of each clip, or what went wrong with it; a batch that fails is tried clip by clip."""
        import torch

        if not clips:
            return []
        try:
            return list(self.vae.encode(torch.from_numpy(np.stack(clips))).numpy())
        except RuntimeError as error:
            if len(clips) == 1:
                return [f"VAE: {error}"]
            return [self.encode([clip])[0] for clip in clips]


class EmbedText:
    """Captions to embeddings, and the row of the shard; the first row of each table carries the empty prompt's too.

    `shape` is that of a clip's latents, `[moments, f, c, h, w]`.
    """

    def __init__(self, codec: CodecConfig, shape: tuple[int, ...], threads: int, device: str):
        import torch

        from sora_train.codec.text import load_text_encoder

        torch.set_num_threads(threads)
        self.shape = shape
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.encoder = load_text_encoder(codec.text, codec.max_tokens, device, dtype)
        self.known: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        embeddings = self.embed({"", *(caption for row in rows if not row["reason"] for caption in row["captions"])})
        encoded = [self.encode(row, embeddings) for row in rows]
        encoded[0]["empty_text"] = embeddings[""].astype(np.float16).tobytes()
        return pa.Table.from_pylist(encoded, ENCODED)

    def embed(self, captions: set[str]) -> dict[str, np.ndarray]:
        """Float32 `[tokens, width]` of each caption."""
        new = sorted(captions - self.known.keys())
        self.known |= {caption: e.numpy() for caption, e in zip(new, self.encoder.encode(new), strict=True)}
        found = {caption: self.known[caption] for caption in captions}
        while len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return found

    def encode(self, row: dict, embeddings: dict[str, np.ndarray]) -> dict:
        """The row as the shard has it, or with its reason."""
        common = {name: row[name] for name in ("sample_id", "source", "start_s", "end_s", "captions")}
        failure = {name: row[name] for name in ("reason", "message", "remark")}
        if row["reason"]:
            return common | failure
        latents = np.frombuffer(row["latents"], np.float32).reshape(self.shape)
        try:
            return failure | encode_row(
                **common,
                source_size=row["size"],
                source_version=row["version"],
                content_hash=row["content_hash"],
                latents=latents,
                text=[embeddings[caption] for caption in row["captions"]],
            )
        except ValueError as error:
            return common | {"reason": "not_finite", "message": str(error)}
