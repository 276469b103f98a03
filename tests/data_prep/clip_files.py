"""The clips of a file, without a process of their own and without keeping the file open."""

from data_prep.video.clips import Clip, ClipPlan, ClipSpan, Source
from sora_train.data.config import DataConfig, SelectionConfig


def plan_clips(path: str, data: DataConfig, selection: SelectionConfig, headers_only: bool = False) -> ClipPlan:
    return Source(path, data, selection).plan_clips(headers_only)


def read_clip(path: str, span: ClipSpan, data: DataConfig, selection: SelectionConfig, seed: str) -> Clip:
    return Source(path, data, selection).read(span, seed)
