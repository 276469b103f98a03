"""`sora demo --lora`: adapters teach the model of `sora demo` a seventh colour, and it keeps its six.

Every stage does only what is missing.

60 clips show the new colour. As many show the old ones, because adapters that see one colour alone make everything that
colour (DreamBooth calls this prior preservation, arXiv 2208.12242).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from sora_train.errors import UserError
from sora_train.log import every_few_seconds, log
from sora_train.provenance import usable_cores
from sora_train.quickstart.measure import SEEDS, check_oracle, scenes
from sora_train.quickstart.oracle import Verdict, classify, right, shares
from sora_train.quickstart.run import are_whole, find_recipe, stage
from sora_train.quickstart.shapes import ALL_COLOURS, DIRECTIONS, NEW_COLOURS, Scene, all_scenes, draw, make_clips
from sora_train.recipe import Recipe, load_recipe
from sora_train.sample import find_checkpoint, load_run, sample_to_folder
from sora_train.storage import atomic_write_text
from sora_train.video import contact_sheet, read_mp4

RECIPE = "jobs/quickstart_lora.yaml"
CLIPS = 60
"""Clips of the new colour, and as many of the old ones."""
STAGES = 5
GROUPS = ("six colours, seen", "six colours, held out", "new colour, seen", "new colour, held out")
PARTS = ("colour", "direction", "shape", "all")


def demo_lora(overrides: Mapping[str, object]) -> None:
    """Runs all stages. Paths in the recipe are relative to the current directory."""
    from data_prep.pipeline import prep
    from sora_train.launch.trainer import launch_training

    started = time.monotonic()
    recipe = load_recipe(find_recipe(RECIPE), overrides)
    base = check_base_run(recipe)
    run_folder = Path(recipe.train.output) / recipe.name
    step = partial(stage, started=started, of=STAGES)
    with step(1, f"clips: {CLIPS} of {', '.join(NEW_COLOURS)}, and {CLIPS} of the six colours of {base}"):
        folder = clips(recipe)
    with step(2, "prep: videos and captions to latents and embeddings"):
        prep(recipe)
    with step(3, f"train: {recipe.train.steps} steps of adapters of rank {recipe.lora.rank}"):
        launch_training(recipe)
    with step(4, f"sample: {len(seven_colours())} captions, {len(SEEDS)} seeds, before and after"):
        places = {"before": run_folder / "samples" / "before", "after": run_folder / "samples" / "after"}
        for run, place in zip((base, run_folder), places.values(), strict=True):
            sample(run, place)
    with step(5, "measure: what the samples show, read from their pixels"):
        record = measure(folder, places) | sizes(base, run_folder)
        write_sheet(places, run_folder / "seven_colours.png")
        atomic_write_text(run_folder / "seven_colours.json", json.dumps(record, indent=1) + "\n")
    log.info(summary(run_folder, record, time.monotonic() - started))


def check_base_run(recipe: Recipe) -> Path:
    """The folder of the quickstart's run. Raises UserError if it is not there."""
    base = Path(recipe.model.init_from)
    if not (base / "checkpoints").is_dir():
        raise UserError(
            f"{base} is no run. Run `make quickstart` first, or name a run of it with --model.init_from", code="run"
        )
    return base


def seven_colours() -> list[Scene]:
    """The sampled scenes: those of the quickstart, and every combination of the new colour."""
    return [*scenes(), *all_scenes(NEW_COLOURS)]


def clips(recipe: Recipe) -> Path:
    """Stage 1: makes the clips if any is missing: the new colour and the old ones in turns. Returns their folder."""
    captions = Path(recipe.data.captions)
    if captions.is_file() and are_whole(captions, 2 * CLIPS):
        log.info(f"  {2 * CLIPS} clips are in {captions.parent} already")
        return captions.parent
    new = [scene for scene in all_scenes(NEW_COLOURS) if not scene.held_out]
    old = [scene for scene in all_scenes() if not scene.held_out]
    turns = [scenes[7 * i % len(scenes)] for i in range(CLIPS) for scenes in (new, old)]  # 7: of each colour in turns
    made = make_clips(captions.parent, 2 * CLIPS, seed=1, scenes=turns).parent  # other paths than the quickstart's
    log.info(f"  {2 * CLIPS} clips in {made}")
    return made


def sample(run_folder: Path, folder: Path) -> None:
    """Stage 4: writes an mp4 of every scene and seed, and the oracle's verdicts, if a checkpoint has none yet."""
    import torch

    verdicts_file = folder / "verdicts.json"
    _, checkpoint = find_checkpoint(run_folder)
    wanted = {"checkpoint": str(checkpoint.absolute()), "captions": [scene.caption for scene in seven_colours()]}
    if verdicts_file.is_file() and json.loads(verdicts_file.read_text(encoding="utf-8"))["of"] == wanted:
        log.info(f"  {folder} holds them already")
        return
    torch.set_num_threads(usable_cores())
    found: list[Verdict] = []
    progress = every_few_seconds(lambda done, of: log.info(f"  {done} of {of} sampler steps"))
    sample_to_folder(
        load_run(run_folder),
        wanted["captions"],
        None,
        folder,
        SEEDS,
        progress=progress,
        on_video=lambda video: found.append(classify(video, ALL_COLOURS)),
    )
    atomic_write_text(verdicts_file, json.dumps({"of": wanted, "verdicts": [asdict(verdict) for verdict in found]}))


def measure(clips_folder: Path, places: Mapping[str, Path]) -> dict:
    """Stage 5: tests the oracle on real clips of seven colours, then reads the samples before and after."""
    own, count = test_oracle(clips_folder)
    record: dict = {"oracle_accuracy": own, "oracle_clips": count}
    for when, folder in places.items():
        verdicts = [
            Verdict(**v) for v in json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))["verdicts"]
        ]
        shown = [scene for scene in seven_colours() for _ in SEEDS]
        groups: dict[str, list[dict[str, bool]]] = {group: [] for group in GROUPS}
        for verdict, scene in zip(verdicts, shown, strict=True):
            group = GROUPS[2 * (scene.colour in NEW_COLOURS) + scene.held_out]
            groups[group].append(right(verdict, scene))
        record[when] = {group: shares(parts) for group, parts in groups.items()}
    return record


def test_oracle(clips_folder: Path) -> tuple[float, int]:
    """The share of real clips that the oracle reads correctly, and their number. RuntimeError if it is too low.

    They are the clips of the training, decoded from H.264, and new ones of all combinations of seven colours.
    """
    shown = {scene.caption: scene for scene in all_scenes(ALL_COLOURS)}
    rows = [line.rsplit(",", 1) for line in (clips_folder / "captions.csv").read_text("utf-8").splitlines()[1:]]
    videos, truth = [read_mp4(clips_folder / name) for name, _ in rows], [shown[caption] for _, caption in rows]
    for i, scene in enumerate(all_scenes(ALL_COLOURS)):
        videos.append(draw(scene, np.random.default_rng((98, i))))
        truth.append(scene)
    return check_oracle(videos, truth, ALL_COLOURS), len(videos)


def sizes(base: Path, run_folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint of all weights, and of one of adapters."""
    folders = {
        "full_checkpoint_bytes": find_checkpoint(base)[1],
        "lora_checkpoint_bytes": find_checkpoint(run_folder)[1],
    }
    return {name: sum(file.stat().st_size for file in folder.iterdir()) for name, folder in folders.items()}


def write_sheet(places: Mapping[str, Path], path: Path) -> None:
    """An image of every colour before and after; clips are chosen by their index, not by their looks."""
    videos, labels, badges = [], [], []
    listings = {
        when: json.loads((folder / "samples.json").read_text("utf-8"))["samples"] for when, folder in places.items()
    }
    for i, colour in enumerate(ALL_COLOURS):
        direction = list(DIRECTIONS)[i % len(DIRECTIONS)]
        index = next(n for n, s in enumerate(seven_colours()) if (s.colour, s.direction) == (colour, direction))
        for when, folder in places.items():
            entry = listings[when][index * len(SEEDS)]
            videos.append(read_mp4(folder / entry["file"]))
            labels.append(entry["prompt"])
            badges.append(when)
    contact_sheet(videos, labels, badges).save(path, optimize=True)


def summary(run_folder: Path, record: dict, seconds: float) -> str:
    """The final message: the table, and where the results are."""
    head = f"  {'':23}" + "".join(f"{name:>16}" for name in PARTS) + f"{'clips':>8}"
    rows = [
        f"  {group:23}"
        + "".join(f"{record['before'][group][name]:>8.0%} →{record['after'][group][name]:>5.0%}" for name in PARTS)
        + f"{record['after'][group]['clips']:>8}"
        for group in GROUPS
    ]
    full, small = record["full_checkpoint_bytes"], record["lora_checkpoint_bytes"]
    table = "\n".join([head, *rows])
    return f"""
Done in {int(seconds // 60)} min {seconds % 60:02.0f} s. The share of samples that show what their caption says:

{table}

A checkpoint has {small / 1e6:.2f} MB, {small / full:.1%} of the {full / 1e6:.1f} MB of one of all weights.

Look at
  {run_folder}/seven_colours.png    every colour before and after
  {run_folder}/seven_colours.json   the table above

Try next
  sora export {run_folder} my_adapters --lora
  sora sample runs/quickstart --lora my_adapters:0.5 --prompt "an orange square moving up"
"""
