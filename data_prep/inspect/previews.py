"""Previews for the page: clips decoded from their latents, next to the same clips cut from their sources."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pyarrow import fs

from data_prep.buckets import Bucket
from data_prep.estimate.probe import pick_evenly
from data_prep.files import FileFinder, relative_name
from data_prep.inspect.table import Inventory, opened_parquet
from data_prep.lookup import data_root
from data_prep.reasons import ClipError
from data_prep.stages import local_copy
from data_prep.video.clips import ClipSpan
from data_prep.video.decode_process import Decoder
from sora_train.codec import DTYPES
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError, one_line
from sora_train.log import log, progress
from sora_train.manifest import Manifest
from sora_train.schema import bucket_of, bucket_size
from sora_train.storage import resolve
from sora_train.video import GROUND, frame_strip, psnr

if TYPE_CHECKING:
    from sora_train.codec.vae import Vae

COLUMNS = ["sample_id", "source", "content_hash", "start_s", "end_s", "captions", "tokens", "latents"]
WIDTH, MAX_HEIGHT = 1000, 180  # pixels: of all images of a clip side by side, and of one frame
COLUMNS_SHOWN = 5  # frames of the strip
MAX_FRAMES = 32  # of the animation: a longer clip shows every second frame, or every third
MAX_CAPTIONS, MAX_LETTERS = 6, 600


def previews(inventory: Inventory, manifest: Manifest, clips: int, root: str, models: str) -> Iterator[dict]:
    """Per bucket that has clips, up to `clips` of them for the template."""
    buckets = [bucket for bucket in sorted(inventory.buckets, key=bucket_size) if inventory.buckets[bucket]]
    if not buckets or not clips:
        return
    vae, sources = load_manifest_vae(manifest, models), SourceFrames(manifest, root)
    total, done, reported = sum(min(clips, inventory.buckets[bucket]) for bucket in buckets), 0, time.monotonic()
    try:
        for bucket in buckets:
            shown: list[dict] = []
            for row in read_rows_at(inventory, bucket, pick_evenly(range(inventory.buckets[bucket]), clips)):
                shown.append(preview(row, bucket, manifest, vae, sources))
                done += 1
                while vae.remarks:
                    log.warning(f"inspect: {vae.remarks.pop(0)}")
                if time.monotonic() - reported > 5:
                    reported = time.monotonic()
                    progress(f"inspect: {done} of {total} clips decoded")
            yield {"name": bucket, "clips": shown, "of": inventory.buckets[bucket]}
    finally:
        sources.close()


def load_manifest_vae(manifest: Manifest, models: str) -> Vae:
    """The VAE that encoded the latents. Raises UserError if it can't be loaded, or has changed."""
    import torch

    from sora_train.codec.vae import load_vae

    dtype = getattr(torch, DTYPES.get(manifest.vae.precision, "float32"))
    vae = load_vae(manifest.vae.name, "cuda" if torch.cuda.is_available() else "cpu", dtype, models)
    if vae.hash != manifest.vae.hash:
        raise UserError(
            f"the VAE {manifest.vae.name} is not the one that made these shards: its hash is {vae.hash}, the "
            f"manifest's {manifest.vae.hash}. Restore the weights that they were made with, or encode again into "
            "another data.output",
            code="weights",
        )
    return vae


def read_rows_at(inventory: Inventory, bucket: str, indices: list[int]) -> Iterator[dict]:
    """The rows at rising indices of a bucket. Only their row groups are read."""
    system, _ = resolve(inventory.folder)
    start = 0
    for file in (file for file in inventory.rows if bucket_of(file) == bucket):
        inside = [index - start for index in indices if start <= index < start + inventory.rows[file]]
        start += inventory.rows[file]
        if not inside:
            continue
        with opened_parquet(system, file) as (parquet, _):
            rows = np.delete(np.arange(parquet.metadata.num_rows), inventory.dropped.get(file, []))[inside]
            first = 0
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if len(wanted := rows[(rows >= first) & (rows < end)] - first):
                    yield from parquet.read_row_group(group, columns=COLUMNS).take(wanted).to_pylist()
                first = end


def preview(row: dict, bucket: str, manifest: Manifest, vae: Vae, sources: SourceFrames) -> dict:
    """One row of a shard for the template: text, and images as `data:` addresses."""
    decoded = decode_latents(row, bucket, manifest, vae)
    original, remark = sources.read(row, bucket)
    clips = [decoded] if original is None else [decoded, original]
    captions = [
        {"text": one_line(caption)[:MAX_LETTERS], "tokens": tokens, "cut": tokens >= manifest.text.max_tokens}
        for caption, tokens in zip(row["captions"][:MAX_CAPTIONS], row["tokens"], strict=False)
    ]
    is_image = row["end_s"] <= row["start_s"]
    return {
        "source": one_line(row["source"]),
        "sample_id": one_line(row["sample_id"]),
        "span": "still" if is_image else f"{row['start_s']:.2f} to {row['end_s']:.2f} s",
        "captions": captions,
        "psnr": None if original is None else psnr(decoded, original),
        "remark": one_line(remark),
        "images": clip_images(clips, manifest.fps),
    }


def decode_latents(row: dict, bucket: str, manifest: Manifest, vae: Vae) -> np.ndarray:
    """Frames uint8 `F H W 3` of a row's latents, of a posterior those of its mean."""
    import torch

    shape = (manifest.latents.moments, *manifest.vae.latent_shape(*bucket_size(bucket)))
    numbers = np.frombuffer(row["latents"], np.float16)
    if numbers.size != np.prod(shape):
        raise UserError(
            f"{row['sample_id']} of bucket {bucket} has {numbers.size} numbers in its latents, not those of {shape}: "
            "the shard is damaged, or of another manifest. Delete it and run `sora prep` again",
            code="shards",
        )
    mean = torch.from_numpy(numbers.reshape(shape)[:1].astype(np.float32))
    return vae.decode(mean)[0].numpy()


class SourceFrames:
    """Cuts clips from their sources again, as the manifest says, with sources under `root` if given.

    Raises UserError if `root` is not a folder. Holds a decoder's process until it is closed.
    """

    def __init__(self, manifest: Manifest, root: str = ""):
        self.fps, self.root, self.decoder = manifest.fps, root, None
        if root and fs_type(root) != fs.FileType.Directory:
            raise UserError(f"--root: there is no folder {root}. Name the folder of the sources", code="paths")
        if "data" in manifest.settings:
            self.data = DataConfig.model_validate(manifest.settings["data"])
            self.decoder = Decoder(self.data, SelectionConfig())  # no filters: the clip has passed them

    def read(self, row: dict, bucket: str) -> tuple[np.ndarray | None, str]:
        """The frames `F H W 3` of a row's clip, None if its source can't be read; and a remark or an empty string."""
        name = relative_name(row["source"], ())
        if self.decoder is None or name is None:
            return None, "the manifest does not say how clips were cut from their sources"
        try:
            system, root = resolve(self.root or data_root(self.data))
            path = f"{root}/{name}"
            file = FileFinder(system, root).find([path])[path]
            if file.missing:
                return None, f"source not found: {path}"
            span = ClipSpan(row["start_s"], row["end_s"], Bucket(*bucket_size(bucket), self.fps))
            with local_copy(system, file.path) as local:
                clip = self.decoder.read(local, span, row["sample_id"])
        except (ClipError, UserError, OSError) as error:
            return None, f"source not found or not readable: {error}"
        changed = row["content_hash"] not in ("", clip.content_hash)
        return clip.frames, "the source has changed since it was encoded" if changed else ""

    def close(self) -> None:
        """Ends the decoder's process."""
        if self.decoder is not None:
            self.decoder.close()


def fs_type(place: str) -> fs.FileType:
    """Whether a path or URI is a file, a folder or nothing."""
    system, path = resolve(place)
    return system.get_file_info(path).type


def clip_images(clips: Sequence[np.ndarray], fps: float) -> list[str]:
    """Clips of one shape above each other: an animation if they have several frames, and a strip of frames."""
    frames, height, width = clips[0].shape[:3]
    pixels = max(32, round(min(height, MAX_HEIGHT, WIDTH * height / width / (COLUMNS_SHOWN + 1))))
    every = -(-frames // MAX_FRAMES)
    moving = [stack([frame_strip(clip[i : i + 1], 1, pixels) for clip in clips]) for i in range(0, frames, every)]
    strip = [stack([frame_strip(clip, COLUMNS_SHOWN, pixels) for clip in clips])]
    return [webp_address(images, round(1000 * every / fps)) for images in ([moving] if frames > 1 else []) + [strip]]


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size above each other, with a gap."""
    gap = max(1, images[0].height // 32)
    whole = Image.new("RGB", (images[0].width, len(images) * (images[0].height + gap) - gap), GROUND)
    for place, image in enumerate(images):
        whole.paste(image, (0, place * (image.height + gap)))
    return whole


def webp_address(images: Sequence[Image.Image], duration: int) -> str:
    """A `data:` address of one image, or of an animation with `duration` milliseconds per image."""
    content = io.BytesIO()
    moving = {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0} if images[1:] else {}
    images[0].save(content, "WEBP", quality=75, method=2 if moving else 4, **moving)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
