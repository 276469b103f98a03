"""Captions to embeddings with a frozen T5 encoder (arXiv 1910.10683), one vector a token.

Only real tokens come out, never padding: T5-XXL padded to 120 tokens would be 0.98 MB a caption. T5 v1.1 overflows in
float16, so the encoder runs in float32 or bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.codec import DTYPES, CodecConfig
from sora_train.codec.conventions import clean
from sora_train.codec.files import TextFiles, damaged_file_errors, find_text_encoder
from sora_train.codec.memory import give_back, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel


class TextEncoder:
    """A frozen T5 encoder and its tokenizer.

    On the CPU captions go through one by one (`one_by_one`), because float32 embeddings made in a batch differ in their
    last bits from those made alone. Elsewhere `batch` go together at most; `remarks` says where memory made that fewer,
    and whoever reports them empties the list.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        files: TextFiles,
        batch: int = 32,
        cleaning: str = "none",
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width = files.width
        self.files = files
        self.batch = batch
        self.cleaning = cleaning
        self.one_by_one = model.device.type == "cpu"
        self.remarks: list[str] = []

    @property
    def hash(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        return self.files.hash

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Float[Tensor, "l e"]]:
        """Embeddings of each caption's own tokens, float32 on the CPU, cut at `max_tokens`; "" is its `</s>` alone.

        Raises torch.OutOfMemoryError (on the CPU RuntimeError) where not even one caption fits.
        """
        if not captions:
            return []
        ids = self.tokenizer([clean(caption, self.cleaning) for caption in captions], **self._limit)["input_ids"]
        order = sorted(range(len(captions)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
        embeddings: dict[int, Tensor] = {}
        while left := order[len(embeddings) :]:
            part = left[: 1 if self.one_by_one else self.batch]
            try:
                hidden = self._forward([ids[i] for i in part])
                embeddings |= {i: hidden[row, : len(ids[i])].clone() for row, i in enumerate(part)}
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self.batch = len(part) // 2
            self.remarks.append(f"text: out of memory with {len(part)} captions at once; goes on with {self.batch}")
            give_back(self.model.device)
        return [embeddings[i] for i in range(len(captions))]

    @torch.inference_mode()
    def encode_padded(self, caption: str, length: int = 0) -> Float[Tensor, "l e"]:
        """A caption's tokens and then padding up to `length`, `max_tokens` if 0.

        Padding attends to the caption's tokens alone. So of "" all padding is alike: two tokens say everything.
        """
        ids: list[int] = self.tokenizer(clean(caption, self.cleaning), **self._limit)["input_ids"]  # pyright: ignore
        return self._forward([ids], length or self.max_tokens)[0]

    def encode_null(self, caption: str, null_prompt: str) -> Float[Tensor, "l e"]:
        """What guidance leads away from: `eos` has the caption's own tokens; `padded` is to be cut, see `cut_null`."""
        return self.encode_padded(caption) if null_prompt == "padded" else self.encode([caption])[0]

    @property
    def _limit(self) -> dict[str, Any]:
        return {"truncation": True, "max_length": self.max_tokens}

    def _forward(self, ids: list[list[int]], length: int = 0) -> Float[Tensor, "b l e"]:
        longest = max(length, *map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        device = self.model.device
        hidden = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
        return hidden.float().cpu()


def load_text_encoder(
    name: str,
    max_tokens: int = 120,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    models: str = "",
    batch: int = 32,
    cleaning: str = "none",
) -> TextEncoder:
    """The text encoder that `codec.text` names: `builtin`, a folder, or a hub id; also a whole pipeline's.

    `models` is a folder that `sora download` filled; `batch` captions go through at once, on the CPU always one.
    Raises UserError, with what to do, where it can't be had, and ValueError for float16, in which T5 v1.1 overflows.
    """
    import transformers

    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"T5 overflows in {dtype}; use torch.bfloat16 or torch.float32")
    files = find_text_encoder(name, models)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with damaged_file_errors(f"codec.text: {files.place}", files.place):
            model = transformers.T5EncoderModel.from_pretrained(
                str(files.place), local_files_only=True, use_safetensors=True, dtype=dtype
            )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model.to(device)  # pyright: ignore[reportArgumentType]
    return TextEncoder(model, load_tokenizer(files.tokenizer), max_tokens, files, batch, cleaning)


def text_encoder_of(codec: CodecConfig, device: str | torch.device = "cpu", batch: int = 32) -> TextEncoder:
    """A recipe's text encoder in its precision. ValueError while `codec.caption_cleaning` is `auto`."""
    if codec.caption_cleaning == "auto":
        raise ValueError("codec.caption_cleaning is auto; expected what it stands for")
    dtype = getattr(torch, DTYPES[codec.text_precision])
    return load_text_encoder(codec.text, codec.max_tokens, device, dtype, codec.models, batch, codec.caption_cleaning)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with a `tokenizer.json`, or with T5's own `spiece.model` alone."""
    from transformers import AutoTokenizer, T5Tokenizer

    kind = AutoTokenizer if (folder / "tokenizer.json").is_file() else T5Tokenizer
    with damaged_file_errors(f"codec.text: {folder}"):
        return kind.from_pretrained(str(folder), local_files_only=True)


def null_tokens(encoder: TextEncoder) -> bytes:
    """The empty prompt's `</s>` and a token of its padding, float16, as the manifest keeps them."""
    return encoder.encode_padded("", 2).half().numpy().tobytes()


def cut_null(null: Float[Tensor, "m e"], null_prompt: str, tokens: int) -> Float[Tensor, "_ e"]:
    """What stands beside a caption of so many tokens when it is dropped or led away from."""
    return null[:tokens] if null_prompt == "padded" else null
