"""Captions as WanPipeline cleans, cuts and embeds them; the pipeline itself is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from wan_models import TEXT_WIDTH, make_umt5

from data_prep.pipeline import encoding_hash
from sora_train.codec import BUILTIN, CodecConfig
from sora_train.codec.conventions import clean, cleaning_of, null_prompt_of
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.codec.text import CUTS_SHOWN, TextEncoder, load_text_encoder
from sora_train.errors import UserError
from sora_train.recipe import Recipe

ODD = [
    "", " ", "a  red\tcircle\n", "&amp;lt;b&amp;gt; &eacute;", "a\x1cb\x1f c\x85d\u3000e\xa0f", "\x1f\x1f x \x1d",
    "“curly” ‘quotes’ ｆｕｌｌ　ｗｉｄｔｈ", "caf&#233;&nbsp;&nbsp;noir", "UPPER stays",
    "a\u200bb\u2028c", "Ã©tÃ©", "猫が走る。",
]  # fmt: skip
CAPTIONS = [*ODD, "a red circle moving left", "a red circle " * 30, "end &amp; " * 400]


@pytest.fixture(scope="module", params=["built-in", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random UMT5 with a tokenizer of 326 tokens, or with T5's own of 32,100."""
    tokenizer = BUILTIN / "text"
    if request.param == "t5":
        tokenizer = request.getfixturevalue("shared") / "models" / "t5_tokenizer"
    return make_umt5(tmp_path_factory.mktemp("umt5"), tokenizer)


def open_encoder(folder: Path, max_tokens: int = 512, **options: Any) -> TextEncoder:
    return load_text_encoder(str(folder), max_tokens, cleaning="wan", **options)


def by_diffusers(encoder: TextEncoder, captions: list[str], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of captions and of the empty prompt `b l e`, as WanPipeline makes them."""
    parts: dict[str, Any] = {"tokenizer": encoder.tokenizer, "text_encoder": encoder.model}
    pipeline = WanPipeline(**parts, vae=None, scheduler=None, transformer=None)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        made, null = pipeline.encode_prompt(captions, max_sequence_length=most, device=torch.device("cpu"))
    assert null is not None
    return made, null


def test_captions_are_cleaned_as_the_pipeline_cleans_prompts():
    points = [chr(point) for point in (*range(0x3100), 0xFEFF, 0x1F98A) if not 0xD800 <= point < 0xE000]
    for caption in [*CAPTIONS, *(f"a{point} {point}b" for point in points)]:
        assert clean(caption, "wan") == prompt_clean(caption)
    assert clean(" A &amp;amp; b ", "none") == " A &amp;amp; b "


@pytest.mark.parametrize("most", [512, 20])
def test_embeddings_are_the_pipelines_without_its_zeros(folder: Path, most: int):
    encoder = open_encoder(folder, most)
    expected, null = by_diffusers(encoder, CAPTIONS, most)
    lengths = set()
    for whole, made in zip(expected, encoder.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(made, whole[: len(made)], atol=1e-5, rtol=1e-5)
        assert not whole[len(made) :].any()
        assert made.shape[1] == encoder.width == TEXT_WIDTH
        lengths.add(len(made))
    assert {1, most} < lengths
    ours = encoder.encode_null("", "eos")
    assert len(ours) == 1
    torch.testing.assert_close(ours, null[0, :1], atol=1e-5, rtol=1e-5)
    assert not null[0, 1:].any()


def test_bfloat16_is_the_pipelines_too(folder: Path):
    encoder = open_encoder(folder, dtype=torch.bfloat16)
    expected, _ = by_diffusers(encoder, CAPTIONS[-3:-1], 512)
    for whole, made in zip(expected, encoder.encode(CAPTIONS[-3:-1]), strict=True):
        torch.testing.assert_close(made, whole[: len(made)].float(), atol=0.05, rtol=0.05)


def test_what_is_cut_from_captions_is_shown_for_a_few(folder: Path):
    encoder = open_encoder(folder, 8)
    captions = [f"number {i} moves on and on and on past the limit of words, at last to {i}" for i in range(6)]
    encoder.encode(["a b", *captions])
    assert len(encoder.remarks) == CUTS_SHOWN
    assert encoder.cuts == len(captions)
    for i, remark in enumerate(encoder.remarks):
        assert "more than codec.max_tokens 8; not used: '" in remark
        assert f"to {i}'" in remark
    assert encoder.remarks[-1].endswith("later captions that are cut are not shown")
    assert encoder.cut_off("a b") == ""
    assert encoder.cut_off(captions[0]) in captions[0]


def test_an_encoder_is_found_in_a_pipeline_and_alone(folder: Path, tmp_path: Path):
    for part in ("text_encoder", "tokenizer"):
        for file in (folder / part).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    there, alone = find_text_encoder(str(folder)), find_text_encoder(str(tmp_path))
    assert (there.kind, there.width, there.hash) == ("UMT5EncoderModel", TEXT_WIDTH, alone.hash)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds a 'bert' model. Supported: t5, umt5"):
        find_text_encoder(str(tmp_path))


def test_weights_of_wan_bring_their_text_conventions(tmp_path: Path):
    auto, models = CodecConfig(), CodecConfig(models=str(tmp_path))
    inside = tmp_path / "acme--wan" / "transformer"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    for folder in (inside, inside.parent):
        assert (cleaning_of(auto, str(folder)), null_prompt_of(auto, str(folder))) == ("wan", "eos")
    assert cleaning_of(models, "acme/wan") == cleaning_of(models, "acme/wan@v1") == "wan"  # as sora download left it
    assert cleaning_of(auto, "acme/wan", "wan") == "wan"  # before it is fetched
    assert cleaning_of(auto, "acme/latte") == "lower"
    assert cleaning_of(CodecConfig(caption_cleaning="none"), str(inside)) == "none"


def test_an_encoding_is_another_one_with_another_cleaning(folder: Path):
    vae, text = find_vae("builtin"), find_text_encoder(str(folder))

    def key(cleaning: str) -> str:
        return encoding_hash(Recipe.model_validate({"codec": {"caption_cleaning": cleaning}}), vae, text)

    assert len({key(cleaning) for cleaning in ("none", "lower", "wan")}) == 3
    assert key("auto") == key("none")
