"""Plans the clips of a local file and reads them: picked by time, cropped, resized. No Ray, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data_prep.buckets import Bucket, buckets_of, choose_bucket, clip_length
from data_prep.reasons import ClipError
from data_prep.video.decord_reader import DecordReader, NotOrdinaryError, PacketCheck
from data_prep.video.images import image_format, read_image, read_image_header
from data_prep.video.probe import Header, read_header
from data_prep.video.readers import PyAvReader, Transform
from data_prep.video.timeline import Timeline, read_timeline
from data_prep.video.transforms import random_crop_and_flip, resize_to_bucket
from sora_train.data.config import DataConfig, SelectionConfig

DURATION_ROUNDING_S = 0.05  # a container's duration this near to the frames' end is replaced by it
MISSING_SHARE, MISSING_S = 0.1, 0.5  # less missing at the end is due to rounding in the container


@dataclass(frozen=True)
class ClipSpan:
    """A clip's start and end in seconds since the first frame, 0 to 0 in an image; and its bucket."""

    start_s: float
    end_s: float
    bucket: Bucket


@dataclass(frozen=True)
class ClipPlan:
    """The spans of a source, at least one; its display size and length; and a remark or an empty string."""

    spans: tuple[ClipSpan, ...]
    width: int
    height: int
    seconds: float
    is_image: bool
    remark: str
    frames_per_second: float = 0.0


@dataclass(frozen=True)
class Clip:
    """Frames uint8 `F H W 3`, the file's sha256, a perceptual hash, and a remark on the file or an empty string."""

    frames: np.ndarray
    content_hash: str
    perceptual_hash: str
    remark: str


class Source:
    """One opened file: its clips' spans, and their frames. Reading in order of time is fastest.

    `alive` is called now and then while reading takes long.
    """

    def __init__(
        self, path: str, data: DataConfig, selection: SelectionConfig, alive: Callable[[], None] = lambda: None
    ):
        self.path, self.data, self.selection, self.alive = path, data, selection, alive
        self.image = read_image_header(path) if image_format(path) else None
        self._header = None if self.image else read_header(path)
        self._timeline: Timeline | None = None
        self._packets: PacketCheck | None = None
        self._reader: PyAvReader | None = None
        self._remark_given = False
        self._hash = ""

    @property
    def header(self) -> Header:
        """The header of a video."""
        assert self._header is not None
        return self._header

    def plan_clips(self, headers_only: bool = False) -> ClipPlan:
        """Plans the spans of its clips. Raises ClipError `too_short`, `too_long`, `too_small` or `crosses_cut`."""
        width, height = (self.image.width, self.image.height) if self.image else self.header.display_size
        if min(width, height) < (least := self.selection.min_side):
            raise ClipError(
                "too_small", f"is {width:.0f}x{height:.0f}; each side at least {least} (selection.min_side)"
            )
        size = round(width), round(height)
        if self.image or self.header.still:
            bucket = choose_bucket(buckets_of(self.data), width, height, 0.0, self.data.max_enlarge, still=True)
            remark = self.image.remark if self.image else "; ".join(self.header.remarks)
            return ClipPlan((ClipSpan(0.0, 0.0, bucket),), *size, 0.0, True, remark)
        seconds = self.duration(headers_only)
        scenes = [(0.0, seconds)]
        if self.selection.scene_cuts and not headers_only:
            from data_prep.filters import scene_spans

            scenes = scene_spans(self.path, self.selection.scene_threshold, self.alive)
        holes = () if headers_only else self.holes()
        reason, part = "too_short", "stretches between holes"
        if len(scenes) > 1:
            reason, part = "crosses_cut", "scenes"
        spans = clip_spans(subtract(scenes, holes), seconds, self.header, self.data, reason, part)
        lost, count = sum(end - start for start, end in holes), f"{len(holes)} hole{'s' * (len(holes) > 1)}"
        gaps = f"holes: no clips of {count} in its timestamps, {lost:.1f} s in all" if holes else ""
        remark = "; ".join(filter(None, (*self.header.remarks, gaps)))
        return ClipPlan(spans, *size, seconds, False, remark, self.header.frames_per_second)

    def duration(self, headers_only: bool) -> float:
        """Seconds of a video. Raises ClipError `too_short` or `too_long` by the selection's limits."""
        shortest = min(buckets_of(self.data), key=lambda bucket: (bucket.frames == 1, bucket.frames))
        if not headers_only:
            self.timeline()  # corrects the header
        seconds = self.header.container_duration_s
        restarts = self._timeline is not None and self._timeline.jumps_back
        if restarts or not shortest.is_filled_by(
            seconds - self.data.start_s
        ):  # a short one may mean that the container states none
            seconds = max(seconds, self.timeline().end)
        low, high = self.selection.min_seconds, self.selection.max_seconds
        if seconds < low:
            raise ClipError("too_short", f"lasts {seconds:.2f} s; at least {low:g} (selection.min_seconds)")
        if 0 < high < seconds:
            raise ClipError("too_long", f"lasts {seconds:.2f} s; at most {high:g} (selection.max_seconds)")
        return seconds

    def timeline(self) -> Timeline:
        """When a video's frames are shown, read once. A hole is at least as long as the shortest clip."""
        if self._timeline is None:
            hole_s = min((b.seconds for b in buckets_of(self.data) if b.frames > 1), default=float("inf"))
            if not self.data.stride_s:  # decord is used only for a video's single clip
                self._packets = PacketCheck(self.header)
            on_packet = self._packets.add if self._packets else lambda stream, packet: None
            timeline = read_timeline(self.path, self.header, hole_s, self.alive, on_packet)
            declared, end = self.header.container_duration_s, timeline.end
            # FLV and NUT may count it from 0, not from the first timestamp. NUT and MPEG-PS leave out what follows
            # the last timestamp.
            if end > declared or abs(declared - timeline.start_s - end) <= DURATION_ROUNDING_S:
                self._header = replace(self.header, container_duration_s=end)
            self._timeline = timeline
        return self._timeline

    def reader(self) -> PyAvReader:
        """PyAV's reader of a video, kept open."""
        if self._reader is None:
            self._reader = PyAvReader(self.path, self.header, seekable=not self.timeline().jumps_back)
        return self._reader

    def holes(self) -> tuple[tuple[float, float], ...]:
        """The holes in a video's timestamps, in seconds since the first frame that can be decoded."""
        timeline = self.timeline()
        start = self.reader().first_timestamp() if timeline.holes else None
        offset_s = 0.0 if start is None else start - timeline.start_s
        return tuple((begin - offset_s, end - offset_s) for begin, end in timeline.holes)

    def read(self, span: ClipSpan, seed: str) -> Clip:
        """One clip; `seed` fixes its random crop and flip. Raises ClipError."""
        from data_prep.filters import check_pixels, perceptual_hash

        crop_position, flip = random_crop_and_flip(seed, self.data)
        if self.image:
            image = read_image(self.path, max(span.bucket.height, span.bucket.width))
            frames = resize_to_bucket(image, span.bucket, 1.0, crop_position, flip)[None]
        else:
            reader = self.reader()

            def transform(frame: np.ndarray) -> np.ndarray:
                return resize_to_bucket(frame, span.bucket, reader.pixel_aspect, crop_position, flip)

            frames = self.read_frames(span, transform)
        check_pixels(frames, span.bucket.fps, self.selection)
        return Clip(frames, self.content_hash(), perceptual_hash(frames), self.remark())

    def read_frames(self, span: ClipSpan, transform: Transform) -> np.ndarray:
        """A video clip's frames by decord, or by PyAV if decord is not trusted with the file. Raises ClipError."""
        times, reader = span.start_s + span.bucket.times(), self.reader()
        try:
            frames = self.decord_reader().frames(times, transform)
        except NotOrdinaryError:
            frames = reader.frames(times, transform)
        if len(frames) < len(times):
            if not reader.end:
                raise ClipError("corrupt", "no frame of it decodes")
            check_length(reader.end, self.header, span)
            raise ClipError("corrupt", f"frames are missing before {reader.end:.2f} s")
        return np.stack(frames)

    def decord_reader(self) -> DecordReader:
        """decord's reader, for a video's only clip. Raises NotOrdinaryError."""
        timeline = self.timeline()
        if self._packets is None or timeline.holes or timeline.jumps_back:
            raise NotOrdinaryError("several clips, or timestamps with holes or jumps")
        return DecordReader(self.path, self.header, self._packets.times())

    def remark(self) -> str:
        """Remarks on a video, once: properties that are not applied, and an end before the one its header states."""
        if self._header is None or self._remark_given:
            return ""
        self._remark_given = True
        end = (self._reader.end if self._reader else 0.0) or self.timeline().end
        declared, remarks = self.header.container_duration_s, [*self.header.remarks]
        if end and declared - end > max(MISSING_S, MISSING_SHARE * declared):
            remarks.append(f"breaks_off: ends early, at {end:.1f} s of {declared:.1f} s, and clips before it are kept")
        return "; ".join(remarks)

    def content_hash(self) -> str:
        """sha256 of the file's bytes, computed once."""
        if not self._hash:
            digest = hashlib.sha256()
            with open(self.path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    self.alive()
            self._hash = digest.hexdigest()
        return self._hash


def subtract(scenes: list[tuple[float, float]], holes: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    """The parts of the scenes outside all holes; both lists are in order of time."""
    stretches = []
    for begin, end in scenes:
        for start, stop in holes:
            if start < end and stop > begin:
                stretches.append((begin, start))
                begin = stop
        stretches.append((begin, end))
    return [(begin, end) for begin, end in stretches if end > begin]


def clip_spans(
    scenes: list[tuple[float, float]], seconds: float, header: Header, data: DataConfig, reason: str, part: str
) -> tuple[ClipSpan, ...]:
    """Clips every `data.stride_s` from `data.start_s` on, counted from the start of each scene.

    Raises ClipError if there is none. If all of several scenes are too short, `reason` is its reason, and `part` what
    its message calls them.
    """
    max_clips = 1 if not data.stride_s else data.clips_per_video or None
    spans: list[ClipSpan] = []
    refusal: ClipError | None = None
    for begin, end in scenes:
        begin, step = max(begin, data.start_s), 0
        while max_clips is None or len(spans) < max_clips:
            start = round(begin + step * data.stride_s, 6)
            try:
                bucket = choose_bucket(buckets_of(data), *header.display_size, end - start, data.max_enlarge)
            except ClipError as error:
                refusal = refusal or error
                break
            spans.append(ClipSpan(start, round(start + bucket.seconds, 6), bucket))
            step += 1
            if not data.stride_s:
                break
    if spans:
        return tuple(spans)
    assert refusal is not None
    if refusal.reason == "too_short" and len(scenes) > 1 and data.start_s < seconds:
        longest = max(end - begin for begin, end in scenes)
        raise ClipError(reason, f"has {len(scenes)} {part}, the longest of {longest:.2f} s; {refusal.message}")
    if data.start_s:
        where = f"data.start_s is {data.start_s:g}, of {seconds:.2f} s; after it, the video"
        raise ClipError(refusal.reason, f"{where} {refusal.message}")
    raise refusal


def check_length(end: float, header: Header, span: ClipSpan) -> None:
    """Raises ClipError `truncated` or `too_short` if a video that ends at `end` doesn't fill a span."""
    if span.bucket.is_filled_by(end - span.start_s):
        return
    wanted = f"the clip from {span.start_s:.2f} to {span.end_s:.2f} s lies beyond"
    if header.container_duration_s - end > 2 * header.frame_s:
        raise ClipError(
            "truncated", f"{end:.2f} s of the {header.container_duration_s:.2f} s that it promises decode; {wanted}"
        )
    raise ClipError("too_short", f"lasts {end:.2f} s; {clip_length(span.bucket)}, and {wanted}")
