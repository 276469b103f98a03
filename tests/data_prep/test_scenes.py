"""Scene cuts in videos with known cuts, and PySceneDetect's own loop as the oracle."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.filters import scene_spans
from data_prep.reasons import ClipError

EVEN = np.arange(60) / 30
UNEVEN = np.cumsum(np.r_[0, np.tile([0.01, 0.09, 0.03, 0.2], 12)])


def cut_at(*cuts: int) -> Callable[[int], np.ndarray]:
    """Pictures of a texture that moves slowly, another from each of the numbered frames on."""
    rng = np.random.default_rng(0)
    scenes = [rng.integers(60, 180, (8, 40)).repeat(8, 0).repeat(8, 1) for _ in range(len(cuts) + 1)]

    def picture(number: int) -> np.ndarray:
        scene = sum(number >= cut for cut in cuts)
        tint = np.array([[40, 0, 0], [0, 40, 80], [-60, 80, 0]][scene % 3])
        part = scenes[scene][:64, number : number + 128, None]
        return (part + tint).clip(0, 255).astype(np.uint8)

    return picture


@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_cuts_are_found_at_the_frames_where_they_were_made(
    write: Callable[..., Path], tmp_path: Path, times: np.ndarray
):
    path = write(tmp_path / "cut.mp4", times, pictures=cut_at(7, 31, 36))
    spans = scene_spans(str(path), 27.0)
    bounds = [start for start, _ in spans] + [spans[-1][1]]
    assert bounds[:-1] == pytest.approx(times[[0, 7, 31, 36]], abs=1e-3)
    assert bounds[-1] > times[-1]
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]


def test_a_video_without_cuts_is_one_scene(write: Callable[..., Path], tmp_path: Path):
    path = str(write(tmp_path / "whole.mp4", EVEN, pictures=cut_at()))
    assert scene_spans(path, 27.0) == [(0.0, pytest.approx(2.0, abs=0.01))]
    assert len(scene_spans(str(write(tmp_path / "cut.mp4", EVEN, pictures=cut_at(30))), 250.0)) == 1


def test_scene_detection_calls_alive_at_every_frame(write: Callable[..., Path], tmp_path: Path):
    seen = []
    scene_spans(str(write(tmp_path / "whole.mp4", EVEN)), 27.0, lambda: seen.append(1))
    assert len(seen) == len(EVEN)


def test_a_real_cut_is_where_most_of_the_picture_changes(shared: Path):
    path = str(shared / "data/clips/derived/hard_cut.mp4")
    with av.open(path) as file:
        frames = [(frame.time, frame.to_ndarray(format="gray").astype(float)) for frame in file.decode(video=0)]
    steps = [np.abs(after - before).mean() for (_, before), (_, after) in pairwise(frames)]
    cut = frames[int(np.argmax(steps)) + 1][0]
    first, second = scene_spans(path, 27.0)
    assert first == (0.0, pytest.approx(cut))
    assert second == (pytest.approx(cut), pytest.approx(3.0, abs=0.05))


def test_cuts_of_a_film_equal_those_of_pyscenedetects_loop(shared: Path):
    from scenedetect import ContentDetector, SceneManager
    from scenedetect.backends import VideoStreamAv

    path, manager = str(shared / "data/clips/bbb_0_30.webm"), SceneManager()
    manager.add_detector(ContentDetector(27.0, min_scene_len=0))
    manager.detect_scenes(VideoStreamAv(path, suppress_output=True))
    theirs = [start.seconds for start, _ in manager.get_scene_list() if start.seconds > 1]
    # Within the first second the film fades in from grey, where hues are noise: there the two ways of shrinking differ.
    assert len(theirs) >= 3
    assert [start for start, _ in scene_spans(path, 27.0) if start > 1] == pytest.approx(theirs, abs=0.002)


def test_time_begins_at_the_first_frame(shared: Path):
    assert scene_spans(str(shared / "data/clips/derived/start_offset_10s.mp4"), 27.0) == [
        (0.0, pytest.approx(2.0, abs=0.05))
    ]


def test_the_last_scene_reaches_to_the_containers_end(shared: Path):
    assert scene_spans(str(shared / "data/broken/truncated_60pct.mp4"), 27.0)[-1][1] == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize(
    ("name", "said"),
    [("random_bytes.mp4", "unreadable"), ("audio_only.mp4", "no_video_stream"), ("zero_bytes.mp4", "unreadable")],
)
def test_a_broken_file_has_no_scenes_but_a_reason(shared: Path, name: str, said: str):
    with pytest.raises(ClipError) as raised:
        scene_spans(str(shared / "data/broken" / name), 27.0)
    assert raised.value.reason == said


def test_a_video_of_which_nothing_decodes_is_corrupt(write: Callable[..., Path], tmp_path: Path):
    path = write(tmp_path / "gone.mkv", EVEN)
    with av.open(str(path)) as file:
        stretches = [(packet.pos or 0, packet.size) for packet in file.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for start, size in stretches:
        content[start + 12 : start + size] = b"\xff" * (size - 12)
    path.write_bytes(content)
    with pytest.raises(ClipError) as raised:
        scene_spans(str(path), 27.0)
    assert raised.value.reason == "corrupt"
