"""`sora demo --image`: videos that continue a given first frame, from drawn clips to measured samples.

The frame shows colour and shape, in the middle; the caption says only the direction. Every frame that is sampled from
is new, and given with each of the four directions.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora_train.log import every_few_seconds, log
from sora_train.provenance import usable_cores
from sora_train.quickstart.measure import SEEDS, VERDICTS, check_oracle
from sora_train.quickstart.oracle import Verdict, classify, prompt_accuracy
from sora_train.quickstart.run import clips, find_recipe, is_sampled, remove_samples, stage
from sora_train.quickstart.shapes import COLOURS, DIRECTIONS, SHAPES, Scene, all_scenes, draw
from sora_train.recipe import load_recipe
from sora_train.storage import atomic_write_text
from sora_train.video import contact_sheet, psnr

if TYPE_CHECKING:
    from sora_train.sample.condition import GivenFrames

RECIPE = "jobs/quickstart_image.yaml"
PSNR_BAR = 30.0
"""Least PSNR, in dB, of a sample's first frame to the given one, so that it counts as kept."""


def demo_image(overrides: Mapping[str, object]) -> None:
    """Runs all stages. Paths in the recipe are relative to the current directory."""
    from data_prep.pipeline import prep
    from sora_train.launch.trainer import launch_training
    from sora_train.report import write_report

    started = time.monotonic()
    recipe = load_recipe(find_recipe(RECIPE), overrides)
    run_folder = Path(recipe.train.output) / recipe.name

    with stage(1, "clips: coloured shapes that move from the middle, with captions of their direction", started):
        clips(recipe, image=True)
    with stage(2, "prep: videos and captions to latents and embeddings", started):
        prep(recipe)
    with stage(3, f"train: {recipe.train.steps} steps on {recipe.cluster.workers} workers", started):
        launch_training(recipe)
    with stage(4, f"sample: {len(SEEDS) * len(COLOURS) * len(SHAPES)} new first frames, in four directions", started):
        final = sample(run_folder)
    with stage(5, "measure: what the samples show, read from their pixels", started):
        shares = measure(run_folder, final)
    with stage(6, "report", started):
        log.info(f"  {write_report(run_folder)}")
    log.info(summary(run_folder, shares, time.monotonic() - started))


def samples() -> list[tuple[Scene, int]]:
    """The sampled scenes and the seeds of their first frames."""
    return [(scene, seed) for scene in all_scenes() for seed in SEEDS]


def first_frame(scene: Scene, seed: int) -> np.ndarray:
    """A frame, uint8 `1 H W 3`, that is in no training clip. It is the same for every direction."""
    rng = np.random.default_rng((97, list(COLOURS).index(scene.colour), SHAPES.index(scene.shape), seed))
    return draw(scene, rng, frames=1, from_middle=True)


def given_frames(pairs: Sequence[tuple[Scene, int]]) -> list[GivenFrames]:
    """The first frame of each sample."""
    from sora_train.sample.condition import GivenFrames

    frames = [first_frame(scene, seed) for scene, seed in pairs]
    return [GivenFrames(frame, hashlib.sha256(frame.tobytes()).hexdigest()) for frame in frames]


def sample(run_folder: Path) -> Path:
    """Writes samples, what they show and a contact sheet. Returns their folder."""
    import torch

    from sora_train.sample import load_run, sample_to_folder

    pairs = samples()
    run, folder = load_run(run_folder), run_folder / "samples" / "final"
    prompts, given = [scene.motion for scene, _ in pairs], given_frames(pairs)
    if is_sampled(folder, run.checkpoint, [(prompt, 0) for prompt in prompts]):
        log.info(f"  {folder} holds them already")
        return folder
    remove_samples(folder)
    torch.set_num_threads(usable_cores())
    videos: list[np.ndarray] = []
    progress = every_few_seconds(lambda done, of: log.info(f"  {done} of {of} sampler steps"))
    sample_to_folder(run, prompts, None, folder, progress=progress, given=given, on_video=videos.append)
    kept = [min(100.0, psnr(video[0], frames.frames[0])) for video, frames in zip(videos, given, strict=True)]
    verdicts = [{**asdict(classify(video)), "psnr": found} for video, found in zip(videos, kept, strict=True)]
    atomic_write_text(folder / VERDICTS, json.dumps(verdicts))
    write_sheet(videos, pairs, folder / "sheet.png")
    log.info(f"  {len(videos)} videos and sheet.png in {folder}")
    return folder


def measure(run_folder: Path, final: Path, pairs: Sequence[tuple[Scene, int]] | None = None) -> dict[str, Any]:
    """Tests the oracle on real clips, then measures the samples. Writes the results to obedience.json."""
    pairs = samples() if pairs is None else pairs
    truth = all_scenes()
    real = [draw(scene, np.random.default_rng((98, i)), from_middle=True) for i, scene in enumerate(truth)]
    own = check_oracle(real, truth)
    entries = json.loads((final / VERDICTS).read_text(encoding="utf-8"))
    kept = [entry.pop("psnr") for entry in entries]
    shares = prompt_accuracy([Verdict(**entry) for entry in entries], [scene for scene, _ in pairs])
    shares |= {
        "psnr": round(float(np.mean(kept)), 2),
        "psnr_lowest": round(min(kept), 2),
        "first_frame": round(float(np.mean(np.array(kept) >= PSNR_BAR)), 4),
    }
    checkpoint = json.loads((final / "samples.json").read_text(encoding="utf-8"))["checkpoint"]
    record = {**shares, "judge_accuracy": own, "judge_clips": len(real), "checkpoint": checkpoint}
    (run_folder / "obedience.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    log.info(f"  {run_folder / 'obedience.json'}")
    return shares


def write_sheet(videos: Sequence[np.ndarray], pairs: Sequence[tuple[Scene, int]], path: Path) -> None:
    """One frame of each colour in all four directions. The given frame is the first of each strip."""
    chosen = [
        (i, scene)
        for i, (scene, seed) in enumerate(pairs)
        if seed == 0 and list(COLOURS).index(scene.colour) % len(SHAPES) == SHAPES.index(scene.shape)
    ]
    titles = ["held out" if scene.held_out else "seen" for _, scene in chosen]
    shown = [(videos[i], f"{scene.motion} ({scene.colour} {scene.shape} given)") for i, scene in chosen]
    contact_sheet([video for video, _ in shown], [title for _, title in shown], titles).save(path, optimize=True)


def summary(run_folder: Path, shares: dict[str, Any], seconds: float) -> str:
    """The final message: results, where they are, and what to try next."""
    names = ("colour", "shape", "direction", "all")
    given = next((run_folder / "samples" / "final").glob("given-*.png"))
    others = " ".join(f'--prompt "moving {direction}"' for direction in list(DIRECTIONS)[:2])
    least, share = shares["psnr_lowest"], shares["first_frame"]
    return f"""
Done in {int(seconds // 60)} min {seconds % 60:02.0f} s. The share of {shares["clips"]} samples that keep colour and
shape of the given frame and move as their caption says:

  {"".join(f"{name:>11}" for name in names)}
  {"".join(f"{shares[name]:>11.0%}" for name in names)}

The PSNR of first frames to the given ones is {shares["psnr"]:.1f} dB on average and {least:.1f} dB at least.
{share:.0%} of them have {PSNR_BAR:g} dB or more.

Look at
  {run_folder}/samples/final/sheet.png    the same frame in four directions
  {run_folder}/report.html                curves, samples with their given frames, events, recipe
  {run_folder}/obedience.json             the figures above

Try next
  sora sample {run_folder} --image {given} {others}
"""
