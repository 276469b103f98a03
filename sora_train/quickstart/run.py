"""The quickstart, `sora demo`: from drawn clips to measured samples in six stages.

Every stage does only what is missing, so running it again resumes. `sora_train.quickstart.shapes` draws the clips, and
`sora_train.quickstart.oracle` reads the samples. Everything between is the same code as for any other videos.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sora_train.errors import UserError
from sora_train.log import every_few_seconds, log
from sora_train.provenance import usable_cores
from sora_train.quickstart.measure import SEEDS, VERDICTS, measure_samples, scenes, write_verdicts
from sora_train.quickstart.oracle import classify
from sora_train.quickstart.shapes import COLOURS, DIRECTIONS, make_clips
from sora_train.recipe import Recipe, load_recipe
from sora_train.video import contact_sheet, read_mp4

CLIPS = 1500
STAGES = 6


def demo(overrides: Mapping[str, object]) -> None:
    """Runs all stages. Paths in the recipe are relative to the current directory."""
    from data_prep.pipeline import prep
    from sora_train.launch.trainer import launch_training
    from sora_train.report import write_report

    started = time.monotonic()
    recipe = load_recipe(find_recipe("jobs/quickstart.yaml"), overrides)
    run_folder = Path(recipe.train.output) / recipe.name

    with stage(1, "clips: coloured shapes that move, as mp4 files with captions", started):
        clips_folder = clips(recipe)
    with stage(2, "prep: videos and captions to latents and embeddings", started):
        prep(recipe)
    with stage(3, f"train: {recipe.train.steps} steps on {recipe.cluster.workers} workers", started):
        launch_training(recipe)
    with stage(4, f"sample: {len(scenes())} captions, half of them held out of training, {len(SEEDS)} seeds", started):
        final = sample(run_folder)
    with stage(5, "measure: what the samples show, read from their pixels", started):
        shares = measure_samples(clips_folder, run_folder, final)
    with stage(6, "report", started):
        log.info(f"  {write_report(run_folder)}")
    log.info(summary(run_folder, shares, time.monotonic() - started))


def find_recipe(path: str | Path) -> Path:
    """The recipe's path, relative to the current directory or else to this checkout."""
    places = [Path(path), Path(__file__).parents[2] / path]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"no recipe at {places[0]} nor at {places[1]}; run the demo from a checkout of the repository", code="paths"
    )


@contextmanager
def stage(number: int, what: str, started: float, of: int = STAGES) -> Iterator[None]:
    """Logs a stage's heading and, at its end, how long it took."""
    log.info(f"\n[{number}/{of}] {what}")
    begun = time.monotonic()
    yield
    now = time.monotonic()
    log.info(f"[{number}/{of}] done in {now - begun:.0f} s, {now - started:.0f} s in all")


def clips(recipe: Recipe, count: int = CLIPS, image: bool = False) -> Path:
    """Stage 1: makes the clips if any is missing. `image` is that of `make_clips`. Returns their folder.

    It is the folder of the recipe's captions.csv.
    """
    captions = Path(recipe.data.captions)
    if captions.name != "captions.csv":
        raise UserError(
            f"data.captions is {captions}, but the demo writes its own: name a path that ends in captions.csv",
            code="paths",
        )
    folder = captions.parent
    if captions.is_file() and are_whole(captions, count):
        log.info(f"  {count} clips are in {folder} already")
        return folder
    progress = every_few_seconds(lambda done: log.info(f"  {done} of {count} clips"))
    make_clips(folder, count, progress=progress, image=image)
    log.info(f"  {count} clips in {folder}")
    return folder


def are_whole(captions: Path, count: int) -> bool:
    """Whether every clip exists.

    captions.csv is written last, so all files that it names are complete.
    """
    with captions.open(newline="", encoding="utf-8") as file:
        names = [row["video_file_name"] for row in csv.DictReader(file)]
    return len(names) == count and all((captions.parent / name).is_file() for name in names)


def sample(run_folder: Path, seeds: Sequence[int] = SEEDS) -> Path:
    """Stage 4: writes samples, the oracle's verdicts and a contact sheet.

    There is an mp4 of every scene and seed. Returns their folder.
    """
    import torch

    from sora_train.sample import load_run, sample_to_folder

    run = load_run(run_folder)
    folder = run_folder / "samples" / "final"
    if is_sampled(folder, run.checkpoint, [(scene.caption, seed) for scene in scenes() for seed in seeds]):
        log.info(f"  {folder} holds them already")
        return folder
    remove_samples(folder)
    torch.set_num_threads(usable_cores())
    prompts = [scene.caption for scene in scenes()]
    verdicts = []
    progress = every_few_seconds(lambda done, of: log.info(f"  {done} of {of} sampler steps"))
    files = sample_to_folder(
        run, prompts, None, folder, seeds, progress=progress, on_video=lambda video: verdicts.append(classify(video))
    )
    write_verdicts(folder, verdicts)
    write_sheet(files, len(seeds), folder / "sheet.png")
    log.info(f"  {len(files)} videos and sheet.png in {folder}")
    return folder


def remove_samples(folder: Path) -> None:
    """Removes what an earlier stage 4 wrote."""
    for stale in (*folder.glob("*.mp4"), *folder.glob("given-*.png"), folder / "samples.json", folder / VERDICTS):
        stale.unlink(missing_ok=True)


def is_sampled(folder: Path, checkpoint: Path, wanted: Sequence[tuple[str, int]]) -> bool:
    """Whether the folder has samples of this checkpoint of all wanted prompts and seeds, and their verdicts.

    samples.json and the verdicts are written after the videos.
    """
    listing = folder / "samples.json"
    if (
        not listing.is_file()
        or not (folder / VERDICTS).is_file()
        or listing.stat().st_mtime < (checkpoint / "ema.safetensors").stat().st_mtime
    ):
        return False
    about = json.loads(listing.read_text(encoding="utf-8"))
    listed = [(entry["prompt"], entry["seed"]) for entry in about["samples"]]
    files_there = all((folder / entry["file"]).is_file() for entry in about["samples"])
    return about["checkpoint"] == checkpoint.name and listed == list(wanted) and files_there


def write_sheet(files: Sequence[Path], seeds: int, path: Path) -> None:
    """The image at the README's top: every colour once seen and once held out.

    Clips are chosen by their index, not by their looks.
    """
    colours, directions = list(COLOURS), list(DIRECTIONS)
    chosen = [
        (colours.index(scene.colour), scene.held_out, scene.caption, index)
        for index, scene in enumerate(scenes())
        if scene.direction == directions[(colours.index(scene.colour) + 2 * scene.held_out) % len(directions)]
    ]
    _, held_out, captions, indices = zip(*sorted(chosen), strict=True)
    videos = [read_mp4(files[index * seeds]) for index in indices]
    contact_sheet(videos, captions, ["held out" if one else "seen" for one in held_out]).save(path, optimize=True)


def summary(run_folder: Path, shares: dict, seconds: float) -> str:
    """The final message: results, where they are, and what to try next."""
    names = ("colour", "direction", "shape", "all")
    head = f"  {'':18}" + "".join(f"{name:>11}" for name in names) + f"{'clips':>9}"
    rows = [
        f"  {title:18}" + "".join(f"{row[name]:>11.0%}" for name in names) + f"{row['clips']:>9}"
        for title, row in (("seen in training", shares["seen"]), ("held out", shares["held_out"]), ("together", shares))
    ]
    table = "\n".join([head, *rows])
    return f"""
Done in {int(seconds // 60)} min {seconds % 60:02.0f} s. The share of samples that show what their caption says:

{table}

Look at
  {run_folder}/samples/final/sheet.png    samples, seen and held-out captions beside each other
  {run_folder}/report.html                curves, samples by step, events, recipe: open it in a browser
  {run_folder}/obedience.json             the table above

Try next
  sora sample {run_folder} --prompt "a blue square moving up"
  sora train jobs/quickstart.yaml --name again --train.steps 40
  sora prep jobs/quickstart.yaml --data.captions my/captions.csv --data.root my/videos --data.output my/shards
"""
