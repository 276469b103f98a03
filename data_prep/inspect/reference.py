"""A clip's frames cut anew from its source, to hold against what comes back from its latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyarrow import fs
from pydantic import ValidationError

from data_prep.buckets import Bucket
from data_prep.files import find_files, relative_name
from data_prep.reasons import ClipError
from data_prep.sources import data_root
from data_prep.stages import local_copy
from data_prep.video.clips import ClipSpan
from data_prep.video.decode_process import Decoder
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.schema import bucket_size
from sora_train.storage import resolve


@dataclass(frozen=True)
class Reference:
    """Frames uint8 `F H W 3`, or none; and why there are none, or what is odd about them."""

    frames: np.ndarray | None
    remark: str = ""


class References:
    """Finds sources under `root` (empty: where they were when they were encoded) and cuts clips as the manifest says.

    Raises UserError for a root that can't be reached. Holds a decoder's process until it is closed.
    """

    def __init__(self, manifest: Manifest, root: str = ""):
        self.fps = manifest.fps
        self.decoder: Decoder | None = None
        self.remark = ""  # why there are no references at all
        try:
            data = DataConfig.model_validate(manifest.settings["data"])
            self.system, self.root = resolve(root or data_root(data))
            if root and self.system.get_file_info(self.root).type != fs.FileType.Directory:
                raise UserError(f"--root: there is no folder {root}; name the one that the sources lie in")
        except (KeyError, ValidationError):
            self.remark = "the manifest does not say how clips were cut from their sources"
        except (UserError, OSError) as error:
            if root:
                raise UserError(str(error)) from None
            self.remark = f"source not found: {error}"
        else:
            self.decoder = Decoder(data, SelectionConfig())  # the clip was kept once: nothing is filtered again

    def of(self, row: dict, bucket: str) -> Reference:
        """The reference of a shard's row, whatever became of its source."""
        if self.decoder is None:
            return Reference(None, self.remark)
        name = relative_name(row["source"], ())
        if name is None:
            return Reference(None, f"source not found: {row['source']}")
        path = f"{self.root}/{name}"
        try:
            file = find_files(self.system, self.root, [path])[path]
            if file.missing:
                return Reference(None, f"source not found: {path}")
            span = ClipSpan(row["start_s"], row["end_s"], Bucket(*bucket_size(bucket), self.fps))
            with local_copy(self.system, file.path) as local:
                clip = self.decoder.read(local, span, row["sample_id"])
        except ClipError as error:
            return Reference(None, f"the source can't be cut again: {error.reason}: {error.message}")
        except OSError as error:
            return Reference(None, f"the source can't be read: {error}")
        changed = row["content_hash"] not in ("", clip.content_hash)
        return Reference(clip.frames, "the source has changed since it was encoded" if changed else "")

    def close(self) -> None:
        """Ends the decoder's process."""
        if self.decoder is not None:
            self.decoder.close()
