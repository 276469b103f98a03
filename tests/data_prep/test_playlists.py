"""A file that names other files is refused, and none of them is opened."""

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.clips import Source
from sora_train.data.config import DataConfig, SelectionConfig

IN_OPEN, IN_NONBLOCK = 0x20, 0o4000
TIMES = np.arange(30) / 30
DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"
 profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">
<Representation id="1" bandwidth="1000" width="128" height="64"><BaseURL>../out/secret.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""
PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n../out/secret.ts\n#EXT-X-ENDLIST\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n../out/secret.ts\n#EXT-X-ENDLIST\n",
    "hls.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n../out/secret.ts\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile ../out/secret.mp4\n",
    "concat.mp4": "ffconcat version 1.0\nfile ../out/secret.mp4\n",
    "a.mpd": DASH,
    "dash.mp4": DASH,
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "image2.mp4": "../out/%d.png",
}


def opens(folder: Path) -> Callable[[], bool]:
    """Says whether any file of the folder was opened since it was asked last: the kernel's own count."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(IN_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(folder), IN_OPEN) >= 0

    def opened() -> bool:
        try:
            return bool(os.read(watch, 1 << 16))
        except BlockingIOError:
            return False

    return opened


@pytest.fixture
def outside(tmp_path: Path, write) -> Path:
    """A folder with videos, next to the root."""
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "root").mkdir()
    write(folder / "secret.ts", TIMES)
    write(folder / "secret.mp4", TIMES)
    return folder


def clip(path: Path) -> np.ndarray:
    source = Source(str(path), DataConfig(frames=4, height=64, width=128), SelectionConfig())
    return source.read(source.plan_clips().spans[0], "").frames


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_is_unreadable_by_any_name(outside: Path, name: str):
    path = outside.parent / "root" / name
    path.write_text(PLAYLISTS[name])
    opened = opens(outside)
    with pytest.raises(ClipError) as error:
        clip(path)
    assert error.value.reason == "unreadable"
    assert not opened()
    assert (outside / "secret.ts").read_bytes()
    assert opened()  # that is, the watch would have noticed


def test_a_video_in_another_file_is_not_fetched(outside: Path):
    """A QuickTime film may say that its samples are in another file: 14496-12, 8.7.2, and Apple's alias records."""
    path = outside.parent / "root" / "film.mov"
    path.write_bytes(with_alias((outside / "secret.mp4").read_bytes(), "/x/out/secret.mp4"))
    opened = opens(outside)
    with av.open(str(path), options={"enable_drefs": "1"}) as file:
        assert len(list(file.decode(video=0))) == 30
    assert opened()  # FFmpeg would, if it were told to
    with pytest.raises(ClipError):
        clip(path)
    assert not opened()


def with_alias(content: bytes, target: str) -> bytes:
    """An mp4 whose index is at its end, without its samples and with an alias to them."""
    record = bytes(10) + bytes([1]) + b"v".ljust(27, b"\0") + bytes(12) + bytes([1]) + b"s".ljust(63, b"\0") + bytes(16)
    record += struct.pack(">HH", 2, 2) + bytes(16)
    record += (
        struct.pack(">HH", 2, len(target)) + target.encode() + bytes(len(target) % 2) + struct.pack(">HH", 0xFFFF, 0)
    )
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    place = content.index(b"url \0\0\0\1") - 4
    grown = bytearray(content[:place] + entry + content[place + 12 :])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = content.rindex(kind, 0, place) - 4
        size = struct.unpack_from(">I", grown, at)[0]
        struct.pack_into(">I", grown, at, size + len(entry) - 12)
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    grown[start:end] = bytes(end - start)
    return bytes(grown)
