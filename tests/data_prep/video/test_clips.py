"""What files are cut into and what clips they give, against videos whose frames carry their own number."""

import hashlib
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.buckets import Bucket
from data_prep.reasons import ClipError
from data_prep.video.clips import ClipSpan, Source
from data_prep.video.probe import read_header
from data_prep.video.timeline import read_timeline
from sora_train.data.config import DataConfig, SelectionConfig
from tests.data_prep.clip_files import plan_clips, read_clip

DATA = DataConfig(frames=8, height=32, width=64, fps=8.0)
ALL = SelectionConfig()
BUCKET = Bucket(8, 32, 64, 8.0)
STEADY = np.arange(60) / 30


def first(path: Path | str, data: DataConfig = DATA):
    """The first clip of a file."""
    return read_clip(str(path), plan_clips(str(path), data, ALL).spans[0], data, ALL, "0")


def starts(path: Path, selection: SelectionConfig = ALL, **keys) -> list[float]:
    """Where the clips of a file begin."""
    cut = plan_clips(str(path), DATA.model_copy(update=keys), selection)
    assert all(span.end_s == pytest.approx(span.start_s + span.bucket.seconds) for span in cut.spans)
    return [span.start_s for span in cut.spans]


def refusal(path: Path | str, data: DataConfig = DATA, selection: SelectionConfig = ALL) -> ClipError:
    with pytest.raises(ClipError) as error:
        Source(str(path), data, selection).plan_clips()
    assert error.value.message
    return error.value


def test_clips_begin_every_stride_while_a_bucket_is_filled(tmp_path: Path, write):
    path = write(tmp_path / "clip.mp4", np.arange(150) / 30)  # 5 s
    assert starts(path) == [0.0]
    assert starts(path, start_s=1.5) == [1.5]
    assert starts(path, stride_s=1.5) == [0.0, 1.5, 3.0]
    assert starts(path, stride_s=1.0) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert starts(path, stride_s=0.3, start_s=3.0, clips_per_video=3) == [3.0, 3.3, 3.6]
    assert refusal(path, DATA.model_copy(update={"start_s": 4.5})).reason == "too_short"
    beyond = refusal(path, DATA.model_copy(update={"start_s": 60.0})).message
    assert re.match(r"data.start_s is 60, of \d\.\d\d s; after it, the video lasts ", beyond)


def test_each_clip_holds_the_frames_of_its_own_span(tmp_path: Path, write, number_of, on_screen):
    times = np.arange(240) / 30
    path = write(tmp_path / "clip.mp4", times, gop=30)
    data = DATA.model_copy(update={"stride_s": 0.7, "start_s": 0.25})
    source = Source(str(path), data, ALL)
    spans = source.plan_clips().spans
    assert len(spans) == 10
    for span in spans:
        expected = on_screen(times, span.start_s + np.arange(8) / 8)
        alone = read_clip(str(path), span, data, ALL, "0").frames
        kept_open = source.read(span, "0").frames
        np.testing.assert_array_equal(kept_open, alone)
        assert [number_of(frame) for frame in alone] == expected


def test_time_is_counted_from_the_first_frame(tmp_path: Path, write, number_of, on_screen, shared: Path):
    late = first(write(tmp_path / "late.mp4", STEADY + 10))
    assert [number_of(frame) for frame in late.frames] == on_screen(STEADY, np.arange(8) / 8)
    path = shared / "data" / "clips" / "derived" / "start_offset_10s.mp4"
    assert plan_clips(str(path), DATA, ALL).seconds == pytest.approx(2.002)
    assert first(path).frames.shape == (8, 32, 64, 3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.ts", "mpeg2video"), ("clip.webm", "libvpx"), ("clip.mkv", "libx264"), ("clip.avi", "mpeg4")],
)
def test_every_container_gives_the_same_frames(tmp_path: Path, write, number_of, on_screen, name: str, codec: str):
    expected = on_screen(STEADY, np.arange(8) / 8)
    assert [number_of(frame) for frame in first(write(tmp_path / name, STEADY, codec)).frames] == expected


def test_pixels_that_are_not_square_are_stretched(shared: Path):
    folder, wide = shared / "data" / "clips" / "derived", DataConfig(frames=4, height=90, width=160, fps=8.0)
    assert plan_clips(str(folder / "anamorphic_sar.mp4"), wide, ALL).width == round(240 * 16 / 9)
    stretched = first(folder / "anamorphic_sar.mp4", wide).frames.astype(float)
    square = first(folder / "flower_mpeg4.avi", wide).frames.astype(float)
    assert np.abs(stretched - square).mean() < 6


def test_a_turned_video_goes_to_the_bucket_of_its_shown_shape(tmp_path: Path, write, number_of, on_screen):
    data = DataConfig(buckets=("8x32x64", "8x64x32"), fps=8.0)
    for rotation, name in ((0, "8x32x64"), (90, "8x64x32"), (180, "8x32x64"), (270, "8x64x32")):
        path = write(tmp_path / "clip.mp4", STEADY, rotation=rotation)
        cut = plan_clips(str(path), data, ALL)
        assert cut.spans[0].bucket.name == name
        assert (cut.width, cut.height) == ((128, 64) if name == "8x32x64" else (64, 128))
        frames = read_clip(str(path), cut.spans[0], data, ALL, "0").frames
        upright = [np.rot90(frame, -rotation // 90) for frame in frames]
        assert [number_of(frame) for frame in upright] == on_screen(STEADY, np.arange(8) / 8)


def test_crop_and_flip_follow_the_seed(tmp_path: Path, write):
    slope = np.broadcast_to(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (64, 128, 3))
    path = str(write(tmp_path / "clip.mp4", STEADY, pictures=lambda _: slope.copy()))
    data = DataConfig(frames=8, height=32, width=32, fps=8.0, crop="random", flip=True)
    span = plan_clips(path, data, ALL).spans[0]
    clips = [read_clip(path, span, data, ALL, str(seed)).frames.astype(int) for seed in range(12)]
    np.testing.assert_array_equal(clips[3], read_clip(path, span, data, ALL, "3").frames)
    rises = [clip[0, 0, -1, 0] > clip[0, 0, 0, 0] for clip in clips]
    assert 2 <= sum(rises) <= 10
    assert np.std([clip.mean() for clip in clips]) > 10
    assert all(np.abs(clip - clip[0]).max() <= 6 for clip in clips)  # one crop for all frames of a clip


def test_metadata_selects_before_anything_is_decoded(tmp_path: Path, write):
    path = write(tmp_path / "clip.mp4", STEADY)
    for keys, reason in (
        ({"min_seconds": 2.5}, "too_short"),
        ({"max_seconds": 1.5}, "too_long"),
        ({"min_side": 65}, "too_small"),
    ):
        error = refusal(path, selection=SelectionConfig(**keys))
        assert error.reason == reason
        assert f"selection.{next(iter(keys))}" in error.message
    assert starts(path, SelectionConfig(min_seconds=1.9, max_seconds=2.1, min_side=64)) == [0.0]
    assert (
        refusal(path, DATA.model_copy(update={"height": 128, "width": 256, "max_enlarge": 1.5})).reason == "too_small"
    )


def test_a_clip_never_crosses_a_cut(shared: Path, tmp_path: Path):
    path = shared / "data" / "clips" / "derived" / "hard_cut.mp4"  # a flower, then a frog
    cuts = SelectionConfig(scene_cuts=True)
    free = starts(path, stride_s=0.5)
    kept = starts(path, cuts, stride_s=0.5)
    from data_prep.filters import scene_spans

    ((_, cut), (_, end)) = scene_spans(str(path), 27.0)
    assert kept == [*np.arange(0, cut - 1 + 1e-6, 0.5), *np.round(cut + np.arange(0, end - cut - 1 + 0.01, 0.5), 6)]
    assert len(free) > len(kept)
    assert starts(path, cuts) == [0.0]
    with pytest.raises(ClipError, match="has 2 scenes, the longest of") as error:
        plan_clips(str(path), DATA.model_copy(update={"frames": 20}), cuts)
    assert error.value.reason == "crosses_cut"
    assert plan_clips(str(path), DATA.model_copy(update={"frames": 20}), cuts, headers_only=True).spans


def test_a_video_shorter_than_the_clip_is_too_short(tmp_path: Path, write):
    error = refusal(write(tmp_path / "clip.mp4", STEADY[:20]))
    assert error.reason == "too_short"
    assert error.message.startswith("lasts 0.67 s; ")
    assert "a clip of 8 frames at 8 fps takes 1.00 s" in error.message


def test_a_cut_file_gives_the_clips_before_the_break(tmp_path: Path, write, number_of):
    path = write(tmp_path / "clip.mkv", np.arange(120) / 30, "mpeg4")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    source = Source(str(path), DATA.model_copy(update={"stride_s": 1.0}), ALL)
    spans = source.plan_clips().spans
    assert [span.start_s for span in spans] == [0.0, 1.0, 2.0, 3.0]
    clips = [source.read(span, "0") for span in spans[:2]]
    assert number_of(clips[1].frames[0]) == 30
    assert "ends early, at 2." in clips[0].remark
    assert clips[1].remark == ""  # once per file
    for span in spans[2:]:
        with pytest.raises(ClipError, match=r"s of the 4\.0. s that it promises decode") as error:
            source.read(span, "0")
        assert error.value.reason == "truncated"


def test_longer_sound_does_not_lengthen_the_video(tmp_path: Path, write):
    """A WebM names only the duration of the whole: here the sound's."""
    silent = write(tmp_path / "silent.webm", STEADY, "libvpx")
    path = tmp_path / "sound.webm"
    with av.open(str(silent)) as source, av.open(str(path), "w") as file:
        picture = file.add_stream_from_template(source.streams.video[0])
        sound = file.add_stream("libopus", rate=48000, layout="mono")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = picture
                file.mux(packet)
        for number in range(200):  # 4 s
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, number * 960
            file.mux(sound.encode(frame))
        file.mux(sound.encode())
    content = path.read_bytes().replace(b"DURATION", b"DURATIOM")  # FFmpeg's own tag, which browsers don't write
    path.write_bytes(content)
    assert plan_clips(str(path), DATA, ALL).seconds == pytest.approx(2.0, abs=0.05)
    path.write_bytes(content[: len(content) // 2])
    assert plan_clips(str(path), DATA, ALL).seconds == pytest.approx(4.0, abs=0.05)


def test_a_file_that_promises_nothing_is_measured_by_its_packets(tmp_path: Path, write):
    path = tmp_path / "live.mkv"
    whole = str(write(tmp_path / "a.mp4", STEADY))
    with av.open(whole) as source, av.open(str(path), "w", options={"live": "1"}) as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                file.mux(packet)
    assert read_header(str(path)).container_duration_s == 0.0
    assert read_timeline(str(path), read_header(str(path))).end == pytest.approx(2.0, abs=0.01)
    assert starts(path, stride_s=0.5) == [0.0, 0.5, 1.0]
    assert len(first(path).frames) == 8


@pytest.mark.parametrize(
    ("file", "reason"),
    {
        "audio_only.mp4": "no_video_stream",
        "html_404.webm": "unreadable",
        "huge_dims_header.mp4": "too_large",
        "only_ftyp.mp4": "unreadable",
        "random_bytes.mp4": "unreadable",
        "text_renamed.mp4": "unreadable",
        "truncated_no_moov.mp4": "unreadable",
        "zero_bytes.mp4": "unreadable",
    }.items(),
)
def test_a_broken_file_has_a_true_reason(shared: Path, file: str, reason: str):
    assert refusal(shared / "data" / "broken" / file).reason == reason


def test_an_encrypted_video_is_refused_as_such(tmp_path: Path, write):
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "1" * 32, "encryption_kid": "2" * 32}
    path = str(write(tmp_path / "a.mp4", np.arange(30) / 30))
    with av.open(path) as file, av.open(str(tmp_path / "b.mp4"), "w", options=options) as out:
        copy = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    assert str(refusal(tmp_path / "b.mp4")).startswith("unreadable: is encrypted")


@pytest.mark.parametrize(
    "file",
    ["corrupt_mdat.mp4", "truncated.mkv", "truncated_60pct.mp4", "wrong_extension_gif.mp4", "wrong_extension_webm.avi"],
)
def test_a_file_that_can_give_a_clip_gives_one(shared: Path, file: str):
    assert first(shared / "data" / "broken" / file).frames.shape == (8, 32, 64, 3)


def test_a_clip_past_the_damage_is_corrupt_or_truncated(shared: Path):
    for file, reason in (("corrupt_mdat.mp4", "corrupt"), ("truncated_60pct.mp4", "truncated")):
        with pytest.raises(ClipError) as error:
            first(shared / "data" / "broken" / file, DATA.model_copy(update={"frames": 32}))
        assert error.value.reason == reason


def test_a_still_picture_is_a_clip_of_one_frame(tmp_path: Path):
    path = tmp_path / "photo.mp4"  # names say nothing
    Image.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(path, format="PNG")
    data = DataConfig(buckets=("8x32x64", "1x32x32", "1x32x64"), fps=8.0)
    cut = plan_clips(str(path), data, ALL)
    assert (cut.is_image, cut.seconds, cut.width, cut.height) == (True, 0.0, 128, 64)
    assert cut.spans == (ClipSpan(0.0, 0.0, Bucket(1, 32, 64, 8.0)),)
    clip = read_clip(str(path), cut.spans[0], data, ALL, "0")
    assert clip.frames.shape == (1, 32, 64, 3)
    assert (clip.frames == 90).all()
    assert clip.content_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(clip.perceptual_hash) == 48
    assert refusal(path).reason == "too_short"


def test_a_cover_picture_is_no_video(tmp_path: Path, shared: Path):
    path = tmp_path / "song.mp4"
    with av.open(str(shared / "data" / "broken" / "audio_only.mp4")) as source, av.open(str(path), "w") as file:
        sound = file.add_stream_from_template(source.streams.audio[0])
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = sound
                file.mux(packet)
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(cover.encode())
    assert refusal(path).reason == "no_video_stream"


@pytest.mark.parametrize("size", [(8192, 8192), (8256, 64)])
def test_a_frame_beyond_the_limit_is_refused(tmp_path: Path, size: tuple[int, int]):
    path = tmp_path / "bomb.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
        frame = av.VideoFrame(*size, "yuvj420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    error = refusal(path)
    assert error.reason == "too_large"
    assert f"{size[0]}x{size[1]}" in error.message


def test_a_changed_file_is_opened_anew_by_its_bytes(tmp_path: Path, write):
    path = tmp_path / "clip.mp4"
    for gop in (6, 12):
        shutil.copy(write(tmp_path / f"{gop}.mp4", STEADY, gop=gop), path)
        assert first(path).content_hash == hashlib.sha256(path.read_bytes()).hexdigest()
