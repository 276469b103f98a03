"""Duplicates equal a comparison of all pairs; real clips whose copies are known."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates
from data_prep.duplicates import Duplicates
from sora_train.data.config import DataConfig, SelectionConfig
from tests.data_prep.clip_files import plan_clips, read_clip


def hexed(*numbers: int) -> str:
    return "".join(f"{number:016x}" for number in numbers)


def test_equal_bytes_at_an_equal_span_are_a_duplicate():
    kept = Duplicates(SelectionConfig(duplicates=True))
    for name in ("first", "second"):
        kept.add(name, f"{name}.mp4", "bytes", hexed(1, 2, 3), (0.0, 1.0))
    assert kept.find("bytes", hexed(9, 9, 9), (0.0, 1.0)) == ("duplicate", "first", "first.mp4")
    assert kept.find("bytes", hexed(1, 2, 3), (1.0, 2.0)) is None
    assert kept.find("others", hexed(1, 2, 3), (0.0, 1.0)) is None


@pytest.mark.parametrize("bits", [0, 4, 6, 11, 15, 18])
def test_near_duplicates_equal_a_comparison_of_every_pair(monkeypatch: pytest.MonkeyPatch, bits: int):
    monkeypatch.setattr(duplicates, "BLOCK", 50)
    rng = np.random.default_rng(bits)
    clips = rng.integers(0, 2, (700, 3, 64), dtype=np.uint8)
    for i in range(350, 700):  # half of them differ from another clip by some more bits of each frame than count
        clips[i] = clips[rng.integers(0, i)]
        for frame in clips[i]:
            frame[rng.permutation(64)[: rng.integers(0, bits + 3)]] ^= 1
    kept, names, found, due = Duplicates(SelectionConfig(near_duplicates=bits)), [], [], []
    stored = np.empty_like(clips)
    for i, clip in enumerate(clips):
        code = hexed(*(int("".join(map(str, frame)), 2) for frame in clip))
        like = np.flatnonzero(((stored[: len(names)] != clip).sum(2) <= bits).all(1))
        due.append(("near_duplicate", names[like[0]], f"{names[like[0]]}.mp4") if len(like) else None)
        found.append(kept.find(str(i), code, (0.0, 1.0)))
        if found[-1] is None:
            kept.add(str(i), f"{i}.mp4", str(i), code, (0.0, 1.0))
            stored[len(names)] = clip
            names.append(str(i))
    assert found == due
    assert len(kept) == len(names) > 360
    assert len(names) < 700


def test_exact_duplicates_equal_a_dict_of_all_clips(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(duplicates, "BLOCK", 30)
    rng = np.random.default_rng(0)
    kept, first = Duplicates(SelectionConfig(duplicates=True)), {}
    for i, (content, span) in enumerate(rng.integers(0, 30, (1000, 2)).tolist()):
        due = first.setdefault((content, span), (str(i), f"{i}.mp4"))
        found = kept.find(str(content), "", (0.0, float(span)))
        assert found == (None if due[0] == str(i) else ("duplicate", *due))
        kept.add(str(i), f"{i}.mp4", str(content), "", (0.0, float(span)))


def test_a_clip_without_a_hash_has_no_near_duplicate():
    kept = Duplicates(SelectionConfig(near_duplicates=64))
    kept.add("old", "a.mp4", "a", "", (0.0, 1.0))
    assert kept.find("b", hexed(1, 2, 3), (0.0, 1.0)) is None
    kept.add("new", "b.mp4", "b", hexed(1, 2, 3), (0.0, 1.0))
    assert kept.find("c", "", (0.0, 1.0)) is None


def test_nothing_is_stored_if_both_filters_are_off():
    kept = Duplicates(SelectionConfig())
    for i in range(2000):
        kept.add(str(i), "a.mp4", "same", hexed(1, 2, 3), (0.0, 1.0))
    assert kept.find("same", hexed(1, 2, 3), (0.0, 1.0)) is None
    assert len(kept) == 0


def test_only_copies_of_one_video_are_near_duplicates(shared: Path):
    derived = ("flower_hevc10.mkv", "flower.gif", "flower_theora.ogv", "gray.mp4", "tiny_32x18.mp4", "fps60.mp4")
    families = {
        "flower": ["flower.mp4", "flower.webm", *(f"derived/{name}" for name in derived)],
        "frog": ["mdn_frog.mp4", "mdn_frog.webm", "derived/vfr_frog.mp4"],
        "rabbit": ["mdn_rabbit.webm", "rabbit320.mp4"],
        "friday": ["friday.mp4", "derived/rot90_meta.mp4"],
        "water": ["stream_of_water.mp4", "stream_of_water.webm"],
    } | {name: [f"{name}.mkv"] for name in ("asl_milk", "asl_sorry", "asl_please", "asl_bird", "asl_again", "asl_no")}
    data, kept = DataConfig(frames=16, fps=16.0), Duplicates(SelectionConfig(near_duplicates=4))
    for family, names in families.items():
        for number, name in enumerate(names):
            path = str(shared / "data/clips" / name)
            span = plan_clips(path, data, SelectionConfig()).spans[0]
            clip = read_clip(path, span, data, SelectionConfig(), name)
            found = kept.find(clip.content_hash, clip.perceptual_hash, (span.start_s, span.end_s))
            assert found == (("near_duplicate", family, names[0]) if number else None), name
            if not found:
                kept.add(family, name, clip.content_hash, clip.perceptual_hash, (span.start_s, span.end_s))
