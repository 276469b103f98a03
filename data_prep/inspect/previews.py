"""Clips as a page shows them: decoded back from their latents, above the same clip cut anew from its source."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.inspect.reference import References
from data_prep.inspect.table import Inventory, by_numbers, unreadable
from sora_train.codec import DTYPES
from sora_train.errors import UserError, one_line
from sora_train.log import log, progress
from sora_train.manifest import Manifest
from sora_train.schema import bucket_of, bucket_size
from sora_train.storage import resolve
from sora_train.video import GROUND, frame_strip, psnr

if TYPE_CHECKING:
    from sora_train.codec.vae import Vae

COLUMNS = ["sample_id", "source", "content_hash", "start_s", "end_s", "captions", "tokens", "latents"]
WIDTH, TALLEST = 1000, 180  # pixels: of all pictures of a clip side by side, and of one frame
MOST_MOVING = 32  # frames of the animation: of a longer clip every second, or third
MOST_CAPTIONS, MOST_LETTERS = 6, 600


def sheets_of(inventory: Inventory, manifest: Manifest, clips: int, root: str, models: str) -> Iterator[dict]:
    """Per bucket that holds clips, some of them as the page shows them. Says on stderr how far it is."""
    buckets = [bucket for bucket in sorted(inventory.buckets, key=by_numbers) if inventory.buckets[bucket]]
    if not buckets or not clips:
        return
    vae, references = vae_of(manifest, models), References(manifest, root)
    total, done, said = sum(min(clips, inventory.buckets[bucket]) for bucket in buckets), 0, time.monotonic()
    try:
        for bucket in buckets:
            shown = []
            for row in rows_at(inventory, bucket, drawn(inventory.buckets[bucket], clips)):
                shown.append(shown_clip(row, bucket, manifest, vae, references))
                done += 1
                while vae.remarks:
                    log.warning(f"inspect: {vae.remarks.pop(0)}")
                if time.monotonic() - said > 5:
                    said = time.monotonic()
                    progress(f"inspect: {done} of {total} clips decoded")
            yield {"name": bucket, "clips": shown, "of": inventory.buckets[bucket]}
    finally:
        references.close()


def vae_of(manifest: Manifest, models: str) -> Vae:
    """The VAE that made the latents. Raises UserError where it can't be had, or is not the same any more."""
    import torch

    from sora_train.codec.vae import load_vae

    dtype = getattr(torch, DTYPES.get(manifest.vae.precision, "float32"))  # as it encoded
    vae = load_vae(manifest.vae.name, "cuda" if torch.cuda.is_available() else "cpu", dtype, models)
    if vae.hash != manifest.vae.hash:
        raise UserError(
            f"the VAE {manifest.vae.name} is not the one that made these shards: its hash is {vae.hash}, the "
            f"manifest's {manifest.vae.hash}; put back the weights that they were made with, or encode anew into "
            "another data.output"
        )
    return vae


def drawn(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread, the same every time."""
    chosen = min(count, most)
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def rows_at(inventory: Inventory, bucket: str, places: list[int]) -> Iterator[dict]:
    """The rows at these places (rising) of a bucket's shards, one after another; no other row group is read."""
    system, _ = resolve(inventory.folder)
    start = 0
    for file, rows in ((file, rows) for file, rows in inventory.rows.items() if bucket_of(file) == bucket):
        wanted = [place - start for place in places if start <= place < start + rows]
        start += rows
        if not wanted:
            continue
        try:
            with system.open_input_file(file) as opened:
                parquet, before = pq.ParquetFile(opened), 0
                for group in range(parquet.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    inside = [place - before for place in wanted if before <= place < before + size]
                    before += size
                    if inside:
                        yield from parquet.read_row_group(group, columns=COLUMNS).take(inside).to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise unreadable(file, error) from None


def shown_clip(row: dict, bucket: str, manifest: Manifest, vae: Vae, references: References) -> dict:
    """One row of a shard for the template: words, and pictures as `data:` addresses."""
    made = frames_of(row, bucket, manifest, vae)
    reference = references.of(row, bucket)
    clips = [made] if reference.frames is None else [made, reference.frames]
    most = manifest.text.max_tokens
    captions = [
        {"text": shortened(caption), "tokens": tokens, "cut": tokens >= most}
        for caption, tokens in zip(row["captions"][:MOST_CAPTIONS], row["tokens"], strict=False)
    ]
    still = row["end_s"] <= row["start_s"]
    return {
        "source": one_line(row["source"]),
        "sample_id": one_line(row["sample_id"]),
        "span": "still" if still else f"{row['start_s']:.2f} to {row['end_s']:.2f} s",
        "captions": captions,
        "more_captions": max(0, len(row["captions"]) - MOST_CAPTIONS),
        "psnr": None if reference.frames is None else psnr(made, reference.frames),
        "remark": one_line(reference.remark),
        "labels": ["from latents", "source"][: len(clips)],
        "pictures": pictures(clips, manifest.fps),
    }


def frames_of(row: dict, bucket: str, manifest: Manifest, vae: Vae) -> np.ndarray:
    """Frames uint8 `F H W 3` of a row's latents, of a posterior those of its mean."""
    import torch

    frames, height, width = bucket_size(bucket)
    shape = (manifest.latents.moments, *manifest.vae.latent_shape(frames, height, width))
    numbers = np.frombuffer(row["latents"], np.float16)
    if numbers.size != np.prod(shape):
        raise UserError(
            f"{row['sample_id']} of bucket {bucket} has {numbers.size} numbers in its latents, not those of {shape}: "
            "the shard is damaged, or of another manifest; delete it and run `sora prep` again"
        )
    mean = torch.from_numpy(numbers.reshape(shape)[:1].astype(np.float32))
    return vae.decode(mean)[0].numpy()


def pictures(clips: Sequence[np.ndarray], fps: float) -> list[dict]:
    """Clips of one shape, one above the other, as a moving picture (where they move) and a strip of frames."""
    frames, height, width = clips[0].shape[:3]
    aspect = width / height
    columns = min(frames, 6 if aspect <= 1.4 else 5 if aspect <= 2 else 4)
    places = columns + (1 if frames > 1 else 0)
    tall = max(32, round(min(TALLEST, WIDTH / (aspect * places), 2 * height)))  # on the page; small ones are enlarged
    pixels = min(height, tall)
    made = [
        ("Frames, the first and the last among them", [stacked([frame_strip(clip, columns, pixels) for clip in clips])])
    ]
    if frames > 1:
        every = -(-frames // MOST_MOVING)
        moving = [stacked([frame_strip(clip[i : i + 1], 1, pixels) for clip in clips]) for i in range(0, frames, every)]
        made.insert(0, ("The clip, moving", moving))
        duration = round(1000 * every / fps)
    else:
        duration = 0
    return [
        {
            "what": what,
            "address": webp(images, duration),
            "share": round(images[0].width / images[0].height, 4),
            "width": round(images[0].width * tall / pixels),
        }
        for what, images in made
    ]


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size, one above the other, a little apart."""
    gap = max(1, images[0].height // 32)
    whole = Image.new("RGB", (images[0].width, len(images) * (images[0].height + gap) - gap), GROUND)
    for place, image in enumerate(images):
        whole.paste(image, (0, place * (image.height + gap)))
    return whole


def webp(images: Sequence[Image.Image], duration: int) -> str:
    """A `data:` address of one image, or of several that follow one another every `duration` milliseconds."""
    content = io.BytesIO()
    moving = {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0} if images[1:] else {}
    images[0].save(content, "WEBP", quality=75, method=2 if moving else 4, **moving)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def shortened(caption: str) -> str:
    """A caption on one line, cut where it is longer than anybody reads on a page."""
    line = one_line(caption[: 4 * MOST_LETTERS])
    return line if len(line) <= MOST_LETTERS else line[:MOST_LETTERS].rstrip() + "…"
