"""Frozen networks: the VAE (`vae.py`) and the text encoder (`text.py`).

The VAE converts pixels to latents and back. The text encoder embeds captions.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from sora_train.section import Section

BUILTIN = Path(__file__).parent / "builtin"
"""Folder of the bundled VAE and text encoder, `builtin` in recipes."""


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Number formats: names in recipes and names in torch."""


class CodecConfig(Section):
    """The frozen networks that compute latents and text embeddings."""

    vae: str = "builtin"
    """VAE: `builtin`, a folder in diffusers' format, or a hub id.
    A hub id is `owner/name` or `owner/name@revision`."""
    text: str = "builtin"
    """Text encoder (T5 or UMT5) and its tokenizer: `builtin`, a folder or a hub id.
    A hub id is `owner/name` or `owner/name@revision`."""
    models: str = ""
    """Folder that `sora download` filled. Hub ids are looked up there first."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Number format of the VAE. Latents are stored in float16 either way.
    bf16 adds an error as large as the noise of DDPM's lowest step."""
    text_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the text encoder."""
    max_tokens: PositiveInt = 120
    """Maximum number of text tokens of a caption; longer ones are cut. Wan takes 512."""
    caption_cleaning: Literal["auto", "none", "lower", "wan"] = "auto"
    """Cleaning of captions and prompts before they are embedded.
    `lower` converts to lower case and strips spaces, as LattePipeline and PixArt-α do. `wan` resolves HTML entities and
    joins white space, as WanPipeline does; like it, it repairs text with ftfy if that is installed. `auto` follows the
    weights in model.init_from (`wan` or `lower` for released ones); it is `none` if init_from is empty."""
    null_prompt: Literal["auto", "eos", "padded"] = "auto"
    """Null prompt, for dropped captions and for the unconditional pass.
    `eos` is "" alone, one token. `padded` is "" with padding, cut to the caption's number of tokens, as in
    LattePipeline; Wan's is `eos`. `auto` follows the weights in model.init_from; it is `eos` if init_from is empty."""

    def absolute(self) -> "CodecConfig":
        """A copy with absolute paths of local folders.

        For processes whose working directory differs.
        """
        names = {key: getattr(self, key) for key in ("vae", "text", "models")}
        local = {
            key: name for key, name in names.items() if name != "builtin" and os.path.isdir(os.path.expanduser(name))
        }
        return self.model_copy(update={key: os.path.abspath(os.path.expanduser(name)) for key, name in local.items()})
