"""Makes the built-in text encoder, a small frozen T5 with random weights.

Usage: `python -m tools.make_text_encoder`.

The encoder has the same classes and files as a large T5. Random weights suffice for the demo's captions: its words get
orthogonal embeddings, so a model can tell every caption from every other. The vocabulary has the demo's words, letters,
and all 256 bytes, so any other caption has its own tokens too. The weights are files in the repository, because another
version may draw other numbers from the same seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from sora_train.codec import BUILTIN
from sora_train.quickstart.shapes import all_scenes

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def demo_words() -> list[str]:
    """The words of the demo's captions, in order of appearance."""
    return list(dict.fromkeys(word for scene in all_scenes() for word in scene.caption.split()))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that prefers the demo's words, then letters, then bytes.

    Every text ends in `</s>`.
    """
    words = [("▁" + word, -1.0) for word in demo_words()]
    taken = {piece for piece, _ in words}
    letters = [(piece, -10.0) for c in ascii_lowercase for piece in ("▁" + c, c) if piece not in taken]
    special = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, -100.0)]
    byte_pieces = [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    pieces = [*special, *words, *letters, ("▁", -10.0), *byte_pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace("<0x", "＜0x")  # else "<0x41>" in a caption would be the byte 0x41
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def make_encoder(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> T5EncoderModel:
    """A T5 encoder of width 64 with random weights.

    A token keeps most of its own embedding and takes some of its neighbours'.
    """
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1,  # the indices in `special`
    )  # fmt: skip
    encoder = T5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.ndim == 1:  # norms stay at 1, so every output token has a root mean square of 1
                continue
            fan_in = weight.shape[1]
            scale = 1.0 if "shared" in name else 0.5 if "relative_attention_bias" in name else 0.5 * fan_in**-0.5
            weight.normal_(0, scale, generator=generator)
        words = [tokenizer.get_vocab()["▁" + word] for word in demo_words()]
        rows = torch.linalg.qr(torch.randn(64, len(words), generator=generator)).Q.T
        encoder.shared.weight[words] = rows * 64**0.5
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default=str(BUILTIN / "text"), help="folder to write, in transformers' format")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(args.to)
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, args.seed)
    tokenizer.save_pretrained(folder)
    encoder.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that only the owner may read
    size = sum(path.stat().st_size for path in folder.iterdir())
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"{folder}: {len(tokenizer)} pieces, {parameters} parameters, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
