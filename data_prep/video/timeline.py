"""When a video's frames are shown, by its packets alone: how long it lasts, and where its timestamps have holes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.video.probe import Header, open_video, video_stream
from data_prep.video.readers import CLOCK_RESTART_S

UNUSUAL = 10  # a hole lasts so many times the usual time between two frames
REORDERED = 33  # packets that may come before one that is shown earlier: 16 frames of two fields each


@dataclass(frozen=True)
class Timeline:
    """Seconds since the first frame, whose timestamp is `start_s`.

    `end` is where the last frame ends, 0 where no packet can be read. `holes` are where one frame would stand so long
    that a whole clip shows nothing else, though frames usually follow each other much faster: a recording that lost its
    signal, or stood still. `jumps_back` is true if its timestamps restart somewhere: seeking by time is then wrong.
    """

    start_s: float
    end: float
    holes: tuple[tuple[float, float], ...]
    jumps_back: bool


def read_timeline(
    path: str, header: Header, hole_s: float = float("inf"), alive: Callable[[], None] = lambda: None
) -> Timeline:
    """Reads all packets of a file, as far as it can be read; no gap of less than `hole_s` is a hole."""
    first = last = None
    step, usual_s, usual, jumps_back = header.frame_s, 0.0, 0, False
    gaps: list[tuple[float, float]] = []
    shown_s = 0.0
    for time, duration, back in display_times(path, header):
        alive()
        shown_s = duration
        jumps_back = jumps_back or back
        if first is None or last is None:
            first = time
        elif time - last >= hole_s:
            gaps.append((last + step, time))
        else:
            step = (time - last) or step
            usual_s, usual = usual_s + time - last, usual + 1
        last = time
    if first is None or last is None:
        return Timeline(0.0, 0.0, (), False)
    end = last + (shown_s or step)
    if end - last >= hole_s:
        gaps.append((last + step, end))
    threshold = UNUSUAL * usual_s / usual if usual > len(gaps) else float("inf")  # a slow show has no holes
    holes = tuple((start - first, stop - first) for start, stop in gaps if stop - start > threshold)
    return Timeline(first, end - first, holes, jumps_back)


def display_times(path: str, header: Header) -> Iterator[tuple[float, float, bool]]:
    """Time and duration (0 if unknown) of each frame in the order of being shown, and whether time began anew there.

    The clock is that of `PyAvReader.decoded_frames`.
    """
    waiting: list[tuple[float, float]] = []
    last: float | None = None
    shift = 0.0

    def sorted_out(most: int) -> Iterator[tuple[float, float, bool]]:
        nonlocal last, shift
        while len(waiting) > most:
            time, duration = heapq.heappop(waiting)
            time += shift
            back = last is not None and time < last - CLOCK_RESTART_S
            if last is not None and back:
                shift += last + header.frame_s - time
                time = last + header.frame_s
            if last is None or time >= last - TIMESTAMP_ERROR_S:
                last = time if last is None else max(time, last)
                yield last, duration, back

    time, decoded = -header.frame_s, float("-inf")
    with open_video(path) as file:
        stream = video_stream(file)
        tick = float(stream.time_base)
        for packet in packets(file, stream):
            # AVI knows no presentation times.
            stamp = packet.dts if packet.pts is None or header.container == "avi" else packet.pts
            if packet.dts is not None:
                if packet.dts * tick < decoded - CLOCK_RESTART_S:  # joined: sort its parts apart
                    yield from sorted_out(0)
                decoded = packet.dts * tick
            time = time + header.frame_s if stamp is None else stamp * tick
            heapq.heappush(waiting, (time, (packet.duration or 0) * tick))
            yield from sorted_out(REORDERED)
    yield from sorted_out(0)


def packets(file: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream that are shown, as far as the file can be read."""
    try:
        for packet in file.demux(stream):
            if packet.size and not packet.is_discard:
                yield packet
    except (av.FFmpegError, ValueError):
        return
