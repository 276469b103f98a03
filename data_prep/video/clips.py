"""What a local file is cut into, and the clips themselves: picked by time, cropped, resized. No Ray, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data_prep.buckets import Bucket, buckets_of, choose_bucket, clip_length
from data_prep.reasons import ClipError
from data_prep.video.decord_reader import DecordReader, NotOrdinaryError
from data_prep.video.images import image_format, read_image, read_image_header
from data_prep.video.probe import Header, read_header
from data_prep.video.readers import Fit, PyAvReader
from data_prep.video.timeline import Timeline, read_timeline
from data_prep.video.transforms import random_crop_and_flip, resize_to_bucket
from sora_train.data.config import DataConfig, SelectionConfig

DURATION_ROUNDING_S = 0.05  # a promise that is so near to the frames' own end means that
MISSING_SHARE, MISSING_S = 0.1, 0.5  # less missing at the end than this is how containers round


@dataclass(frozen=True)
class ClipSpan:
    """A clip's place: seconds since the video's first frame, and the bucket it goes to; 0 to 0 in a still picture."""

    start_s: float
    end_s: float
    bucket: Bucket


@dataclass(frozen=True)
class ClipPlan:
    """What a source is cut into: at least one span. Its size as it is shown, its length, a remark on it, or none."""

    spans: tuple[ClipSpan, ...]
    width: int
    height: int
    seconds: float
    still: bool
    remark: str
    frames_per_second: float = 0.0


@dataclass(frozen=True)
class Clip:
    """Frames uint8 `F H W 3`, the file's sha256, 48 digits of how it looks, and a remark on the file, or none."""

    frames: np.ndarray
    content_hash: str
    perceptual_hash: str
    remark: str


class Source:
    """One opened file: its spans, and its clips, of which those that rise in time are read fastest.

    `alive` is called now and then where reading takes long.
    """

    def __init__(
        self, path: str, data: DataConfig, selection: SelectionConfig, alive: Callable[[], None] = lambda: None
    ):
        self.path, self.data, self.selection, self.alive = path, data, selection, alive
        self.still = read_image_header(path) if image_format(path) else None
        self.header = None if self.still else read_header(path)
        self.reader: PyAvReader | None = None
        self.remarked = False
        self._hash = ""
        self._timeline: Timeline | None = None

    def plan_clips(self, headers_only: bool = False) -> ClipPlan:
        """Its spans. Raises ClipError `too_short`, `too_long`, `too_small` or `crosses_cut`."""
        buckets, data, selection = buckets_of(self.data), self.data, self.selection
        if self.still:
            check_side(self.still.width, self.still.height, selection)
            size = self.still.width, self.still.height
            bucket = choose_bucket(buckets, *size, 0.0, data.max_enlarge, still=True)
            return ClipPlan((ClipSpan(0.0, 0.0, bucket),), *size, 0.0, True, self.still.remark)
        assert self.header is not None
        width, height = self.header.display_size
        check_side(width, height, selection)
        if self.header.still:
            bucket = choose_bucket(buckets, width, height, 0.0, data.max_enlarge, still=True)
            return ClipPlan(
                (ClipSpan(0.0, 0.0, bucket),), round(width), round(height), 0.0, True, "; ".join(self.header.remarks)
            )
        shortest = min(buckets, key=lambda b: (b.frames == 1, b.frames))
        if not headers_only:
            self.timeline()
        seconds = self.header.container_duration_s
        joined = self._timeline is not None and self._timeline.jumps_back
        if joined or not shortest.is_filled_by(seconds - data.start_s):  # a promise too small is none
            seconds = max(seconds, self.timeline().end)
        if seconds < selection.min_seconds:
            raise ClipError(
                "too_short", f"lasts {seconds:.2f} s; at least {selection.min_seconds:g} (selection.min_seconds)"
            )
        if 0 < selection.max_seconds < seconds:
            raise ClipError(
                "too_long", f"lasts {seconds:.2f} s; at most {selection.max_seconds:g} (selection.max_seconds)"
            )
        scenes = [(0.0, seconds)]
        if selection.scene_cuts and not headers_only:
            from data_prep.filters import scene_spans

            scenes = scene_spans(self.path, selection.scene_threshold, self.alive)
        holes = () if headers_only else self.holes()
        apart = ("crosses_cut", "scenes") if len(scenes) > 1 else ("too_short", "stretches between holes")
        spans = clip_spans(subtract(scenes, holes), seconds, self.header, data, apart)
        lost = sum(end - start for start, end in holes)
        count = f"{len(holes)} hole{'s' * (len(holes) > 1)}"
        gaps = f"holes: no clips of {count} in its timestamps, {lost:.1f} s in all" if holes else ""
        remark = "; ".join(filter(None, (*self.header.remarks, gaps)))
        size, rate = (round(width), round(height)), self.header.frames_per_second
        return ClipPlan(spans, *size, seconds, False, remark, frames_per_second=rate)

    def timeline(self) -> Timeline:
        """When its frames are shown, read once. A hole is as long as the shortest clip."""
        assert self.header is not None
        if self._timeline is None:
            moving = [bucket.seconds for bucket in buckets_of(self.data) if bucket.frames > 1]
            timeline = read_timeline(self.path, self.header, min(moving, default=float("inf")), self.alive)
            promised, end = self.header.container_duration_s, timeline.end
            if any(abs(promised - late - end) <= DURATION_ROUNDING_S for late in (0.0, timeline.start_s)):
                self.header = replace(self.header, container_duration_s=end)  # FLV and NUT may count from 0
            self._timeline = timeline
        return self._timeline

    def video(self) -> PyAvReader:
        """The reader of its frames."""
        assert self.header is not None
        if self.reader is None:
            self.reader = PyAvReader(self.path, self.header, seekable=not self.timeline().jumps_back)
        return self.reader

    def holes(self) -> tuple[tuple[float, float], ...]:
        """The holes in its timestamps, in seconds since the first frame that can be decoded."""
        timeline = self.timeline()
        if not timeline.holes:
            return ()
        start = self.video().first_timestamp()
        late = 0.0 if start is None else start - timeline.start_s
        return tuple((begin - late, end - late) for begin, end in timeline.holes)

    def read(self, span: ClipSpan, seed: str) -> Clip:
        """One clip. Raises ClipError with the reason why there is none."""
        from data_prep.filters import check_pixels, perceptual_hash

        place, mirrored = random_crop_and_flip(seed, self.data)
        if self.still:
            picture = read_image(self.path, max(span.bucket.height, span.bucket.width))
            frames = resize_to_bucket(picture, span.bucket, 1.0, place, mirrored)[None]
        else:
            assert self.header is not None
            video = self.video()
            frames = self.frames(
                span,
                self.header,
                lambda frame: resize_to_bucket(frame, span.bucket, video.pixel_aspect, place, mirrored),
            )
        check_pixels(frames, span.bucket.fps, self.selection)
        return Clip(frames, self.content_hash(), perceptual_hash(frames), self.remark())

    def frames(self, span: ClipSpan, header: Header, fitted: Fit) -> np.ndarray:
        """A span's frames, fitted. Raises ClipError."""
        due = span.start_s + span.bucket.times()
        video = self.video()
        frames = self.by_decord(due, fitted) or video.frames(due, fitted)
        if len(frames) < len(due):
            if not video.end:
                raise ClipError("corrupt", "no frame of it decodes")
            check_length(video.end, header, span)
            raise ClipError("corrupt", f"frames are missing before {video.end:.2f} s")
        return np.stack(frames)

    def by_decord(self, due: np.ndarray, fitted: Fit) -> list[np.ndarray]:
        """The frames of a video's only clip; none where decord is not sure of them, and PyAV has to read the clip."""
        if self.data.stride_s or self.timeline().holes or self.timeline().jumps_back:
            return []
        assert self.header is not None
        try:
            return DecordReader(self.path, self.header).frames(due, fitted)
        except NotOrdinaryError:
            return []

    def remark(self) -> str:
        """Remarks on a video, once: what it signals and is not applied, and where it breaks off behind its clips."""
        if self.header is None or self.remarked:
            return ""
        self.remarked = True
        end = self.reader.end if self.reader else 0.0
        end = end or self.timeline().end
        return "; ".join(filter(None, (*self.header.remarks, early_end_remark(end, self.header))))

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


def plan_clips(path: str, data: DataConfig, selection: SelectionConfig, headers_only: bool = False) -> ClipPlan:
    """What a file is cut into; `headers_only` looks for no scene cuts. Raises ClipError."""
    return Source(path, data, selection).plan_clips(headers_only)


def read_clip(path: str, span: ClipSpan, data: DataConfig, selection: SelectionConfig, seed: str) -> Clip:
    """One clip of a file; `seed` fixes its random crop and flip. Raises ClipError."""
    return Source(path, data, selection).read(span, seed)


def subtract(scenes: list[tuple[float, float]], holes: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    """What of the scenes is in no hole; both rise."""
    stretches = []
    for begin, end in scenes:
        for start, stop in holes:
            if start < end and stop > begin:
                stretches.append((begin, start))
                begin = stop
        stretches.append((begin, end))
    return [(begin, end) for begin, end in stretches if end > begin]


def clip_spans(
    scenes: list[tuple[float, float]], seconds: float, header: Header, data: DataConfig, apart: tuple[str, str]
) -> tuple[ClipSpan, ...]:
    """Clips every `data.stride_s` from `data.start_s` on, counted from the start of each scene.

    Raises ClipError where there is none; where all of several scenes are too short, `apart` is its reason, and what
    the scenes are called.
    """
    most = 1 if not data.stride_s else data.clips_per_video or None
    spans: list[ClipSpan] = []
    refusal: ClipError | None = None
    for begin, end in scenes:
        begin, step = max(begin, data.start_s), 0
        while most is None or len(spans) < most:
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
    if data.start_s >= seconds:
        raise ClipError("too_short", f"lasts {seconds:.2f} s, and data.start_s {data.start_s:g} is not before its end")
    if refusal.reason == "too_short" and len(scenes) > 1:
        longest = max(end - begin for begin, end in scenes)
        raise ClipError(apart[0], f"has {len(scenes)} {apart[1]}, the longest of {longest:.2f} s; {refusal.message}")
    late = f" after data.start_s ({data.start_s:g}) of {seconds:.2f} s" if data.start_s else ""
    raise ClipError(refusal.reason, f"{refusal.message}{late}")


def check_side(width: float, height: float, selection: SelectionConfig) -> None:
    """Raises ClipError `too_small`."""
    if min(width, height) < selection.min_side:
        raise ClipError(
            "too_small", f"is {width:.0f}x{height:.0f}; each side at least {selection.min_side} (selection.min_side)"
        )


def check_length(end: float, header: Header, span: ClipSpan) -> None:
    """Raises ClipError `truncated` or `too_short` where a video that ends so early doesn't fill a span."""
    if span.bucket.is_filled_by(end - span.start_s):
        return
    wanted = f"the clip from {span.start_s:.2f} to {span.end_s:.2f} s lies beyond"
    if header.container_duration_s - end > 2 * header.frame_s:
        raise ClipError(
            "truncated", f"{end:.2f} s of the {header.container_duration_s:.2f} s that it promises decode; {wanted}"
        )
    raise ClipError("too_short", f"lasts {end:.2f} s; {clip_length(span.bucket)}, and {wanted}")


def early_end_remark(end: float, header: Header) -> str:
    """A remark where a video whose end is known (not 0) lacks much of what it promises."""
    container_duration_s = header.container_duration_s
    missing = container_duration_s - end if end else 0.0
    if missing <= max(MISSING_S, MISSING_SHARE * container_duration_s):
        return ""
    return f"breaks_off: breaks off at {end:.1f} s of {container_duration_s:.1f} s, and clips before the break are kept"
