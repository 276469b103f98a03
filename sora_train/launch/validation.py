"""Samples and figures of a checkpoint while training goes on, in a process of its own on resources of its own.

Ray runs `supervise` as a task for each checkpoint that asks for it. That is a thin supervisor: what loads a model and
may crash, hang or run out of memory is a child process. This module imports neither Ray nor torch at the top, so that
the supervisor is small.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sora_train.errors import UserError
from sora_train.log import log
from sora_train.storage import atomic_file, atomic_write_text
from sora_train.train.metrics import Events, JsonLines, duration

ATTEMPTS = 2
STOP_FILE = "leave"  # as `sora_train.train.run_dir` has it, which imports torch
POLL_S = 1.0  # between two looks for it
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
EMBEDDINGS = "prompts.safetensors"


def supervise(checkpoint: Any, /, *, run: str, timeout_s: float, gpu: bool) -> dict[str, Any]:
    """Validates `checkpoint` into `samples/STEP` of the run. Always returns, never raises: Ray's controller would fall.

    A child that fails or takes longer than `timeout_s` is tried once more; none outlives a run that was asked to leave.
    `checkpoint` is a ray.train.Checkpoint.
    """
    began, folder = time.monotonic(), Path(checkpoint.path)
    step = int(folder.name.removeprefix("step_"))
    try:
        note = ValidationStatus(Path(run))
        if note.get(step) == "running":  # Ray starts this anew where its process is gone
            Events(Path(run)).write("validation_failed", step, "the process that watched over it was lost; once more")
        note.set(step, "running")
        reason = "not tried"
        for _ in range(ATTEMPTS):
            reason = run_child(["validate", str(folder), run], timeout_s, gpu)
            if not reason or (Path(run) / STOP_FILE).exists():
                break
            Events(Path(run)).write("validation_failed", step, reason)
        left = bool(reason) and (Path(run) / STOP_FILE).exists()
        note.set(step, "lost" if left else "failed" if reason else "done")
        if not reason:
            took = duration(time.monotonic() - began)
            Events(Path(run)).write("validation_done", step, f"samples in {note.folder(step)} after {took}")
        return {"validated": not reason, "validation_s": time.monotonic() - began}
    except Exception as error:  # such as a full disk; see the docstring
        log.warning(f"validation of step {step} can't be written down: {error!r}")
        return {"validated": False, "validation_s": time.monotonic() - began}


def prepare_prompts(run: str, timeout_s: float, gpu: bool) -> bool:
    """Embeds the recipe's prompts into the run's folder, once as it trains. Returns whether that went well."""
    reason = run_child(["embed", run], timeout_s, gpu)
    if reason and not (Path(run) / STOP_FILE).exists():  # a run that stops needs none
        Events(Path(run)).write("validation_failed", 0, f"prompts can't be embedded: {reason}")
    return not reason


def run_child(words: list[str], timeout_s: float, gpu: bool) -> str:
    """Runs this module as a process with these words, the last of which is the run's folder; returns why it failed, or
    an empty string.

    On timeout, and when the run is asked to leave, the child and whatever it started are killed. Without a GPU of its
    own it sees none, lest it take one that trains, and it yields the cores to training.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # whatever the locale
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-P", "-m", "sora_train.launch.validation", *words]
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    ends, leave, output = time.monotonic() + timeout_s, Path(words[-1]) / STOP_FILE, None
    try:
        while output is None:
            try:
                output, _ = child.communicate(timeout=min(POLL_S, max(0, ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                if leave.exists():
                    return "ended with the run"
                if time.monotonic() >= ends:
                    return f"ended after validation.timeout_s {timeout_s:g}"
    finally:
        # Also when Ray ends this task: nobody would wait for the child.
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == 0:
        return ""
    last = output.strip().splitlines()[-1:] or ["no output"]
    died = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return f"{died}: {last[0][:500]}"


class ValidationStatus:
    """Which validations were asked for and have not ended: `result.json` beside their samples."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def folder(self, step: int) -> Path:
        return self.run / "samples" / f"step_{step:08d}"

    def set(self, step: int, status: str) -> None:
        """`asked`, `running`, `done`, `failed`, or `lost` when whoever ran it is no more."""
        self.folder(step).mkdir(parents=True, exist_ok=True)
        about = {"step": step, "status": status, "time": time.time()}
        atomic_write_text(self.folder(step) / "result.json", json.dumps(about))

    def get(self, step: int) -> str | None:
        note = self.folder(step) / "result.json"
        return json.loads(note.read_text(encoding="utf-8"))["status"] if note.exists() else None

    def outstanding_steps(self, older_than_s: float = float("inf")) -> list[int]:
        """Steps still asked for or running; those not heard of for `older_than_s` count as lost."""
        notes = [json.loads(note.read_text(encoding="utf-8")) for note in self.run.glob("samples/step_*/result.json")]
        late = time.time() - older_than_s
        return sorted(note["step"] for note in notes if note["status"] in ("asked", "running") and note["time"] > late)


def validate(checkpoint: Path, run: Path) -> None:
    """Samples the recipe's prompts and measures what it asks for; leaves videos, a sheet, a line of `metrics.jsonl`,
    and the run's report.
    """
    began = time.monotonic()
    from sora_train.evaluate import measure
    from sora_train.recipe import load_recipe
    from sora_train.sample import load_run, sample_to_folder

    # The checkpoint's recipe says what the model is; the run's says what is asked for now.
    recipe = load_recipe(run / "recipe.yaml")
    asked, step = recipe.validation, int(checkpoint.name.removeprefix("step_"))
    trained = load_run(checkpoint, weights=asked.weights)
    folder = run / "samples" / checkpoint.name
    remove_old_samples(folder)
    *embeddings, negative = embed_prompts(run, trained)
    prompts = list(asked.prompts)
    frames: list[Any] = []  # as sampled: similarity is of what `sora eval` measures, not of H.264's copy
    keep = frames.append if asked.clip else None
    sample_to_folder(trained, prompts, embeddings, folder, (asked.seed,), asked, negative, on_video=keep)
    videos = zip(prompts, frames, strict=True) if asked.clip else None
    figures = measure(trained, asked, recipe.data.output, videos, remark=lambda said: write_event_once(run, step, said))
    took = {"validation_s": time.monotonic() - began}
    JsonLines(run / "metrics.jsonl").write({"step": step, "validation": True, **figures, **took})
    update_report(run, step)


def update_report(run: Path, step: int) -> None:
    """The run's report as it stands; that it can't be written is noted, as far as the disk has room."""
    from sora_train.report import write_report

    try:
        write_report(run)
    except Exception as error:  # it can be written again at any time; what a training or a validation made can't
        with contextlib.suppress(UserError):
            Events(run).write("report_failed", step, f"{type(error).__name__}: {error}")


def remove_old_samples(folder: Path) -> None:
    """Removes what an attempt before left of a validation; its videos may have had other names."""
    for path in (*folder.glob("*.mp4"), folder / "sheet.png", folder / "samples.json"):
        path.unlink(missing_ok=True)


def write_event_once(run: Path, step: int, remark: str) -> None:
    """What a validation can't measure, which holds for those after it as well."""
    events = Events(run)
    if not any(event["event"] == "not_measured" and event["reason"] == remark for event in events.lines.read()):
        events.write("not_measured", step, remark)


def embed_prompts(run: Path, trained: Any = None) -> list:
    """Embeddings of the recipe's prompts, last that of what guidance leads away from.

    They are read from the run's folder, or made and put there if it has not these.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from sora_train.codec.text import text_encoder_of
    from sora_train.manifest import Manifest
    from sora_train.recipe import load_recipe
    from sora_train.sample.load import as_trained

    recipe = load_recipe(run / "recipe.yaml")
    prompts = [*recipe.validation.prompts, recipe.validation.negative]
    codec = as_trained(recipe.codec, Manifest.load(str(run)))
    how = [codec.text, codec.max_tokens, codec.text_precision, codec.caption_cleaning, codec.null_prompt]
    wanted = json.dumps([prompts, *how])
    place = run / EMBEDDINGS
    if place.exists():
        with safe_open(place, "pt") as file:
            if (file.metadata() or {}).get("of") == wanted:
                return [file.get_tensor(f"{i:03d}") for i in range(len(prompts))]
    if trained is not None:
        encoder = trained.text_encoder
    else:
        encoder = text_encoder_of(codec, device=_device())
    made = [*encoder.encode(prompts[:-1]), encoder.encode_null(prompts[-1], codec.null_prompt)]
    embeddings = [embedding.float().cpu().contiguous() for embedding in made]
    with atomic_file(place) as draft:  # a validation may make its own at the same time
        save_file({f"{i:03d}": embedding for i, embedding in enumerate(embeddings)}, draft, {"of": wanted})
    return embeddings


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(words: list[str]) -> int:
    """What the child process does."""
    delay = float(os.environ.get("SORA_VALIDATION_DELAY_S", "0"))  # for drills: a slow validation
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to outlive a supervisor that was killed
    try:
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            os.nice(10)
        if words[0] == "embed":
            embed_prompts(Path(words[1]))
        else:
            time.sleep(delay)
            validate(Path(words[1]), Path(words[2]))
    except Exception as error:
        traceback.print_exc()
        log.info(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
