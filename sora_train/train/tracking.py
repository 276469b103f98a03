"""Weights & Biases: one process writes curves and sample videos to it, and nothing it does can stop a training."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

STEP = "train_step"
"""Every key's x axis. wandb drops rows whose own step falls behind, so it counts its own and we log ours beside it."""


class Tracker:
    """A wandb run, or nothing at all with mode `off`. After its first failure it says so once and stays silent."""

    def __init__(
        self,
        run: Path,
        *,
        mode: Literal["online", "offline", "off"],
        project: str,
        config: dict[str, Any],
        failed: Callable[[str], None],
    ) -> None:
        self.failed = failed
        self.writer: Any = None  # a wandb.Run
        if mode != "off":
            self._guarded(lambda: self._start(run, mode, project, config))

    def log(self, record: dict[str, Any]) -> None:
        """Curves of a metrics record."""
        if self.writer is not None:
            values = {f"train/{key}": value for key, value in record.items() if key != "step" and value is not None}
            self._guarded(lambda: self.writer.log({**values, STEP: record["step"]}))

    def log_samples(self, folder: Path, step: int) -> None:
        """Videos and sheet of a samples folder, with their prompts."""
        if self.writer is not None:
            self._guarded(lambda: self.writer.log({**self._media(folder), STEP: step}))

    def finish(self) -> None:
        if self.writer is not None:
            self._guarded(lambda: self.writer.finish())
            self.writer = None

    def _start(self, run: Path, mode: Literal["online", "offline"], project: str, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if mode == "online" and wandb.api.api_key is None:
            self.failed(
                "wandb has no API key (WANDB_API_KEY or `wandb login`): written offline; `wandb sync` uploads it later"
            )
            mode = "offline"
        note = run / "wandb.json"
        identity = json.loads(note.read_text())["id"] if note.exists() else secrets.token_hex(4)
        note.write_text(json.dumps({"id": identity}))
        settings = wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True)
        self.writer = wandb.init(
            dir=run,
            id=identity,
            resume="allow",
            project=project,
            name=run.name,
            mode=mode,
            config=config,
            settings=settings,
        )
        self.writer.define_metric(STEP, hidden=True)
        self.writer.define_metric("*", step_metric=STEP)

    def _media(self, folder: Path) -> dict[str, Any]:
        import wandb

        listing = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        media = {}
        for sample in listing["samples"]:
            video = wandb.Video(str(folder / sample["file"]), caption=sample["prompt"], format="mp4")
            media[f"samples/{Path(sample['file']).stem}"] = video
        media["samples/sheet"] = wandb.Image(str(folder / "sheet.png"))
        return media

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker's library does must not cost a training
            self.writer = None
            self.failed(f"wandb stopped ({type(error).__name__}: {error}); training goes on without it")
