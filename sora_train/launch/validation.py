"""Validation of a checkpoint while training continues, in a child process on its own resources.

Ray runs `supervise` as a task for each checkpoint to validate. The child process loads the model and may crash, hang or
run out of memory. This module imports neither Ray nor torch at the top, so the supervisor stays small.
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

from sora_train.errors import UserError, error_line, one_line
from sora_train.launch.images import load_images
from sora_train.log import log
from sora_train.storage import atomic_file, atomic_write_text
from sora_train.train.metrics import STOP_FILE, Events, JsonLines, duration

ATTEMPTS = 2
POLL_S = 1.0
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
EMBEDDINGS = "prompts.safetensors"


def supervise(checkpoint: Any, /, *, run: str, timeout_s: float, gpu: bool) -> dict[str, Any]:
    """Validates `checkpoint`, a ray.train.Checkpoint, into `samples/STEP` of the run. Never raises.

    An exception would end Ray's controller. A child that fails or exceeds `timeout_s` is retried once, unless the run
    is asked to stop.
    """
    began, folder, events = time.monotonic(), Path(checkpoint.path), Events(Path(run))
    step = int(folder.name.removeprefix("step_"))
    try:
        status = ValidationStatus(Path(run))
        if status.get(step) == "running":  # Ray restarts a task whose process was lost
            events.write("validation_failed", step, "the supervising process died; retrying")
        status.set(step, "running")
        error = "not tried"
        for _ in range(ATTEMPTS):
            error = run_child(folder, Path(run), timeout_s, gpu)
            if not error or stop_requested(Path(run)):
                break
            events.write("validation_failed", step, error)
        status.set(step, "done" if not error else "lost" if stop_requested(Path(run)) else "failed")
        if not error:
            took = duration(time.monotonic() - began)
            events.write("validation_done", step, f"samples in {status.folder(step)} after {took}")
        return {"validated": not error, "validation_s": time.monotonic() - began}
    except Exception as error:  # such as a full disk
        log.warning(f"validation of step {step} can't be recorded: {error!r}")
        return {"validated": False, "validation_s": time.monotonic() - began}


def stop_requested(run: Path) -> bool:
    """Whether somebody asked the run to save a checkpoint and end."""
    return (run / STOP_FILE).exists()


def run_child(checkpoint: Path, run: Path, timeout_s: float, gpu: bool) -> str:
    """Runs this module as a child process. Returns why it failed, or an empty string.

    On timeout, or if the run is asked to stop, the child and its own children are killed. Without `gpu` it sees no GPU
    (or it would take one that trains), and runs at low priority.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # whatever the locale
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "sora_train.launch.validation", "validate", str(checkpoint), str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    ends, output = time.monotonic() + timeout_s, None
    try:
        while output is None:
            try:
                output, _ = child.communicate(timeout=min(POLL_S, max(0, ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                if stop_requested(run):
                    return "ended with the run"
                if time.monotonic() >= ends:
                    return f"ended after validation.timeout_s {timeout_s:g}"
    finally:
        if child.poll() is None:  # also if Ray cancels this task
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == 0:
        return ""
    last = output.strip().splitlines()[-1:] or ["no output"]
    died = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return f"{died}: {last[0][:500]}"


class ValidationStatus:
    """The status of each validation of a run, in `result.json` next to its samples."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def folder(self, step: int) -> Path:
        return self.run / "samples" / f"step_{step:08d}"

    def set(self, step: int, status: str) -> None:
        """`asked`, `running`, `done`, `failed`, or `lost` if the process that ran it is gone."""
        self.folder(step).mkdir(parents=True, exist_ok=True)
        content = {"step": step, "status": status, "time": time.time()}
        atomic_write_text(self.folder(step) / "result.json", json.dumps(content))

    def get(self, step: int) -> str | None:
        file = self.folder(step) / "result.json"
        return json.loads(file.read_text(encoding="utf-8"))["status"] if file.exists() else None

    def outstanding_steps(self, older_than_s: float = float("inf")) -> list[int]:
        """Steps asked for or running. One without news for `older_than_s` counts as lost."""
        return self._steps("asked", "running", since=time.time() - older_than_s)

    def lost_steps(self) -> list[int]:
        """Steps whose validation was cut off."""
        return self._steps("lost")

    def _steps(self, *statuses: str, since: float = 0.0) -> list[int]:
        """Steps of these statuses, whose last news is from after `since`."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.run.glob("samples/step_*/result.json")]
        return sorted(each["step"] for each in found if each["status"] in statuses and each["time"] > since)


def validate(checkpoint: Path, run: Path) -> None:
    """Samples the recipe's prompts and measures the metrics it asks for.

    Writes videos, a sheet, a line of `metrics.jsonl`, and the run's report.
    """
    began = time.monotonic()
    from sora_train.evaluate import measure
    from sora_train.recipe import load_recipe
    from sora_train.sample import load_run, sample_to_folder

    # The checkpoint's recipe defines the model; the run's recipe defines the validation.
    recipe = load_recipe(run / "recipe.yaml")
    config, step = recipe.validation, int(checkpoint.name.removeprefix("step_"))
    trained = load_run(checkpoint, weights=config.weights)
    folder = run / "samples" / checkpoint.name
    remove_old_samples(folder)
    *embeddings, negative = embed_prompts(run, trained)
    prompts = list(config.prompts)
    frames: list[Any] = []  # as `sora eval` measures them: before H.264
    keep = frames.append if config.clip else None
    sample_to_folder(
        trained, prompts, embeddings, folder, (config.seed,), config, negative, on_video=keep, given=load_images(run)
    )
    videos = zip(prompts, frames, strict=True) if config.clip else None
    metrics = measure(
        trained, config, recipe.data.output, videos, remark=lambda text: write_event_once(run, step, text)
    )
    took = {"validation_s": time.monotonic() - began}
    JsonLines(run / "metrics.jsonl").write({"step": step, "validation": True, **metrics, **took})
    update_report(run, step)


def update_report(run: Path, step: int) -> None:
    """Writes the run's report. A failure is only an event: the report can be written again at any time."""
    from sora_train.report import write_report

    try:
        write_report(run)
    except Exception as error:
        with contextlib.suppress(UserError):  # a full disk
            Events(run).write("report_failed", step, error_line(error))


def remove_old_samples(folder: Path) -> None:
    """Removes the output of an earlier attempt, whose videos may have other names."""
    for path in (*folder.glob("*.mp4"), *folder.glob("given-*.png"), folder / "sheet.png", folder / "samples.json"):
        path.unlink(missing_ok=True)


def write_event_once(run: Path, step: int, remark: str) -> None:
    """Writes an event of what a validation can't measure, unless an earlier one did."""
    events = Events(run)
    if not any(event["event"] == "not_measured" and event["reason"] == remark for event in events.lines.read()):
        events.write("not_measured", step, remark)


def embed_prompts(run: Path, trained: Any) -> list:
    """Embeddings of the recipe's prompts, then of the negative prompt. Cached in the run's folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from sora_train.manifest import Manifest
    from sora_train.recipe import load_recipe
    from sora_train.sample.load import as_trained

    recipe = load_recipe(run / "recipe.yaml")
    prompts = [*recipe.validation.prompts, recipe.validation.negative]
    codec = as_trained(recipe.codec, Manifest.load(str(run)))
    encoding = [codec.text, codec.max_tokens, codec.text_precision, codec.caption_cleaning, codec.null_prompt]
    key, path = json.dumps([prompts, *encoding]), run / EMBEDDINGS
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("of") == key:
                return [file.get_tensor(f"{i:03d}") for i in range(len(prompts))]
    encoder = trained.text_encoder
    made = [*encoder.encode(prompts[:-1]), encoder.encode_null(prompts[-1], codec.null_prompt)]
    for remark in encoder.remarks:
        log.warning(f"validation: {remark}")
    embeddings = [embedding.float().cpu().contiguous() for embedding in made]
    with atomic_file(path) as draft:
        save_file({f"{i:03d}": embedding for i, embedding in enumerate(embeddings)}, draft, {"of": key})
    return embeddings


def main(checkpoint: Path, run: Path) -> int:
    """The child process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the supervisor
    try:
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            os.nice(10)
        time.sleep(float(os.environ.get("SORA_VALIDATION_DELAY_S", "0")))  # for tests: a slow validation
        validate(checkpoint, run)
    except Exception as error:
        traceback.print_exc()
        log.info(f"{type(error).__name__}: {one_line(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[2:])))
