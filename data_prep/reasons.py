"""The fixed list of reasons for which a clip that was asked for is not in the shards."""

from __future__ import annotations

QUARANTINED = {
    "outside_root": "source",  # the name leaves the data root
    "missing_file": "source",
    "empty_file": "source",
    "unreadable": "open",  # no container that any decoder knows
    "no_video_stream": "open",
    "too_large": "open",  # declares more pixels than a frame may have; refused before it is decoded
    "truncated": "decode",  # ends before the clip that its header promises
    "corrupt": "decode",  # can't be decoded as far as the clip reaches
    "decoder_crashed": "decode",  # the decoder's process died on it
    "timeout": "decode",  # decoding took longer than data.timeout_s
    "encode_failed": "encode",  # the VAE or the text encoder raised an error
    "not_finite": "encode",  # latents or embeddings hold NaN or infinity
}
"""Why a clip could not be made, and at which stage of its road."""
FILTERED = {
    "no_caption": "source",
    "duplicate_row": "source",  # an earlier row has the same file and caption
    "too_short": "decode",  # the video is shorter than frames / fps
}
"""Why a clip was left out though nothing is wrong with its file, and at which stage."""
UNDECODABLE = frozenset(QUARANTINED) - {"outside_root", "encode_failed", "not_finite"}
"""The reasons that count for `data.max_bad_fraction`: the file is to blame."""
LASTING = frozenset({"unreadable", "no_video_stream", "too_large", "truncated", "corrupt", "too_short"})
"""The reasons that hold for as long as the file is the same: such a clip is not tried again."""


class ClipError(Exception):
    """One clip can't be had; the job goes on. `reason` is one of those above."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


def kind_of(reason: str) -> str:
    """`quarantined` or `filtered`."""
    return "filtered" if reason in FILTERED else "quarantined"


def stage_of(reason: str) -> str:
    """Where on its road a clip stopped: `source`, `open`, `decode` or `encode`."""
    return QUARANTINED.get(reason) or FILTERED[reason]
