"""The fixed list of reasons for which a clip that was asked for is not in the shards."""

from __future__ import annotations

QUARANTINED = {
    "outside_root": "source",  # the name leaves the data root
    "missing_file": "source",
    "empty_file": "source",
    "fetch_failed": "source",  # remote storage did not hand it over
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
    "too_short": "open",  # shorter than the shortest bucket, or than selection.min_seconds; or a picture, and no 1x…
    "too_long": "open",  # longer than selection.max_seconds
    "too_small": "open",  # would be enlarged more than data.max_enlarge, or is below selection.min_side
    "crosses_cut": "open",  # between two scene cuts there is no room for a clip
    "black": "select",
    "frozen": "select",
    "too_still": "select",
    "too_lively": "select",
    "blurred": "select",
    "duplicate": "select",  # the same bytes as an earlier clip's file, at the same place
    "near_duplicate": "select",  # looks like an earlier clip
}
"""Why a clip was left out though nothing is wrong with its file, and at which stage."""
BAD_SOURCE_REASONS = frozenset(QUARANTINED) - {"outside_root"}
"""The reasons that count for `data.max_bad_fraction`. Encoding that fails counts too: one clip in a thousand is its own
fault, a tenth of them is that of the network, its precision or the memory."""
PERMANENT = frozenset({"unreadable", "no_video_stream", "too_large", "truncated", "corrupt"}) | frozenset(FILTERED)
"""The reasons that hold for as long as the file and the recipe are the same: such a clip is not tried again."""


REMARKS = {
    "hdr": "PQ or HLG, mapped to SDR",
    "wide_gamut": "BT.2020 or P3, mapped to BT.709",
    "interlaced": "both fields of a frame are taken as one picture",
    "clean_aperture": "the whole frame is taken",
    "icc_profile": "an image's ICC profile that can't be applied",
    "pages": "the first of an image's pages is taken",
    "holes": "no clips of holes in its timestamps",
    "breaks_off": "the file ends before its header says, behind its clips",
}
"""What is odd about a source that gives clips. A remark is such a name, a colon and words; several are joined."""


def remark_kinds(remark: str) -> list[str]:
    """The names in a remark."""
    found = (part.partition(":")[0] for part in remark.split("; "))
    return [kind for kind in found if kind in REMARKS]


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
    """Where on its road a clip stopped: `source`, `open`, `decode`, `select` or `encode`."""
    return QUARANTINED.get(reason) or FILTERED[reason]
