"""`sora report`: one self-contained HTML page about a run, or one that compares several."""

from sora_train.report.page import style_sheet, write_report

__all__ = ["style_sheet", "write_report"]
