"""Metrics of runs for Prometheus, by Ray; `cluster/grafana/sora_train.json` draws them.

Only the driver publishes, from `metrics.jsonl` and `events.jsonl`, so values are those of the record. Ray adds `ray_`
before each name and `_total` after a counter's (`ray.util.metrics`). It drops a gauge that was not set for some
seconds, so finished runs disappear, and a running one sets its gauges repeatedly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

from sora_train.log import log

REFRESH_S = 2.0  # well below the time after which Ray drops a gauge


@dataclass(frozen=True)
class Metric:
    """One metric. `key` is the key in `metrics.jsonl` that holds its value, if any."""

    description: str
    key: str = ""
    kind: Literal["gauge", "counter"] = "gauge"
    tag: str = ""
    """A label besides `run`."""


METRICS = {
    "sora_step": Metric("Steps done."),
    "sora_loss": Metric("Training loss of the last logged step.", "loss"),
    "sora_learning_rate": Metric("Learning rate.", "lr"),
    "sora_gradient_norm": Metric("Gradient norm before clipping.", "grad_norm"),
    "sora_samples_per_s": Metric("Clips per second, of all workers together.", "samples_per_s"),
    "sora_tokens_per_s": Metric("Tokens per second, of all workers together.", "tokens_per_s"),
    "sora_mfu": Metric("Share of the FLOP/s that the devices could give, 0 to 1.", "mfu"),
    "sora_data_wait_share": Metric("Share of the time that rank 0 waits for data, 0 to 1.", "data_wait_share"),
    "sora_step_s": Metric("Seconds of a step.", "step_s"),
    "sora_memory_gb": Metric("Most memory that rank 0 had in use, 1e9 bytes.", "memory_gb"),
    "sora_checkpoint_s": Metric("Seconds until the last checkpoint was on disk.", "checkpoint_s"),
    "sora_checkpoint_stall_s": Metric("Seconds that the last checkpoint held training up.", "checkpoint_stall_s"),
    "sora_validation_s": Metric("Seconds of the last validation.", "validation_s"),
    "sora_holdout_loss": Metric("Held-out loss of the last validation.", "holdout_loss"),
    "sora_fvd": Metric("Fréchet video distance of the last validation.", "fvd"),
    "sora_similarity": Metric("Similarity of samples to their prompts at the last validation.", "similarity"),
    "sora_events": Metric("Lines of events.jsonl, by their kind.", kind="counter", tag="kind"),
    "sora_prep_clips": Metric("Clips that came out: written, quarantined or filtered.", kind="counter", tag="outcome"),
    "sora_prep_left_out": Metric("Clips quarantined or filtered so far, by reason.", tag="reason"),
    "sora_prep_clips_per_s": Metric("Clips per second that come out of the encoding, start-up left out."),
    "sora_prep_share_done": Metric("Share of the sources that are finished, 0 to 1."),
}
"""All metrics. There are no labels for rank, clip or step, which would make too many series."""


class RayMetrics:
    """The metrics of one run, shown as long as `refresh` is called. Does nothing without a connection to Ray.

    An error is reported once and ends the metrics, never the run.
    """

    def __init__(self, run: str) -> None:
        self.run, self.on, self.set_at = run, ray.is_initialized(), 0.0
        self.handles: dict[str, Gauge | Counter] = {}
        self.values: dict[tuple[str, str], float] = {}  # by name and label

    def set_from_record(self, record: dict[str, Any]) -> None:
        """Sets gauges from a line of `metrics.jsonl`."""
        found = {name: record.get(metric.key) for name, metric in METRICS.items() if metric.key}
        if not record.get("validation"):
            found["sora_step"] = record.get("step")
        self.set({name: value for name, value in found.items() if isinstance(value, int | float)})

    def set(self, values: Mapping[str, int | float]) -> None:
        """Sets gauges without a label."""
        self.set_tagged({(name, ""): value for name, value in values.items()})

    def set_tagged(self, values: Mapping[tuple[str, str], int | float]) -> None:
        """Sets gauges by name and label."""
        self.values |= values
        self.set_at = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Sets all gauges again if it is time. To be called about every second."""
        if self.on and time.monotonic() - self.set_at > REFRESH_S:
            self.set_at = time.monotonic()
            for (name, what), value in list(self.values.items()):  # two threads of prep set some
                tags = {"run": self.run, METRICS[name].tag: what} if what else {"run": self.run}
                self._guarded(partial(self._set, name, value, tags))

    def clear(self) -> None:
        """Stops refreshing the gauges, so Ray drops them."""
        self.values.clear()

    def count(self, name: str, what: str, number: int = 1) -> None:
        """Increases a counter by `number`, 0 or more."""
        tag = METRICS[name].tag
        if self.on and number:
            self._guarded(lambda: self._handle(name).inc(number, {"run": self.run, tag: what}))

    def _set(self, name: str, value: int | float, tags: dict[str, str]) -> None:
        self._handle(name).set(value, tags)

    def _handle(self, name: str) -> Any:
        if name not in self.handles:
            metric = METRICS[name]
            kind = Gauge if metric.kind == "gauge" else Counter
            tags = ("run", metric.tag) if metric.tag else ("run",)
            self.handles[name] = kind(name, description=metric.description, tag_keys=tags)
        return self.handles[name]

    def _guarded(self, act: Callable[[], object]) -> None:
        if not self.on:
            return
        try:
            act()
        except Exception as error:  # must never cost a training
            self.on = False
            log.warning(f"Ray metrics stopped ({type(error).__name__}: {error}); the run continues")
