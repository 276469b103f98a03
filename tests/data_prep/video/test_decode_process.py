"""A decoder's death costs one clip, and nothing is left behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.reasons import ClipError
from data_prep.video.decode_process import Decoder
from sora_train.data.config import DataConfig, SelectionConfig
from tests.data_prep.clip_files import plan_clips, read_clip

DATA = DataConfig(buckets=("8x32x64", "1x16x16"), fps=8.0, stride_s=0.5, timeout_s=30.0)
ALL = SelectionConfig()


@pytest.fixture
def decoder():
    decoder = Decoder(DATA, ALL)
    yield decoder
    decoder.close()


def resident(process: int, key: str = "VmRSS") -> int:
    """Memory of a process in bytes; `VmHWM` is the most it ever had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def test_clips_from_the_child_are_the_clips_read_here(tmp_path: Path, write, decoder: Decoder):
    for name in ("a.mp4", "b.mkv"):
        path = str(write(tmp_path / name, np.arange(90) / 30))
        cut = decoder.plan_clips(path)
        assert cut == plan_clips(path, DATA, ALL)
        assert [span.start_s for span in cut.spans] == [0.0, 0.5, 1.0, 1.5, 2.0]
        there = [decoder.read(path, span, "7") for span in cut.spans]
        for span, clip in zip(cut.spans, there, strict=True):
            here = read_clip(path, span, DATA, ALL, "7")
            np.testing.assert_array_equal(clip.frames, here.frames)
            assert (clip.content_hash, clip.perceptual_hash) == (here.content_hash, here.perceptual_hash)


def test_what_the_child_refuses_is_raised_here(tmp_path: Path, write, decoder: Decoder):
    with pytest.raises(ClipError) as error:
        decoder.plan_clips(str(write(tmp_path / "short.mp4", np.arange(10) / 30)))
    assert error.value.reason == "too_short"
    with pytest.raises(ClipError) as error:
        decoder.plan_clips(str(tmp_path / "none.mp4"))
    assert error.value.reason == "missing_file"


def test_a_crash_or_a_hang_costs_one_clip_and_a_new_child(tmp_path: Path, write, decoder: Decoder):
    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    span = decoder.plan_clips(path).spans[0]
    assert decoder.process is not None
    os.kill(decoder.process.pid, signal.SIGSEGV)
    decoder.process.wait()
    with pytest.raises(ClipError, match="SIGSEGV") as crash:
        decoder.read(path, span, "")
    assert crash.value.reason == "decoder_crashed"
    assert len(decoder.read(path, span, "").frames) == 8

    fifo = tmp_path / "never.mp4"  # opening it waits for a writer that never comes
    os.mkfifo(fifo)
    decoder.data = DATA.model_copy(update={"timeout_s": 2.0})
    began = time.monotonic()
    with pytest.raises(ClipError, match=r"2 s \(data\.timeout_s\)") as hang:
        decoder.plan_clips(str(fifo))
    assert hang.value.reason == "timeout"
    assert 2.0 <= time.monotonic() - began < 60.0
    decoder.data = DATA
    assert len(decoder.read(path, span, "").frames) == 8


def test_a_child_killed_amid_a_clip_costs_that_clip(tmp_path: Path, write, decoder: Decoder):
    import threading

    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    span = decoder.plan_clips(path).spans[0]
    fifo = tmp_path / "amid.mp4"
    os.mkfifo(fifo)
    assert decoder.process is not None
    killer = threading.Timer(0.3, os.kill, (decoder.process.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(ClipError, match="SIGKILL") as error:
        decoder.plan_clips(str(fifo))
    assert error.value.reason == "decoder_crashed"
    assert len(decoder.read(path, span, "").frames) == 8
    killer.join()


def test_a_child_that_says_it_makes_progress_is_not_given_up(tmp_path: Path, write, monkeypatch):
    """Hashing a file says so: here slowly, by a hash that waits; ten times slower where the machine is too busy."""
    path = tmp_path / "large.mp4"
    write(path, np.arange(30) / 30)
    with path.open("ab") as file:
        file.truncate(32 << 20)  # eight pieces of 4 MB
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import hashlib, os, time\n"
        "class Slow:\n"
        "    def __init__(self, data=b''): self.real = sha256(data)\n"
        "    def update(self, data): time.sleep(float(os.environ['PAUSE_S'])); self.real.update(data)\n"
        "    def hexdigest(self): return self.real.hexdigest()\n"
        "    def digest(self): return self.real.digest()\n"
        "sha256, hashlib.sha256 = hashlib.sha256, Slow\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for timeout_s in (2.2, 22.0):
        monkeypatch.setenv("PAUSE_S", str(timeout_s / 5.5))
        decoder = Decoder(DATA, ALL)
        span = decoder.plan_clips(str(path)).spans[0]
        decoder.data = DATA.model_copy(update={"timeout_s": timeout_s})
        began = time.monotonic()
        try:
            assert decoder.read(str(path), span, "").content_hash
            break
        except ClipError:
            if timeout_s > 3:
                raise
        finally:
            decoder.close()
    assert time.monotonic() - began > timeout_s


def test_the_child_imports_no_torch_and_ends_with_its_parent(tmp_path: Path):
    """The parent is killed while the child hangs; its memory has no name, so /dev/shm is as it was."""
    fifo, pid = tmp_path / "never.mp4", tmp_path / "pid"
    os.mkfifo(fifo)
    script = f"""
import sys
from data_prep.video.decode_process import Decoder
from sora_train.data.config import DataConfig, SelectionConfig
decoder = Decoder(DataConfig(frames=8, height=32, width=64), SelectionConfig())
decoder.connect()
open({str(pid)!r}, "w").write(str(decoder.process.pid) + "\\n")
decoder.plan_clips({str(fifo)!r})
"""
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    while not (pid.exists() and pid.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.02)
    child = int(pid.read_text())
    maps = Path(f"/proc/{child}/maps").read_text()
    assert "libtorch" not in maps
    assert "_raylet" not in maps
    assert "sora-clip" in maps
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not {name for name in after - before if "sora" in name}


def test_what_a_child_says_is_data_alone(tmp_path: Path, monkeypatch, write, decoder: Decoder):
    """Here by a child that was taken over; were a pickle loaded, it would run what the pickle says."""
    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    span = decoder.plan_clips(path).spans[0]
    hook, answer = tmp_path / "sitecustomize.py", tmp_path / "answer"
    hook.write_text(
        "import multiprocessing.connection as m\n"
        "real = m.Connection.send_bytes\n"
        f"answer = open({str(answer)!r}, 'rb').read()\n"
        "m.Connection.send_bytes = lambda self, data: real(self, data if b'ready' in data else answer)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pickled = pickle.dumps(ClipError("corrupt", ""))
    for said in (pickled, b"[1]", b"{", b'{"refused": ["no such reason", ""]}', b'{"remark": 5}'):
        answer.write_bytes(said)
        decoder.close()  # the next child is another
        with pytest.raises(ClipError, match="sent an invalid answer") as error:
            decoder.read(path, span, "")
        assert error.value.reason == "decoder_crashed", said
    hook.unlink()
    assert len(decoder.read(path, span, "").frames) == 8


def test_late_clips_take_no_more_memory_than_early_ones(tmp_path: Path, write, decoder: Decoder):
    """Five minutes of 1080p are 19 GB of raw frames, 37 million bytes of which a second holds."""
    short = write(tmp_path / "short.mp4", np.arange(30) / 10, gop=30, b_frames=0, size=(1920, 1080), pictures=bright)
    long = repeated(short, tmp_path / "long.mp4", 100)
    decoder.read(str(short), decoder.plan_clips(str(short)).spans[0], "")
    assert decoder.process is not None
    before = resident(decoder.process.pid, "VmHWM")
    spans = decoder.plan_clips(str(long)).spans
    assert spans[-1].end_s > 298
    for span in (*spans[:3], *spans[100:103], *spans[-3:], *spans[30:33]):
        assert decoder.read(str(long), span, "").frames.shape == (8, 32, 64, 3)
    assert resident(decoder.process.pid, "VmHWM") - before < 40 << 20


def bright(number: int) -> np.ndarray:
    """A frame of 1080p that is a little brighter than the one before."""
    return np.full((1080, 1920, 3), 50 + 5 * number, np.uint8)


def repeated(path: Path, longer: Path, times: int) -> Path:
    """A video that shows another, which begins with a keyframe and has no B-frames, again and again."""
    with av.open(str(path)) as source, av.open(str(longer), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        step = packets[1].pts - packets[0].pts
        for number in range(times * len(packets)):
            packet = packets[number % len(packets)]
            copy = av.Packet(bytes(packet))
            copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
            copy.pts = copy.dts = number * step
            file.mux(copy)
    return longer


def test_no_module_of_the_working_folder_is_imported(
    tmp_path: Path, write, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    path = str(write(tmp_path / "clip.mp4", np.arange(30) / 30))
    for name in ("cv2", "random", "token", "data_prep"):
        (tmp_path / f"{name}.py").write_text("open('I_WAS_RUN', 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(decoder.plan_clips(path).spans) == 1
    assert not (tmp_path / "I_WAS_RUN").exists()
