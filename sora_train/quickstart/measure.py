"""Prompt accuracy of the quickstart's samples, after a test of the oracle."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sora_train.log import log
from sora_train.quickstart.oracle import Verdict, accuracy, classify, prompt_accuracy
from sora_train.quickstart.shapes import COLOURS, FPS, SHAPES, Scene, all_scenes, draw
from sora_train.sample import Run, generate_each
from sora_train.sample.generate import Progress
from sora_train.storage import atomic_write_text
from sora_train.video import read_mp4, write_mp4

SEEDS = (0, 1)
ORACLE_BAR = 0.99
VERDICTS = "verdicts.json"
"""File next to the samples: what the oracle reads from each, in the order of `samples.json`."""


def scenes() -> list[Scene]:
    """The sampled scenes: every held-out combination, and as many seen ones.

    Each held-out combination has a seen one of the same colour and direction.
    """
    held_out = [scene for scene in all_scenes() if scene.held_out]
    seen = [Scene(s.colour, SHAPES[(SHAPES.index(s.shape) + 1) % len(SHAPES)], s.direction) for s in held_out]
    return seen + held_out


def scenes_by_caption() -> dict[str, Scene]:
    """Every scene by its caption."""
    return {scene.caption: scene for scene in all_scenes()}


def measure_samples(clips_folder: Path, run_folder: Path, final: Path) -> dict:
    """Stage 5: tests the oracle on real clips, then measures the samples.

    Writes the results to obedience.json.
    """
    videos, truth = real_clips(clips_folder)
    own = check_oracle(videos, truth)
    listing = json.loads((final / "samples.json").read_text(encoding="utf-8"))
    shown = scenes_by_caption()
    verdicts = read_verdicts(final)
    shares = prompt_accuracy(verdicts, [shown[entry["prompt"]] for entry in listing["samples"]])
    record = {**shares, "judge_accuracy": own, "judge_clips": len(videos), "checkpoint": listing["checkpoint"]}
    (run_folder / "obedience.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    log.info(f"  {run_folder / 'obedience.json'}")
    return shares


def check_oracle(
    videos: Sequence[np.ndarray], truth: Sequence[Scene], colours: Mapping[str, tuple[int, int, int]] = COLOURS
) -> float:
    """The share of real clips that the oracle reads correctly. Raises RuntimeError if it is too low."""
    own = accuracy(videos, truth, colours)
    log.info(f"  the oracle reads {own:.1%} of {len(videos)} real clips correctly; at least {ORACLE_BAR:.0%} is needed")
    if own < ORACLE_BAR:
        raise RuntimeError(f"the oracle reads only {own:.1%} of real clips correctly: its verdicts mean nothing")
    return own


def write_verdicts(final: Path, verdicts: Sequence[Verdict]) -> None:
    """Writes the verdicts on samples into their folder."""
    atomic_write_text(final / VERDICTS, json.dumps([asdict(verdict) for verdict in verdicts]))


def read_verdicts(final: Path) -> list[Verdict]:
    """Reads the verdicts that `write_verdicts` wrote."""
    return [Verdict(**entry) for entry in json.loads((final / VERDICTS).read_text(encoding="utf-8"))]


def measure_prompt_accuracy(run: Run, captions: Iterable[str], progress: Progress | None = None) -> dict | None:
    """Prompt accuracy of new samples of every scene and seed, or None.

    None if any caption is not the quickstart's, because the oracle can't read other clips.
    """
    captions, shown = set(captions), scenes_by_caption()
    if not captions or captions - shown.keys():
        return None
    pairs = [(scene, seed) for scene in scenes() for seed in SEEDS]
    each_scene, each_seed = zip(*pairs, strict=True)
    videos = generate_each(run, [scene.caption for scene in each_scene], each_seed, progress=progress)
    return prompt_accuracy([classify(video) for video in videos], each_scene)


def real_clips(folder: Path, count: int = 96) -> tuple[list[np.ndarray], list[Scene]]:
    """The first `count` training clips, and new held-out ones, decoded from H.264.

    There is one new clip of every held-out combination.
    """
    shown = scenes_by_caption()
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
