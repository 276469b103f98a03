"""When a video's frames are shown, from its packets alone: duration, and holes in its timestamps."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av

from data_prep.buckets import TIMESTAMP_ERROR_S
from data_prep.video.probe import Header, open_video, video_stream

HOLE_FACTOR = 10  # a hole lasts this many times the usual time between two frames
REORDERED = 33  # packets that may come before one that is shown earlier: 16 frames of two fields each
CLOCK_RESTART_S = 0.5  # a timestamp further back than this restarts the clock; one less far back is a late frame


class Clock:
    """Turns timestamps into display times that never fall.

    Where timestamps jump back, as in joined recordings, time goes on from the last frame, and `jumps_back` is set.
    """

    def __init__(self, frame_s: float):
        self.frame_s = frame_s
        self.last: float | None = None
        self.shift = 0.0
        self.jumps_back = False

    def time(self, stamp_s: float | None) -> float | None:
        """The next frame's display time; None if it is late and must be skipped."""
        if self.last is None:
            self.last = stamp_s or 0.0
            return self.last
        time = None if stamp_s is None else stamp_s + self.shift
        if time is None or time < self.last - CLOCK_RESTART_S:
            following = self.last + self.frame_s
            if time is not None:
                self.shift += following - time
                self.jumps_back = True
            time = following
        elif time < self.last - TIMESTAMP_ERROR_S:
            return None
        self.last = max(time, self.last)
        return self.last


@dataclass(frozen=True)
class Timeline:
    """Times in seconds since the first frame, whose timestamp is `start_s`.

    `end` is where the last frame ends, 0 if no packet can be read. `holes` are gaps in which one frame would be shown
    for a whole clip although frames usually follow each other much faster: a recording lost its signal, or froze.
    `jumps_back` is true if timestamps restart somewhere; seeking by time is then wrong.
    """

    start_s: float = 0.0
    end: float = 0.0
    holes: tuple[tuple[float, float], ...] = ()
    jumps_back: bool = False


def read_timeline(
    path: str,
    header: Header,
    hole_s: float = float("inf"),
    alive: Callable[[], None] = lambda: None,
    on_packet: Callable[[Any, Any], None] = lambda stream, packet: None,
) -> Timeline:
    """Reads all packets of a file, as far as possible. A gap shorter than `hole_s` is not a hole.

    `alive` is called at each frame, `on_packet` with the stream and each of its packets: at the end of a file that can
    be read to its end, an empty one.
    """
    clock = Clock(header.frame_s)
    first = last = None
    step, usual_s, usual = header.frame_s, 0.0, 0
    gaps: list[tuple[float, float]] = []
    last_duration = 0.0
    for time, duration in display_times(path, header, clock, on_packet):
        alive()
        if first is None or last is None:
            first = time
        elif time - last >= hole_s:
            gaps.append((last + step, time))
        else:
            step = (time - last) or step
            usual_s, usual = usual_s + time - last, usual + 1
        last, last_duration = time, duration
    if first is None or last is None:
        return Timeline()
    end = last + (last_duration or step)
    if end - last >= hole_s:
        gaps.append((last + step, end))
    threshold = HOLE_FACTOR * usual_s / usual if usual > len(gaps) else float("inf")  # a slide show has no holes
    holes = tuple((start - first, stop - first) for start, stop in gaps if stop - start > threshold)
    return Timeline(first, end - first, holes, clock.jumps_back)


def display_times(
    path: str, header: Header, clock: Clock, on_packet: Callable[[Any, Any], None]
) -> Iterator[tuple[float, float]]:
    """Time and duration (0 if unknown) of each frame in display order, as far as the file can be read."""
    waiting: list[tuple[float, float]] = []

    def in_order(most: int) -> Iterator[tuple[float, float]]:
        while len(waiting) > most:
            stamp, duration = heapq.heappop(waiting)
            time = clock.time(stamp)
            if time is not None:
                yield time, duration

    time, decoded = -header.frame_s, float("-inf")
    with open_video(path) as file, suppress(av.FFmpegError, ValueError):
        stream = video_stream(file)
        tick = float(stream.time_base)
        for packet in file.demux(stream):
            on_packet(stream, packet)
            if not packet.size or packet.is_discard:
                continue
            # AVI has no presentation times.
            stamp = packet.dts if packet.pts is None or header.container == "avi" else packet.pts
            if packet.dts is not None:
                if packet.dts * tick < decoded - CLOCK_RESTART_S:  # joined recordings: don't mix their frames
                    yield from in_order(0)
                decoded = packet.dts * tick
            time = time + header.frame_s if stamp is None else stamp * tick
            heapq.heappush(waiting, (time, (packet.duration or 0) * tick))
            yield from in_order(REORDERED)
    yield from in_order(0)
