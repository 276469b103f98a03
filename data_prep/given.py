"""Reads the frames that a sample begins with: an image, or the end of a video, as `sora prep` reads clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.reasons import FILTERED, ClipError
from data_prep.video.clips import ClipPlan, ClipSpan
from data_prep.video.decode_process import Decoder
from data_prep.video.images import image_format
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError, one_line
from sora_train.log import log
from sora_train.sample.condition import GivenFrames
from sora_train.schema import bucket_name

BLURRED = 2.0  # times enlarged: from here on the blur is visible
IMAGES = "Name an image: JPEG, PNG, WebP, AVIF, BMP or TIFF"


def read_given(
    names: Sequence[str], key: str, shape: tuple[int, int, int], fps: float, max_enlarge: float = 0.0
) -> list[GivenFrames]:
    """The images, or the last frames of the videos, cropped at the centre and resized to `shape` (frames, H, W).

    `key` is where the names come from: `--video`, or `--image` and `validation.images`, which take images alone. They
    are decoded, turned, converted and resized by the code of `sora prep`, in its decoder process. Raises UserError for
    a file that can't be read, that is of the other kind, or that would be enlarged more than `max_enlarge` times.
    """
    data = DataConfig(buckets=(bucket_name(*shape),), fps=fps, max_enlarge=max_enlarge)
    decoder, found = Decoder(data, SelectionConfig()), dict[str, GivenFrames]()
    try:
        for name in dict.fromkeys(names):
            found[name] = _read(decoder, name, key)
    finally:
        decoder.close()
    return [found[name] for name in names]


def _read(decoder: Decoder, name: str, key: str) -> GivenFrames:
    shown, path = f"{key} {one_line(name)[:200]}", check_file(name, key)
    try:
        still = bool(image_format(str(path)))
        if still and key == "--video":
            raise UserError(f"{shown} is an image. Use --image", code="media")
        plan = decoder.plan_clips(str(path))
        if not plan.is_image and key != "--video":
            use = "--video continues its last frames" if key == "--image" else IMAGES
            raise UserError(f"{shown} is a video or an animation. {use}", code="media")
        clip = decoder.read(str(path), _last_span(plan), "")
    except ClipError as error:
        if not still and key != "--video" and error.reason == "unreadable" and "HEIC" not in error.message:
            raise UserError(f"{shown} is not an image. {IMAGES}", code="media") from None
        remedy = "" if error.reason in FILTERED or "convert" in error.message else ". Name another file"
        raise UserError(f"{shown}: {error.message}{remedy}", code="media") from None
    except OSError as error:
        raise UserError(f"{shown} can't be read ({error.strerror or error})", code="media") from None
    for remark in filter(None, (plan.remark, clip.remark)):
        log.warning(f"{shown}: {remark}")
    _report_fit(shown, plan)
    return GivenFrames(clip.frames, clip.content_hash)


def check_file(name: str, key: str) -> Path:
    """The path of a local file that is not empty. Raises UserError for anything else."""
    shown = f"{key} {one_line(name)[:200]}"
    if "://" in name:
        raise UserError(f"{shown} is remote. Copy it to this machine and name the copy", code="media")
    path = Path(name).expanduser()
    if not path.is_file():
        why = "a folder" if path.is_dir() else "not a regular file" if path.exists() else ""
        raise UserError(f"{shown} is {why}. Name a file" if why else f"{shown}: there is no such file", code="media")
    if not path.stat().st_size:
        raise UserError(f"{shown} is empty. Name another file", code="media")
    return path


def _last_span(plan: ClipPlan) -> ClipSpan:
    """The span of the clip that ends with the source."""
    bucket = plan.spans[0].bucket
    start = 0.0 if plan.is_image else max(0.0, round(plan.seconds - bucket.seconds, 6))
    return ClipSpan(start, round(start + bucket.seconds, 6), bucket)


def _report_fit(shown: str, plan: ClipPlan) -> None:
    """Logs how an image is fitted; warns if it is enlarged so much that samples look blurred."""
    bucket = plan.spans[0].bucket
    size, wanted = f"{plan.width}x{plan.height}", f"{bucket.width}x{bucket.height}"
    left, top, right, bottom = bucket.crop_box(plan.width, plan.height)
    if (scale := bucket.upscale_factor(plan.width, plan.height)) >= BLURRED:
        log.warning(
            f"{shown} is {size} and is enlarged {scale:.1f} times to {wanted}: it looks blurred. Use a larger one"
        )
    elif size != wanted:
        log.info(f"{shown}: {size}, of which the centre {right - left:.0f}x{bottom - top:.0f} is resized to {wanted}")
