"""`sora eval`: metrics of a run or a checkpoint, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.evaluate.given import CLIPS, measure_given
from sora_train.evaluate.heldout import BINS
from sora_train.evaluate.i3d import load_i3d
from sora_train.evaluate.metrics import Figures, Progress, check_frames, check_shards, measure
from sora_train.evaluate.similarity import load_clip
from sora_train.log import every_few_seconds, progress
from sora_train.options import EvalOptions
from sora_train.recipe import ValidationConfig
from sora_train.sample import Run, load_run
from sora_train.sample.condition import check_takes_frames
from sora_train.storage import atomic_write_text, why_not_writable
from sora_train.terminal import print_result

Oracle = Callable[[Run, Iterable[str], Callable[[int, int], None]], dict[str, Any] | None]
"""Measures the prompt accuracy of a run's samples.
None if it does not support clips with these captions."""
NAMES = {"holdout_loss": "held-out loss", "fvd": "FVD", "similarity": "similarity", "given_psnr": "given frames"}
PROBED = 64  # clips whose captions show whether the data is the quickstart's


def evaluate(path: str | Path, how: EvalOptions, oracle: Oracle | None = None) -> dict[str, Any]:
    """Measures a run's metrics, prints them, and writes them as JSON.

    It prints a table, or the JSON with `how.json`. The file is `how.out`, by default the run's `eval.json`. Files that
    the flags name are checked first. Raises UserError if nothing could be measured, or not all that the command line
    asks for. An existing file then stays as it is.
    """
    run = load_run(path, weights=how.weights)
    file = Path(how.out).expanduser() if how.out else run.folder / "eval.json"
    check_flags(run, how, file)
    validation = run.recipe.validation
    asked: dict[str, Any] = {"holdout_clips": how.holdout_clips, "fvd_clips": how.fvd_clips, "clip": how.clip}
    asked |= {"i3d": how.i3d, "fvd": True} if how.i3d else {}
    ask = validation.model_copy(update={key: value for key, value in asked.items() if value is not None})
    shards = how.shards or run.recipe.data.output
    remarks: list[str] = []
    tell = every_few_seconds(lambda what, done, of: progress(f"{what}: {done} of {of}"))
    figures = measure(run, ask, shards, None, tell, remarks.append)
    not_asked = {
        "held-out loss: not asked for (--holdout_clips 0)": not ask.holdout_clips,
        "FVD: not asked for; name I3D's weights with --i3d FILE": not ask.fvd,
        "similarity: not asked for; name a CLIP with --clip FOLDER": not ask.clip,
    }
    remarks += [remark for remark, holds in not_asked.items() if holds]
    figures |= given_frames(run, ask, how, str(shards), tell, remarks.append)
    record: dict[str, Any] = {"run": str(run.folder), "checkpoint": run.checkpoint.name, "weights": run.weights}
    record |= {"shards": str(shards), **figures}
    try:
        progress_of_oracle = partial(tell, "samples for prompt accuracy, step")
        if oracle and (obedience := oracle(run, some_captions(shards), progress_of_oracle)):
            record["obedience"] = obedience
    except UserError as error:
        remarks.append(f"obedience: {error}")
    if not figures and "obedience" not in record:
        raise UserError("\n".join(["nothing could be measured, and nothing was written:", *remarks]), code="evaluation")
    record["remarks"] = remarks
    print_result(json.dumps(record) if how.json else table(record))
    wanted = {"holdout_loss": how.holdout_clips, "fvd": how.i3d or how.fvd_clips, "similarity": how.clip}
    wanted["given_psnr"] = how.given_clips
    if lost := [NAMES[key] for key, value in wanted.items() if value and key not in figures]:
        reasons = [remark for remark in remarks if remark.split(":")[0] in lost]
        raise UserError("\n".join([*reasons, f"{file} was not written"]), code="evaluation")
    try:
        atomic_write_text(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{file} can't be written ({error.strerror}); name another file with --out", code="not_writable"
        ) from None
    progress(f"written to {file}")
    return record


def given_frames(
    run: Run, ask: ValidationConfig, how: EvalOptions, shards: str, tell: Progress, remark: Callable[[str], None]
) -> Figures:
    """Measures given first frames of a run that was trained with them; empty for others, and if it is impossible."""
    count = CLIPS if how.given_clips is None else how.given_clips
    if not count or not run.recipe.conditioning.probability:
        return {}
    try:
        return measure_given(run, ask, shards, count, tell, remark)
    except UserError as error:
        remark(f"{NAMES['given_psnr']}: {error}")
        return {}


def check_flags(run: Run, how: EvalOptions, file: Path) -> None:
    """Checks the files and folders that the flags name, before any work.

    Raises UserError if one is not as expected.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file with --out", code="not_writable")
    why = why_not_writable(file.parent) if file.parent.is_dir() else f"{file.parent} is no folder"
    if why:
        raise UserError(f"{file} can't be written: {why}; name another file with --out", code="not_writable")
    if how.shards:
        try:
            check_shards(run, how.shards)
        except UserError as error:
            raise UserError(f"--shards: {error}", code="shards") from None
    if how.given_clips:
        check_takes_frames(run, "--given_clips")
    if how.fvd_clips and not (how.i3d or run.recipe.validation.fvd):
        raise UserError(
            "--fvd_clips: the run's validation.fvd is off; name I3D's weights too, with --i3d FILE", code="evaluation"
        )
    if how.i3d or how.fvd_clips:
        check_frames(run)
    if how.i3d:
        load_i3d(how.i3d, key="--i3d")
    if how.clip:
        load_clip(how.clip, models=run.recipe.codec.models, key="--clip")


def some_captions(folder: str | Path) -> list[str]:
    """Captions of the first clips in a shard folder, held out or not."""
    shards = ShardSet(str(folder))
    bucket, rows = next(iter(shards.rows.items()))
    return [caption for captions in shards.read(bucket, range(min(rows, PROBED))).captions for caption in captions]


def table(record: dict[str, Any]) -> str:
    """Formats the metrics as a table, then the remarks."""
    lines = [f"{record['run']}, {record['checkpoint']}, {record['weights']} weights"]
    if "holdout_loss" in record:
        about = f"mean squared error over {record['holdout_clips']} clips; by diffusion time, from the data to noise:"
        lines.append(row("held-out loss", f"{record['holdout_loss']:.4f}", about))
        for i in range(BINS):
            lines.append(row(f"  {1000 * i // BINS} to {1000 * (i + 1) // BINS}", f"{record[f'holdout_loss_{i}']:.4f}"))
    if "fvd" in record:
        about = f"{record['fvd_clips']} clips against as many held-out ones; not comparable with published values"
        lines.append(row("FVD", f"{record['fvd']:.1f}", about))
    if "similarity" in record:
        lines.append(row("similarity", f"{record['similarity']:.2f}", "100 x CLIP's cosine between frames and prompt"))
    if "given_psnr" in record:
        about = f"dB, PSNR of the given first frames in samples of {record['given_clips']} held-out captions"
        lines.append(row("given frames", f"{record['given_psnr']:.1f}", about))
        about = "of 255, how far later frames are from those of samples without given frames (RMS); 0: no effect"
        lines.append(row("  effect", f"{record['given_effect']:.1f}", about))
    if obedience := record.get("obedience"):
        parts = ", ".join(f"{name} {obedience[name]:.0%}" for name in ("colour", "direction", "shape"))
        about = f"{parts}; held-out captions {obedience['held_out']['all']:.0%}; {obedience['clips']} clips"
        lines.append(row("obedience", f"{obedience['all']:.0%}", about))
    return "\n".join([*lines, *(f"- {remark}" for remark in record["remarks"])])


def row(name: str, value: str, about: str = "") -> str:
    return f"{name:16}{value:>10}  {about}".rstrip()
