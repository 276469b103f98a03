"""Runs that were never trained, in the form in which training leaves them: figures that fall, spikes, a resume, a
rollback, and validations whose videos grow clear."""

import json
import math
from pathlib import Path

import numpy as np

from sora_train.recipe import Recipe, load_recipe, save_recipe
from sora_train.sample.condition import GivenFrames, given_entry, save_given
from sora_train.video import contact_sheet, write_mp4

PROMPTS = (
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow dot at rest",
)
COLOURS = ((230, 50, 50), (60, 200, 80), (60, 100, 240), (240, 215, 60))


def make_run(
    folder: Path,
    steps: int = 1000,
    log_every: int = 10,
    validations: int = 4,
    prompts: tuple[str, ...] = PROMPTS,
    side: int = 64,
    frames: int = 8,
    seed: int = 0,
    rate: float = 1e-3,
    name: str = "",
    given: bool = False,
) -> Path:
    """A run's folder with `validations` of every prompt, evenly spread over its steps; `given`: with first frames."""
    folder.mkdir(parents=True)
    rng, every = np.random.default_rng(seed), max(1, steps // max(1, validations))
    recipe = {"train.steps": steps, "train.learning_rate": rate, "data.height": side, "data.width": side}
    save_recipe(build_recipe(name or folder.name, recipe, folder), folder / "recipe.yaml")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(log_every, steps + 1, log_every):
            file.write(json.dumps(line(step, steps, rate, rng)) + "\n")
            if validations and step % every == 0:
                file.write(json.dumps(verdict(step, steps, rng)) + "\n")
    happened = [("start", 0, "from scratch; 2 workers on cpu, ZeRO 1, fp32")]
    happened += [
        ("checkpoint", step, f"{folder}/checkpoints/step_{step:08d}") for step in range(every, steps + 1, every)
    ]
    happened += [("skipped", steps // 3 + i, f"its loss is nan; batch {steps // 3 + i}: 0a1b, 2c3d") for i in range(5)]
    happened += [("rollback", steps // 3 + 5, "5 bad steps in a row; back to step_00000250")]
    happened += [("worker_lost", 2 * steps // 3, "rank 1: WorkerDied: killed by signal 9")]
    happened += [("resume", 2 * steps // 3, "from step_00000500; 2 workers on cpu, ZeRO 1, fp32")]
    happened += [("validation_failed", steps // 2, "ended after validation.timeout_s 1800")]
    happened += [("end", steps, "all steps are done")]
    with (folder / "events.jsonl").open("w") as file:
        for i, (event, step, reason) in enumerate(sorted(happened, key=lambda one: one[1])):
            time = f"2026-11-23T{i % 24:02d}:{i % 60:02d}:31+00:00"
            file.write(json.dumps({"time": time, "event": event, "step": step, "reason": reason}) + "\n")
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}, "cores": 2})
    )
    for step in range(every, every * validations + 1, every):
        make_samples(folder / "samples" / f"step_{step:08d}", step / steps, prompts, side, frames, rng, given)
    return folder


def build_recipe(name: str, settings: dict, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(name)}\n")
    return load_recipe(folder / "recipe.yaml", settings)


def line(step: int, steps: int, rate: float, rng: np.random.Generator) -> dict:
    """A line of training."""
    at, noise = step / steps, rng.normal(size=8)
    loss = 0.15 + 1.6 / (1 + 60 * at) * (1e-3 / rate) ** 0.3 + 0.04 * noise[0]
    quarters = {f"loss_q{i + 1}": loss * (1.6, 0.9, 0.7, 0.8)[i] + 0.03 * noise[1 + i] for i in range(4)}
    return {
        "step": step, "samples_seen": 16 * step, "epoch": 0, "loss": float(loss),
        "lr": rate * min(1, 20 * at) * (0.55 + 0.45 * math.cos(math.pi * at)),
        "grad_norm": float(abs(0.5 + 0.1 * noise[5]) + (8 if rng.random() < 0.002 else 0)), **quarters,
        "step_s": 0.34, "samples_per_s": 47 + float(noise[6]), "tokens_per_s": 6000 + 130 * float(noise[6]),
        "data_wait_share": float(abs(0.01 * noise[7])), "mfu": 0.31 + 0.01 * float(noise[6]), "memory_gb": 0.77,
    }  # fmt: skip


def verdict(step: int, steps: int, rng: np.random.Generator) -> dict:
    """A validation's line."""
    level = 0.16 + 1.2 / (1 + 40 * step / steps)
    tenths = {f"holdout_loss_{i}": level * (3 - 0.45 * i if i < 6 else 0.3 + 0.1 * (i - 6)) for i in range(10)}
    fvd = 180 + 900 / (1 + 12 * step / steps) + 10 * float(rng.normal())
    likeness = 0.31 - 0.1 * math.exp(-4 * step / steps)
    head = {"step": step, "validation": True, "holdout_loss": level}
    return {**head, **tenths, "fvd": fvd, "fvd_clips": 256, "similarity": likeness}


def make_samples(
    place: Path,
    clear: float,
    prompts: tuple[str, ...],
    side: int,
    frames: int,
    rng: np.random.Generator,
    given: bool = False,
) -> None:
    """Discs that move over noise, which fades as `clear` goes from 0 to 1."""
    place.mkdir(parents=True)
    y, x = np.mgrid[:side, :side] / side
    listing, videos = [], []
    for i, prompt in enumerate(prompts):
        shown = [(x - 0.2 - 0.6 * f / frames) ** 2 + (y - 0.5) ** 2 < 0.03 for f in range(frames)]
        disc = np.where(np.stack(shown)[..., None], np.array(COLOURS[i % 4]), np.array((22, 24, 28)))
        coarse = rng.integers(0, 256, (frames, side // 8, side // 8, 3))
        noise = coarse.repeat(8, 1).repeat(8, 2)
        video = (clear * disc + (1 - clear) * noise).astype(np.uint8)
        file = f"{i:03d}-clip.mp4"
        write_mp4(place / file, video, fps=8)
        listing.append({"file": file, "prompt": prompt, "seed": 0})
        if given:
            start = GivenFrames(disc[:1].astype(np.uint8), "")
            save_given(place, start)
            listing[-1] |= given_entry(start)
        videos.append(video)
    (place / "samples.json").write_text(json.dumps({"samples": listing}))
    (place / "result.json").write_text(json.dumps({"status": "done"}))
    contact_sheet(videos, prompts).save(place / "sheet.png")
