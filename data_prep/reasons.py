"""The reasons why a clip is not in the shards, and the remarks on sources. A new filter adds its reason here.

`quarantine.parquet` lists the clips of both kinds: those that failed (QUARANTINED) and those that were skipped.
"""

from __future__ import annotations

QUARANTINED = {
    "outside_root": "source",  # the name is outside the data root
    "missing_file": "source",
    "empty_file": "source",
    "fetch_failed": "source",  # remote storage failed
    "unreadable": "open",  # not a container that any decoder knows
    "no_video_stream": "open",
    "too_large": "open",  # declares more pixels than a frame may have; refused before it is decoded
    "truncated": "decode",  # ends before the clip, though its header promises more
    "corrupt": "decode",  # can't be decoded up to the end of the clip
    "decoder_crashed": "decode",  # the decoder's process died
    "timeout": "decode",  # decoding took longer than data.timeout_s
    "encode_failed": "encode",  # the VAE or the text encoder raised an error
    "not_finite": "encode",  # latents or embeddings hold NaN or infinity
}
"""Why a clip could not be made -> the stage that found it."""
FILTERED = {
    "no_caption": "source",
    "duplicate_row": "source",  # an earlier row has the same file and caption
    "too_short": "open",  # for every bucket, or shorter than selection.min_seconds; or one frame without a 1x… bucket
    "too_long": "open",  # longer than selection.max_seconds
    "too_small": "open",  # would be enlarged more than data.max_enlarge, or is below selection.min_side
    "crosses_cut": "open",  # every scene is too short for a clip
    "black": "select",
    "frozen": "select",
    "too_still": "select",
    "too_lively": "select",
    "blurred": "select",
    "duplicate": "select",  # the same bytes and span as an earlier clip
    "near_duplicate": "select",  # looks like an earlier clip
}
"""Why a clip is skipped although its file is sound -> the stage that found it."""
BAD_SOURCE_REASONS = frozenset(QUARANTINED) - {"outside_root"}
"""Reasons that count for `data.max_bad_fraction`. Encoding errors count too: if many clips fail,
the network, its precision or the memory is at fault."""
PERMANENT = frozenset({"unreadable", "no_video_stream", "too_large", "truncated", "corrupt"}) | frozenset(FILTERED)
"""Reasons that hold as long as file and recipe are the same. Such a clip is not tried again."""
REMARKS = {
    "hdr": "PQ or HLG, mapped to SDR",
    "wide_gamut": "BT.2020 or P3, mapped to BT.709",
    "interlaced": "both fields of a frame become one image",
    "clean_aperture": "the complete frame is taken",
    "icc_profile": "an image's ICC profile that can't be applied",
    "image_colours": "an image's HDR, wide gamut or gamma is not applied",
    "no_timestamps": "a raw stream without timestamps, whose frame rate is assumed",
    "pages": "the first of an image's pages is taken",
    "holes": "no clips of holes in its timestamps",
    "long_caption": "its caption has more tokens than codec.max_tokens, and its end is cut off",
    "breaks_off": "the file ends before its header says, but after its clips",
}
"""What is odd about a source that gives clips. A remark is such a name, a colon and text; `; ` joins them."""


def remark_kinds(remark: str) -> list[str]:
    """The names in a remark."""
    found = (part.partition(":")[0] for part in remark.split("; "))
    return [kind for kind in found if kind in REMARKS]


class ClipError(Exception):
    """A clip can't be made, or a filter skips it; the job goes on. `reason` is one of those above."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def kind_of(reason: str) -> str:
    """`quarantined` or `filtered`."""
    return "filtered" if reason in FILTERED else "quarantined"


def stage_of(reason: str) -> str:
    """The stage that found it: `source`, `open`, `decode`, `select` or `encode`."""
    return QUARANTINED.get(reason) or FILTERED[reason]
