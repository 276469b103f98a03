"""Captions to embeddings with a frozen T5 encoder (arXiv 1910.10683), one vector a token.

Only real tokens come out, never padding: T5-XXL padded to 120 tokens would be 0.98 MB a caption. T5 v1.1 overflows in
float16, so the encoder runs in float32 or bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sora_train.codec.files import TextFiles, find_text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

BATCH = 32  # captions at once


class TextEncoder:
    """A frozen T5 encoder and its tokenizer."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, files: TextFiles):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width = files.width
        self.files = files

    @property
    def hash(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        return self.files.hash

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Float[Tensor, "l e"]]:
        """Embeddings of each caption's own tokens, float32 on the CPU, cut at `max_tokens`; "" is its `</s>` alone."""
        if not captions:
            return []
        ids = self.tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]
        order = sorted(range(len(captions)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
        embeddings: dict[int, Tensor] = {}
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            longest = len(ids[part[-1]])
            tokens = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            for row, i in enumerate(part):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            device = self.model.device
            hidden = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
            hidden = hidden.float().cpu()
            embeddings |= {i: hidden[row, : len(ids[i])].clone() for row, i in enumerate(part)}
        return [embeddings[i] for i in range(len(captions))]


def load_text_encoder(
    name: str, max_tokens: int = 120, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder that `codec.text` names: `builtin`, a folder, or a hub id; also a whole pipeline's.

    Raises UserError, with what to do, where it can't be had, and ValueError for float16, in which T5 v1.1 overflows.
    """
    import transformers

    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"T5 overflows in {dtype}; use torch.bfloat16 or torch.float32")
    files = find_text_encoder(name)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.T5EncoderModel.from_pretrained(
            str(files.place), local_files_only=True, use_safetensors=True, dtype=dtype
        )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model.to(device)  # pyright: ignore[reportArgumentType]
    return TextEncoder(model, load_tokenizer(files.tokenizer), max_tokens, files)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with a `tokenizer.json`, or with T5's own `spiece.model` alone."""
    from transformers import AutoTokenizer, T5Tokenizer

    kind = AutoTokenizer if (folder / "tokenizer.json").is_file() else T5Tokenizer
    return kind.from_pretrained(str(folder), local_files_only=True)


def pad_text(embeddings: list[Tensor]) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"]]:
    """Embeddings `l e` of different lengths as one batch, zeros behind the end, with the mask of real tokens."""
    text = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    lengths = torch.tensor([len(embedding) for embedding in embeddings])
    return text, torch.arange(text.shape[1]) < lengths[:, None]
