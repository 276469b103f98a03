"""Samples as files: a folder of them with a sheet, or one prompt's mp4 and gif."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sora_train.errors import UserError
from sora_train.generate.run import Run, load_run
from sora_train.generate.sample import Progress, generate_each
from sora_train.video import contact_sheet, slug, write_gif, write_mp4

SHEET_CLIPS = 24  # more would be too small to see


def sample_to_folder(
    run: Run,
    prompts: Sequence[str],
    embeddings: Sequence[Float[Tensor, "_ e"]] | None,
    folder: str | Path,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """One mp4 for every prompt and seed, `sheet.png` of the first 24, and `samples.json`, written last, that lists all.

    Files are called `000-a-red-circle.mp4`, counted over prompts and, within each, seeds. Returns the mp4s' paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    texts = None if embeddings is None else [embeddings[i] for i, _ in pairs]
    videos = generate_each(
        run, [prompts[i] for i, _ in pairs], [seed for _, seed in pairs], steps, guidance, None, progress, texts
    )
    listing, shown = [], []
    for count, ((i, seed), video) in enumerate(zip(pairs, videos, strict=True)):
        name = f"{count:03d}-{slug(prompts[i])}.mp4"
        write_mp4(folder / name, video, run.fps)
        listing.append({"file": name, "prompt": prompts[i], "seed": seed})
        if len(shown) < SHEET_CLIPS:
            shown.append(video)
    contact_sheet(shown, [entry["prompt"] for entry in listing[: len(shown)]]).save(folder / "sheet.png")
    write_listing(folder, run, listing)
    return [folder / entry["file"] for entry in listing]


def write_listing(folder: Path, run: Run, listing: list[dict]) -> None:
    """`samples.json`: which file shows which prompt, since file names hold only letters that are safe."""
    about = {"checkpoint": run.checkpoint.name, "fps": run.fps, "samples": listing}
    (folder / "samples.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def read_listing(folder: Path) -> dict[str, dict]:
    """The entries of a folder's `samples.json` by file name; none where it is missing or unreadable."""
    try:
        entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        return {entry["file"]: entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sample_prompts(
    path: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    output: str | Path | None = None,
) -> list[Path]:
    """`sora sample`: an mp4 and a gif of every prompt and seed, into RUN/samples/prompts or `output`; prints where."""
    if not prompts:
        raise UserError('nothing to sample; give a prompt: --prompt "a blue square moving up"')
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"seed {seed} is out of range; use 0 to 2^63 - 1")
    run = load_run(path)
    folder = Path(output) if output is not None else run.folder / "samples" / "prompts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}); name another folder with --out") from None
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    print(f"sampling {len(pairs)} from {run.checkpoint} on {run.device}", flush=True)
    each_prompt, each_seed = zip(*pairs, strict=True)
    videos = generate_each(run, each_prompt, each_seed, steps, guidance, negative, printed("sampling"))
    written, listing = [], read_listing(folder)
    for (prompt, seed), video in zip(pairs, videos, strict=True):
        for suffix, write in ((".mp4", write_mp4), (".gif", write_gif)):
            file = folder / f"{slug(prompt)}-seed{seed}{suffix}"
            write(file, video, run.fps)
            written.append(file)
            print(file, flush=True)
        name = written[-2].name
        listing[name] = {"file": name, "prompt": prompt, "seed": seed}
        write_listing(folder, run, list(listing.values()))
    return written


def printed(what: str, seconds: float = 5.0) -> Progress:
    """A progress callback that prints a line at most every so many seconds, and none for quick work."""
    started = last = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            print(f"{what}: {done} of {of} steps, {now - started:.0f} s", flush=True)

    return report
