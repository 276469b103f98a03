"""What the quickstart samples, and how well the samples obey: the judge's own test first, then its verdicts."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sora_train.log import log
from sora_train.quickstart.oracle import Verdict, accuracy, judge, obedience
from sora_train.quickstart.shapes import FPS, SHAPES, Scene, all_scenes, draw
from sora_train.sample import Run, generate_each
from sora_train.sample.generate import Progress
from sora_train.storage import atomic_write_text
from sora_train.video import read_mp4, write_mp4

SEEDS = (0, 1)
JUDGE_BAR = 0.99
VERDICTS = "verdicts.json"
"""Beside the samples: what each shows, read from its frames as they were sampled, in the order of `samples.json`."""


def scenes() -> list[Scene]:
    """What is sampled: every held-out combination, and for each a seen one of the same colour and direction."""
    held_out = [scene for scene in all_scenes() if scene.held_out]
    seen = [Scene(s.colour, SHAPES[(SHAPES.index(s.shape) + 1) % len(SHAPES)], s.direction) for s in held_out]
    return seen + held_out


def by_caption() -> dict[str, Scene]:
    """Every scene under its caption."""
    return {scene.caption: scene for scene in all_scenes()}


def measure(clips_folder: Path, run_folder: Path, final: Path) -> dict:
    """Stage 5: the judge's own test on real clips, then its verdicts on the samples, into obedience.json."""
    videos, truth = real_clips(clips_folder)
    own = accuracy(videos, truth)
    log.info(f"  the judge reads {own:.1%} of {len(videos)} real clips rightly; the bar is {JUDGE_BAR:.0%}")
    if own < JUDGE_BAR:
        raise RuntimeError(f"the judge reads only {own:.1%} of real clips rightly: its verdicts would mean nothing")
    listing = json.loads((final / "samples.json").read_text(encoding="utf-8"))
    shown = by_caption()
    verdicts = read_verdicts(final)
    shares = obedience(verdicts, [shown[entry["prompt"]] for entry in listing["samples"]])
    record = {**shares, "judge_accuracy": own, "judge_clips": len(videos), "checkpoint": listing["checkpoint"]}
    (run_folder / "obedience.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    log.info(f"  {run_folder / 'obedience.json'}")
    return shares


def write_verdicts(final: Path, verdicts: Sequence[Verdict]) -> None:
    """Verdicts on samples, into their folder."""
    atomic_write_text(final / VERDICTS, json.dumps([asdict(verdict) for verdict in verdicts]))


def read_verdicts(final: Path) -> list[Verdict]:
    """The verdicts that `write_verdicts` wrote."""
    return [Verdict(**entry) for entry in json.loads((final / VERDICTS).read_text(encoding="utf-8"))]


def obey(run: Run, captions: Iterable[str], progress: Progress | None = None) -> dict | None:
    """Obedience of new samples, as the run samples, of every scene and seed; None where not all these captions are the
    demo's: of other clips the judge knows nothing.
    """
    captions, shown = set(captions), by_caption()
    if not captions or captions - shown.keys():
        return None
    pairs = [(scene, seed) for scene in scenes() for seed in SEEDS]
    each_scene, each_seed = zip(*pairs, strict=True)
    videos = generate_each(run, [scene.caption for scene in each_scene], each_seed, progress=progress)
    return obedience([judge(video) for video in videos], each_scene)


def real_clips(folder: Path, count: int = 96) -> tuple[list[np.ndarray], list[Scene]]:
    """The first `count` clips that training had, and new ones of every held-out combination, all through H.264."""
    shown = by_caption()
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:count]
    videos = [read_mp4(folder / row["video_file_name"]) for row in rows]
    truth = [shown[row["prompt"]] for row in rows]
    with tempfile.TemporaryDirectory() as place:
        for i, scene in enumerate(scene for scene in all_scenes() if scene.held_out):
            write_mp4(Path(place) / "clip.mp4", draw(scene, np.random.default_rng((99, i))), fps=FPS)
            videos.append(read_mp4(Path(place) / "clip.mp4"))
            truth.append(scene)
    return videos, truth
