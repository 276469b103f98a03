"""Frozen networks: pixels to latents and back (`vae.py`), captions to embeddings (`text.py`)."""

import os
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from sora_train.section import Section

BUILTIN = Path(__file__).parent / "builtin"
"""The folder of the embedded VAE and text encoder, which recipes call `builtin`."""


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""A recipe's word for a number format, and torch's."""


class CodecConfig(Section):
    """The frozen networks that latents and embeddings are made with."""

    vae: str = "builtin"
    """VAE: `builtin`, a folder in diffusers' format, or a hub id, `owner/name` or `owner/name@revision`."""
    text: str = "builtin"
    """T5 text encoder and its tokenizer: `builtin`, a folder, or a hub id, `owner/name` or `owner/name@revision`."""
    models: str = ""
    """Folder that `sora download` filled: hub ids above are looked for there first."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Number format the VAE encodes in; latents are stored in float16 either way. bf16 adds an error of the size of the
    noise at DDPM's lowest step."""
    text_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format the text encoder computes in."""
    max_tokens: PositiveInt = 120
    """Text tokens that are kept of a caption; the rest is cut."""
    caption_cleaning: Literal["auto", "none", "lower"] = "auto"
    """What is done to captions and prompts before they are embedded: `lower` makes them lower case and strips spaces,
    as LattePipeline and PixArt-α do. `auto`: that of the weights in model.init_from, `lower` if they are released ones;
    `none` without."""
    null_prompt: Literal["auto", "eos", "padded"] = "auto"
    """What a dropped caption and the pass without a prompt are given: `eos` is "" alone, one token; `padded` is ""
    padded, cut to the caption's number of tokens, as in LattePipeline. `auto`: that of the weights in model.init_from;
    `eos` without."""

    def absolute(self) -> "CodecConfig":
        """The same with absolute names of local folders, for a process with another working folder."""
        names = {key: getattr(self, key) for key in ("vae", "text", "models")}
        local = {
            key: name for key, name in names.items() if name != "builtin" and os.path.isdir(os.path.expanduser(name))
        }
        return self.model_copy(update={key: os.path.abspath(os.path.expanduser(name)) for key, name in local.items()})
