"""Frozen networks: pixels to latents and back (`vae.py`), captions to embeddings (`text.py`)."""

from pathlib import Path

from sora_train.section import Section

BUILTIN = Path(__file__).parent / "builtin"
"""The folder of the embedded VAE and text encoder, which recipes call `builtin`."""


class CodecConfig(Section):
    """The frozen networks that latents and embeddings are made with."""

    vae: str = "builtin"
    """VAE: `builtin`, a folder in diffusers' format, or a hub id; the subfolder `vae` is found by itself."""
    text: str = "builtin"
    """T5 text encoder: `builtin`, a folder, or a hub id; its `text_encoder` and `tokenizer` are found by themselves."""
    max_tokens: int = 120
    """Text tokens that are kept of a caption; the rest is cut."""
