"""A run's folder to one HTML page: curves, samples by step, obedience, events, recipe; no server, nothing fetched."""

from sora_train.report.page import write_report

__all__ = ["write_report"]
