"""Embeds captions with a frozen T5 (arXiv 1910.10683) or UMT5 (arXiv 2304.09151) encoder, one vector a token.

Padding is not stored: T5-XXL's embeddings padded to 120 tokens would take 0.98 MB a caption. T5 v1.1 overflows in
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
from sora_train.codec.files import TextFiles, check_complete, damaged_file_errors, find_text_encoder
from sora_train.codec.imports import without_torchao
from sora_train.codec.memory import give_back, is_out_of_memory
from sora_train.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

CUTS_SHOWN = 3
"""Captions that an encoder shows in `remarks` because their end is cut off."""
TAIL_SHOWN = 200
"""Characters that are shown of such an end."""


class TextEncoder:
    """A frozen T5 or UMT5 encoder and its tokenizer.

    On the CPU captions are encoded one by one (`one_by_one`), because float32 embeddings from a batch differ in their
    last bits from those of single captions. On other devices at most `batch` captions share a forward pass. If memory
    runs out, `batch` is halved and a message is added to `remarks`. The caller that reports them clears the list.
    """

    def __init__(
        self,
        model: T5EncoderModel | UMT5EncoderModel,
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
        self.cuts = 0

    @property
    def hash(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        return self.files.hash

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Float[Tensor, "l e"]]:
        """Embeddings of each caption's own tokens, without padding.

        They are float32 on the CPU and cut at `max_tokens`; the first cuts are shown in `remarks`. The empty caption
        has one token, `</s>`. Raises torch.OutOfMemoryError (RuntimeError on the CPU) if not even one caption fits in
        memory.
        """
        ids = [self._tokens(caption) for caption in captions]
        order = sorted(range(len(captions)), key=lambda i: len(ids[i]))  # similar lengths together: less padding
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
        """Embeddings of a caption padded to `length` tokens (`max_tokens` if 0).

        Padding attends only to the caption's tokens. So all padding tokens of "" have the same embedding, and two
        tokens are enough to store it.
        """
        return self._forward([self._tokens(caption)], length or self.max_tokens)[0]

    def encode_null(self, caption: str, null_prompt: str) -> Float[Tensor, "l e"]:
        """Embeddings of the prompt that guidance leads away from.

        `eos` gives the caption's own tokens. `padded` gives `max_tokens` tokens, which `cut_null` cuts.
        """
        return self.encode_padded(caption) if null_prompt == "padded" else self.encode([caption])[0]

    def cut_off(self, caption: str) -> str:
        """The end of a caption that doesn't fit into `max_tokens`, the last of which is `</s>`; for messages."""
        return self._shown(self._all_tokens(caption))

    def _all_tokens(self, caption: str) -> list[int]:
        found: Any = self.tokenizer(clean(caption, self.cleaning), truncation=False, verbose=False)["input_ids"]
        return found

    def _tokens(self, caption: str) -> list[int]:
        """A caption's tokens, at most `max_tokens`; adds a remark if there are more."""
        ids = self._all_tokens(caption)
        if len(ids) <= self.max_tokens:
            return ids
        self.cuts += 1
        if self.cuts <= CUTS_SHOWN:
            more = "; later captions that are cut are not shown" if self.cuts == CUTS_SHOWN else ""
            self.remarks.append(
                f"text: a caption has {len(ids)} tokens, more than codec.max_tokens {self.max_tokens}; not used: "
                f"{self._shown(ids)!r}{more}"
            )
        return [*ids[: self.max_tokens - 1], ids[-1]]

    def _shown(self, ids: list[int]) -> str:
        lost = ids[self.max_tokens - 1 :] if len(ids) > self.max_tokens else []
        text = one_line(str(self.tokenizer.decode(lost, skip_special_tokens=True)))
        return text if len(text) <= TAIL_SHOWN else f"{text[:TAIL_SHOWN].rstrip()}… ({len(text)} characters)"

    def _forward(self, ids: list[list[int]], length: int = 0) -> Float[Tensor, "b l e"]:
        longest = max(length, *map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        device = self.model.device
        hidden = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
        return hidden.cpu().float()  # in this order half the bytes are copied in bf16


@without_torchao()
def load_text_encoder(
    name: str,
    max_tokens: int = 120,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    models: str = "",
    batch: int = 32,
    cleaning: str = "none",
) -> TextEncoder:
    """Loads the text encoder of `codec.text`: `builtin`, a folder or a hub id.

    The folder or hub id may hold a whole pipeline. `models` is a folder that `sora download` filled. `batch` captions
    share a forward pass; on the CPU always one. Raises UserError, with what to do, if the encoder can't be loaded, and
    ValueError for float16, in which T5 v1.1 overflows.
    """
    import transformers

    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"T5 overflows in {dtype}; use torch.bfloat16 or torch.float32")
    files = find_text_encoder(name, models)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with damaged_file_errors(f"codec.text: {files.place}", files.place):
            model, info = getattr(transformers, files.kind).from_pretrained(
                str(files.place), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
            check_complete(info)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model.to(device)
    return TextEncoder(model, load_tokenizer(files.tokenizer), max_tokens, files, batch, cleaning)


def text_encoder_of(codec: CodecConfig, device: str | torch.device = "cpu", batch: int = 32) -> TextEncoder:
    """Loads a recipe's text encoder in the recipe's precision.

    Raises ValueError if `codec.caption_cleaning` is still `auto`.
    """
    if codec.caption_cleaning == "auto":
        raise ValueError("codec.caption_cleaning is auto; expected what it stands for")
    dtype = getattr(torch, DTYPES[codec.text_precision])
    return load_text_encoder(codec.text, codec.max_tokens, device, dtype, codec.models, batch, codec.caption_cleaning)


@without_torchao()
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from `tokenizer.json`, or else from T5's `spiece.model`."""
    from transformers import AutoTokenizer, T5Tokenizer

    kind = AutoTokenizer if (folder / "tokenizer.json").is_file() else T5Tokenizer
    with damaged_file_errors(f"codec.text: {folder}"):
        return kind.from_pretrained(str(folder), local_files_only=True)


def null_tokens(encoder: TextEncoder) -> bytes:
    """Embeddings of the empty prompt's `</s>` and of one padding token.

    They are float16 bytes, the manifest's format.
    """
    return encoder.encode_padded("", 2).half().numpy().tobytes()


def cut_null(null: Float[Tensor, "m e"], null_prompt: str, tokens: int) -> Float[Tensor, "_ e"]:
    """The null embeddings that replace a caption of `tokens` tokens.

    Used for a dropped caption and for the pass that guidance leads away from.
    """
    return null[:tokens] if null_prompt == "padded" else null
