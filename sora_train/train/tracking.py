"""Weights & Biases: one process logs curves and sample videos, and no error of wandb can stop training.

Every key is logged once per step, also over resumes: wandb's offline files, or `wandb.json` for a server, say what it
has. So repeated steps are not logged again, and steps that were lost in a kill are.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sora_train.errors import UserError
from sora_train.storage import atomic_write_text

STEP = "train_step"
"""The x axis of every key. wandb drops rows whose own step decreases, so it counts its own and we log ours too."""
NOTE = "wandb.json"
FREE_AFTER_S = 30
ERRORS = ("failed", "damaged", "rollback")
WARNINGS = ("worker_lost", "driver_lost", "skipped", "stopped", "preempted", "validation_failed", "report_failed")
"""Events that become wandb alerts, by level."""
BLOCK, HEADER, OWN = 32768, 7, 7
WHOLE, LAST = 1, 4
"""Sizes and kinds of parts in wandb's offline files: see `offline_records`."""


class Tracker:
    """A wandb run; with mode `off` it does nothing. It reports its first failure and then stops."""

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
        self.logged: dict[str, set[int]] = {"train": set(), "validation": set()}  # steps
        if mode != "off":
            self._guarded(lambda: self._start(mode, project, config))

    def log(self, records: list[dict[str, Any]], extra: dict[str, float] | None = None) -> None:
        """Logs records of `metrics.jsonl` that wandb does not have. `extra` metrics go with the last of them."""
        if self.writer is not None and records:
            self._guarded(lambda: self._log(records, extra or {}))

    def alert(self, events: list[dict[str, Any]]) -> None:
        """Takes all lines of `events.jsonl`, which only grows; new ones of the kinds in `ALERTS` become alerts."""
        if self.writer is not None and len(events) > self.note.get("events", 0):
            self._guarded(lambda: self._alert(events))

    def finish(self) -> None:
        """Waits until everything is on disk or sent."""
        if self.writer is not None:
            self._guarded(self._finish)
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
        for row in offline_rows(self.run):
            for section, steps in self.logged.items():
                if any(key.startswith(f"{section}/") for key in row):
                    steps.add(row[STEP])
        self.logged["train"] |= set(range(1, self.note.get("train", 0) + 1))
        self.logged["validation"] |= set(self.note.get("validation", []))
        begin = partial(
            wandb.init,
            dir=self.run,
            id=self.note["id"],
            resume="allow",
            project=project,
            name=self.run.name,
            mode=mode,
            config=config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True),
        )
        self.writer = _when_free(begin)
        self.writer.define_metric(STEP, hidden=True)
        self.writer.define_metric("*", step_metric=STEP)

    def _finish(self) -> None:
        import wandb

        self.writer.finish()
        wandb.teardown()  # `finish` returns before everything is on disk

    def _alert(self, events: list[dict[str, Any]]) -> None:
        for event in events[self.note.get("events", len(events)) :]:  # notes of older versions have no number
            if (kind := str(event.get("event"))) in ERRORS + WARNINGS:
                title = f"{self.run.name[:40]}: {kind.replace('_', ' ')}"  # wandb sends a title once a minute
                text = f"step {event['step']}: {event.get('reason', '')}"[:1000]
                self.writer.alert(title, text, "ERROR" if kind in ERRORS else "WARN")
        self.note["events"] = len(events)
        self._write_note()  # last: a kill before this repeats an alert instead of losing it

    def _log(self, records: list[dict[str, Any]], extra: dict[str, float]) -> None:
        for record in records:
            step, section = record["step"], "validation" if record.get("validation") else "train"
            if step in self.logged[section]:
                continue
            metrics = {key: value for key, value in record.items() if key not in ("step", "validation")}
            values = {f"{section}/{key}": value for key, value in metrics.items() if value is not None}
            if section == "validation":
                values["validation/done"] = 1  # without metrics there are only samples
                values |= media(self.run / "samples" / f"step_{step:08d}")
            elif record is records[-1]:
                values |= extra
            self.writer.log({**values, STEP: step})
            self.logged[section].add(step)
        if not self.writer.offline:
            self.note["train"] = max(self.logged["train"], default=0)
            self.note["validation"] = sorted(self.logged["validation"])
            self._write_note()  # last: a kill before this repeats a row, which does no harm

    def _write_note(self) -> None:
        atomic_write_text(self.run / NOTE, json.dumps(self.note))

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # no error of wandb may stop training
            self.writer = None
            with contextlib.suppress(UserError):  # a full disk, which stops the run itself too
                self.failed(f"wandb stopped ({type(error).__name__}: {error}); training goes on without it")


def _when_free(begin: Callable[[], Any]) -> Any:
    """Starts a wandb run. wandb's service may still hold an ended run's id for a moment ("run ID … is in use")."""
    for _ in range(FREE_AFTER_S):
        try:
            return begin()
        except Exception as error:
            if "in use" not in str(error):
                raise
            time.sleep(1)
    return begin()


def media(folder: Path) -> dict[str, Any]:
    """A samples folder's videos and sheet for wandb, with their prompts; missing files are ignored."""
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


def offline_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Rows of history of all of a run's offline files, in order of time; nested keys are joined by a dot.

    Read with wandb's own protobufs; wandb's own reader exists only in Go.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in offline_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_records(data: bytes) -> Iterator[bytes]:
    """The complete records of an offline file; one that was cut short is ignored.

    A log in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind 7 bytes of wandb's
    own, written in blocks of 32 KB, so a killed process loses its last rows.
    """
    at, parts = OWN, b""
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:  # a block's last bytes that hold no header are empty
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        parts, at = parts + data[at : at + length], at + length
        if kind in (WHOLE, LAST) and at <= len(data):
            yield parts
            parts = b""
