"""Writes frames as mp4, gif and contact sheets, and reads mp4. No torch, no Ray."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_train.errors import one_line

GROUND, INK, FAINT, BADGE = (38, 43, 52), (230, 237, 243), (150, 158, 168), (240, 190, 80)


def write_mp4(path: str | Path, frames: np.ndarray, fps: int | float, crf: int = 16) -> None:
    """Writes uint8 RGB frames `F H W 3` as an mp4 that browsers play.

    The codec is H.264 with yuv420p, and the index is at the front of the file. Odd sizes are padded by a row or a
    column, because yuv420p halves height and width of the chroma. Raises ValueError for anything but uint8 RGB frames.
    """
    check_frames(frames)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # x264's mbtree reads uninitialised memory, so the same frames would not always give the same file.
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())


def read_mp4(path: str | Path) -> np.ndarray:
    """All frames of an mp4 as uint8 RGB `F H W 3`.

    Raises ValueError if there are none, and PyAV's errors for a damaged file.
    """
    with av.open(str(path), format="mp4", options={"protocol_whitelist": "file", "enable_drefs": "0"}) as file:
        file.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    if not frames:
        raise ValueError(f"{path} has no frames")
    return np.stack(frames)


def write_gif(path: str | Path, frames: np.ndarray, fps: int | float, longest_side: int = 480) -> None:
    """Writes uint8 RGB frames `F H W 3` as a gif that loops.

    Frames larger than `longest_side` pixels are scaled down. All frames share one palette of 256 colours, so a still
    background does not flicker. A gif counts hundredths of a second: durations of frames may differ by one, so the
    clip's duration is right.
    """
    check_frames(frames)
    height, width = frames.shape[1:3]
    scale = min(1.0, longest_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    palette = Image.fromarray(np.concatenate([np.asarray(image) for image in images])).quantize(256)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    ticks = np.diff(np.rint(np.arange(len(images) + 1) * 100 / fps)).astype(int)
    durations = [10 * max(2, int(tick)) for tick in ticks]  # browsers replace durations below 2 by 10
    indexed[0].save(path, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, disposal=1)


def contact_sheet(
    videos: Sequence[np.ndarray],
    labels: Sequence[str],
    badges: Sequence[str] | None = None,
    columns: int = 2,
    frames: int = 8,
    frame_height: int = 96,
) -> Image.Image:
    """One cell per clip: frames side by side, with the clip's label below.

    A cell has up to `frames` frames, evenly spread over the clip. A badge that is not empty is drawn at the right end
    of the label's line. Labels are reduced to one line without control characters and cut with an ellipsis at the
    cell's end. Clips may differ in size and length.
    """
    badges = badges if badges is not None else [""] * len(videos)
    if not videos or not len(videos) == len(labels) == len(badges):
        raise ValueError(f"expected a label and a badge for each clip, got {len(videos)}, {len(labels)}, {len(badges)}")
    strips = [frame_strip(video, frames, frame_height) for video in videos]
    columns = min(columns, len(strips))
    margin, gap, line = frame_height // 4, frame_height // 3, frame_height // 3
    cell_width, cell_height = max(max(strip.width for strip in strips), 2 * frame_height), frame_height + line
    rows = -(-len(strips) // columns)
    size = (
        2 * margin + columns * cell_width + (columns - 1) * gap,
        2 * margin + rows * cell_height + (rows - 1) * (gap // 3),
    )
    sheet = Image.new("RGB", size, GROUND)
    pen, type_face = ImageDraw.Draw(sheet), font(max(11, frame_height // 5))
    for i, (strip, label, badge) in enumerate(zip(strips, labels, badges, strict=True)):
        x = margin + (i % columns) * (cell_width + gap)
        y = margin + (i // columns) * (cell_height + gap // 3)
        sheet.paste(strip, (x, y))
        middle, room = y + frame_height + line // 2, cell_width
        if badge := fit(badge, type_face, cell_width // 2):
            pen.text((x + cell_width, middle), badge, fill=BADGE, font=type_face, anchor="rm")
            room -= round(type_face.getlength(badge)) + gap // 2
        text = fit(label, type_face, room)
        pen.text((x, middle), text or "(no caption)", fill=INK if text else FAINT, font=type_face, anchor="lm")
    return sheet


def frame_strip(video: np.ndarray, frames: int, frame_height: int) -> Image.Image:
    """Up to `frames` frames of a clip `F H W 3` side by side.

    They include the first and the last frame. Each is `frame_height` pixels high.
    """
    check_frames(video)
    height, width = video.shape[1:3]
    frame_width, gap = max(1, round(width * frame_height / height)), max(1, frame_height // 32)
    chosen = np.unique(np.rint(np.linspace(0, len(video) - 1, frames)).astype(int))
    strip = Image.new("RGB", (len(chosen) * (frame_width + gap) - gap, frame_height), GROUND)
    for place, index in enumerate(chosen):
        image = Image.fromarray(video[index]).resize((frame_width, frame_height), Image.Resampling.BICUBIC)
        strip.paste(image, (place * (frame_width + gap), 0))
    return strip


def check_frames(frames: np.ndarray) -> None:
    """Raises ValueError unless frames are uint8 RGB `F H W 3`, at least one."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"expected uint8 frames of shape F H W 3, got {frames.dtype} {frames.shape}")


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB, over all frames together.

    Infinite if they are equal.
    """
    error = np.mean((made.astype(np.float32) - true.astype(np.float32)) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def fit(text: str, type_face: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut with an ellipsis to at most `width` pixels."""
    whole = one_line(text[:2000])
    text = whole[:500]
    while text and type_face.getlength(text if text == whole else text + "…") > width:
        text = text[:-1].rstrip()
    return text if text == whole else text + "…"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which covers many scripts, from matplotlib."""
    spec = importlib.util.find_spec("matplotlib")  # not imported: that takes a second
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def slug(prompt: str, longest: int = 60) -> str:
    """A file name of lower-case ASCII letters, digits and dashes.

    A name that is cut or loses other letters ends with a hash of the prompt. So two prompts share a name only if they
    differ in case, spaces or punctuation.
    """
    letters = "".join(character if character.isalnum() else "-" for character in prompt.lower())
    readable = re.sub(r"-+", "-", re.sub(r"[^a-z0-9-]", "", letters)).strip("-")
    if len(readable) <= longest and letters.isascii() and readable:
        return readable
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{readable[: longest - 9].rstrip('-')}-{digest}".lstrip("-")
