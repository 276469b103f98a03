"""A decoder's death costs one clip."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_prep.buckets import Bucket
from data_prep.clips import read_clip
from data_prep.decoder import Decoder
from data_prep.reasons import ClipError

BUCKET = Bucket(8, 32, 64, 8)


@pytest.fixture
def decoder():
    decoder = Decoder(BUCKET, timeout_s=30)
    yield decoder
    decoder.close()


def test_a_clip_from_the_child_is_the_clip_read_here(tmp_path: Path, write, decoder: Decoder):
    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    here, there = read_clip(path, BUCKET), decoder.read(path)
    np.testing.assert_array_equal(here.frames, there.frames)
    assert here.content_hash == there.content_hash


def test_a_crash_or_a_hang_costs_one_clip_and_a_new_child(tmp_path: Path, write, decoder: Decoder):
    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    decoder.read(path)
    assert decoder._child is not None
    os.kill(decoder._child.pid, signal.SIGSEGV)
    decoder._child.wait()
    with pytest.raises(ClipError) as crash:
        decoder.read(path)
    assert crash.value.reason == "decoder_crashed"
    assert "SIGSEGV" in crash.value.message
    assert len(decoder.read(path).frames) == 8

    fifo = tmp_path / "never.mp4"  # opening it waits for a writer that never comes
    os.mkfifo(fifo)
    decoder.timeout_s = 0.5
    with pytest.raises(ClipError) as hang:
        decoder.read(str(fifo))
    assert hang.value.reason == "timeout"
    decoder.timeout_s = 30
    assert len(decoder.read(path).frames) == 8
