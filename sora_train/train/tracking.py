"""Weights & Biases: one process writes curves and sample videos to it, and nothing it does can stop a training.

Every key is there once at each step, also over resumes: what wandb has is known from its offline files, and from
`wandb.json` where it went to a server. So steps that are done again are not told again, and those that a kill took are.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sora_train.errors import UserError
from sora_train.storage import atomic_write_text
from sora_train.train.wandb_files import rows

STEP = "train_step"
"""Every key's x axis. wandb drops rows whose own step falls behind, so it counts its own and we log ours beside it."""
NOTE = "wandb.json"
ALERTS = {
    "failed": "ERROR",
    "damaged": "ERROR",
    "rollback": "ERROR",
    "worker_lost": "WARN",
    "driver_lost": "WARN",
    "skipped": "WARN",
    "stopped": "WARN",
    "preempted": "WARN",
    "validation_failed": "WARN",
    "report_failed": "WARN",
}
"""Kinds of events that wandb tells people of, and how loudly; the others are the ordinary course of things."""


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
        self.run, self.failed = run, failed
        self.writer: Any = None  # a wandb.Run
        self.note: dict[str, Any] = {"id": secrets.token_hex(4)}
        self.told: dict[str, set[int]] = {"train": set(), "validation": set()}  # steps
        if mode != "off":
            self._guarded(lambda: self._start(mode, project, config))

    def log(self, records: list[dict[str, Any]], beside: dict[str, float] | None = None) -> None:
        """Lines of `metrics.jsonl`, of which those that wandb has heard of are left out. `beside` are figures of this
        moment, under their own keys, which go with the last of them.
        """
        if self.writer is not None and records:
            self._guarded(lambda: self._tell(records, beside or {}))

    def alert(self, events: list[dict[str, Any]]) -> None:
        """All lines of `events.jsonl`, which only grows: those beyond what was told before become alerts, if they are
        of such a kind.
        """
        if self.writer is not None and len(events) > self.note.get("events", 0):
            self._guarded(lambda: self._alert(events))

    def finish(self) -> None:
        """Returns when all is on disk or sent."""
        if self.writer is not None:
            self._guarded(self._end)
            self.writer = None

    def _start(self, mode: Literal["online", "offline"], project: str, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if mode == "online" and wandb.api.api_key is None:
            self.failed(
                "wandb has no API key (WANDB_API_KEY or `wandb login`): written offline; `wandb sync` uploads it later"
            )
            mode = "offline"
        path = self.run / NOTE
        self.note |= json.loads(path.read_text()) if path.exists() else {"events": 0}
        self._write_note()
        for row in rows(self.run):
            for section, steps in self.told.items():
                if any(key.startswith(f"{section}/") for key in row):
                    steps.add(row[STEP])
        self.told["train"] |= set(range(1, self.note.get("train", 0) + 1))
        self.told["validation"] |= set(self.note.get("validation", []))
        self.writer = wandb.init(
            dir=self.run,
            id=self.note["id"],
            resume="allow",
            project=project,
            name=self.run.name,
            mode=mode,
            config=config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True),
        )
        self.writer.define_metric(STEP, hidden=True)
        self.writer.define_metric("*", step_metric=STEP)

    def _end(self) -> None:
        import wandb

        self.writer.finish()
        wandb.teardown()  # what `finish` has begun may not be on disk when it returns

    def _alert(self, events: list[dict[str, Any]]) -> None:
        for event in events[self.note.get("events", len(events)) :]:  # a note of before there were alerts has no number
            if (kind := str(event.get("event"))) in ALERTS:
                title = f"{self.run.name[:40]}: {kind.replace('_', ' ')}"  # wandb tells of one title once a minute
                text = f"step {event['step']}: {event.get('reason', '')}"[:1000]
                self.writer.alert(title, text, ALERTS[kind])
        self.note["events"] = len(events)
        self._write_note()  # only now: a kill in between repeats an alert, which is better than none

    def _tell(self, records: list[dict[str, Any]], beside: dict[str, float]) -> None:
        for record in records:
            step, section = record["step"], "validation" if record.get("validation") else "train"
            if step in self.told[section]:
                continue
            told = {key: value for key, value in record.items() if key not in ("step", "validation")}
            values = {f"{section}/{key}": value for key, value in told.items() if value is not None}
            if section == "validation":
                values["validation/done"] = 1  # where nothing was measured there are only samples
                values |= media(self.run / "samples" / f"step_{step:08d}")
            elif record is records[-1]:
                values |= beside
            self.writer.log({**values, STEP: step})
            self.told[section].add(step)
        if not self.writer.offline:
            self.note |= {"train": max(self.told["train"], default=0), "validation": sorted(self.told["validation"])}
            self._write_note()  # only now: a kill in between repeats a row, which does no harm

    def _write_note(self) -> None:
        atomic_write_text(self.run / NOTE, json.dumps(self.note))

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker's library does must not cost a training
            self.writer = None
            with contextlib.suppress(UserError):  # a full disk, which the run itself meets as well
                self.failed(f"wandb stopped ({type(error).__name__}: {error}); training goes on without it")


def media(folder: Path) -> dict[str, Any]:
    """A samples folder's videos and sheet for wandb, with their prompts; what is no longer there is left out."""
    import wandb

    found: dict[str, Any] = {}
    if not (folder / "samples.json").is_file():
        return found
    for sample in json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]:
        path = folder / sample["file"]
        if path.is_file():
            found[f"samples/{path.stem}"] = wandb.Video(str(path), caption=sample["prompt"], format="mp4")
    if (folder / "sheet.png").is_file():
        found["samples/sheet"] = wandb.Image(str(folder / "sheet.png"))
    return found
