"""Captions to embeddings: any caption keeps its own tokens, and padding never shows."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from sora_train.codec import BUILTIN
from sora_train.codec.text import TextEncoder, load_text_encoder, load_tokenizer
from sora_train.errors import UserError
from sora_train.quickstart.shapes import all_scenes
from tools.make_text_encoder import make_tokenizer

ODD = [
    "a", "A", "red", "Red", "réd", "a fox", "a 🦊", "a 🦋", "猫", "犬", "100 % blue",
    "a red circle moving left, slowly",
    "a red  circle", "a redder circle", "кошка", "مربع أحمر", "\u200b", "<0x41>", "a\nb",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder("builtin")


def test_every_caption_has_tokens_of_its_own(encoder: TextEncoder):
    captions = [scene.caption for scene in all_scenes()] + ODD
    tokens = [tuple(ids) for ids in encoder.tokenizer(captions)["input_ids"]]
    assert len(set(tokens)) == len(captions)
    unknown = encoder.tokenizer.convert_tokens_to_ids("<unk>")
    assert not any(unknown in ids for ids in tokens)


def test_captions_of_the_demo_are_a_token_a_word(encoder: TextEncoder):
    assert {len(e) for e in encoder.encode([scene.caption for scene in all_scenes()])} == {6}


def test_embeddings_of_captions_lie_apart(encoder: TextEncoder):
    captions = [scene.caption for scene in all_scenes()]
    pooled = torch.stack([e.mean(0) for e in encoder.encode(captions)])
    distances = torch.cdist(pooled, pooled)[torch.triu_indices(72, 72, 1).unbind()]
    assert distances.min() > 1  # one word in six differs: sqrt(2 * 64) / 6 = 1.9 for orthogonal words of rms 1


def test_a_words_embedding_is_nearest_to_the_same_word_elsewhere(encoder: TextEncoder):
    captions = [scene.caption for scene in all_scenes()]
    embeddings = dict(zip(captions, encoder.encode(captions), strict=True))
    for a, b in combinations(embeddings, 2):
        for place, (word, other) in enumerate(zip(a.split(), b.split(), strict=True)):
            alike = torch.cosine_similarity(embeddings[a][place], embeddings[b][place], dim=0)
            assert (alike > 0.9) if word == other else (alike < 0.5)


def test_a_caption_is_encoded_the_same_alone_and_in_a_batch_of_longer_ones(encoder: TextEncoder):
    together = load_text_encoder("builtin")
    together.one_by_one = False  # as on a GPU
    captions = ["a red circle moving left", "", "a much longer caption than the others", *ODD]
    for caption, embedding in zip(captions, together.encode(captions), strict=True):
        torch.testing.assert_close(embedding, encoder.encode([caption])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_an_embedding_does_not_depend_on_its_batch_by_a_bit(dtype: torch.dtype):
    exact = load_text_encoder("builtin", dtype=dtype)
    captions = [scene.caption for scene in all_scenes()] + ODD
    for caption, embedding in zip(captions, exact.encode(captions), strict=True):
        assert torch.equal(embedding, exact.encode([caption])[0])


def test_the_empty_caption_is_one_token(encoder: TextEncoder):
    assert encoder.encode([""])[0].shape == (1, 64)


def test_a_long_caption_is_cut_and_keeps_its_end_token(encoder: TextEncoder):
    long = load_text_encoder("builtin", max_tokens=5)
    assert long.encode(["red blue green white up down left"])[0].shape == (5, 64)
    assert long.tokenizer("red " * 9, truncation=True, max_length=5)["input_ids"][-1] == 1


def test_the_committed_tokenizer_is_the_one_that_the_script_makes():
    assert make_tokenizer().get_vocab() == load_tokenizer(BUILTIN / "text").get_vocab()


def test_t5s_own_tokenizer_gives_its_published_pieces(shared: Path):
    tokenizer = load_tokenizer(shared / "models" / "t5_tokenizer")
    ids = tokenizer("translate English to German: That is good.")["input_ids"]
    assert ids == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]  # T5's documentation
    assert tokenizer("")["input_ids"] == [1]


def test_float16_is_refused():
    with pytest.raises(ValueError, match="overflows"):
        load_text_encoder("builtin", dtype=torch.float16)


def test_bfloat16_is_close_to_float32(encoder: TextEncoder):
    a = load_text_encoder("builtin", dtype=torch.bfloat16).encode(["a red circle moving left"])[0]
    b = encoder.encode(["a red circle moving left"])[0]
    assert torch.cosine_similarity(a, b, dim=1).min() > 0.999


@pytest.mark.parametrize("name", ["{folder}/no/such/folder", "./nowhere", "no-such-owner-q8x/no-such-model"])
def test_what_can_not_be_had_is_named_with_the_key_and_a_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="codec.text.*builtin"):
        load_text_encoder(name.format(folder=tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((BUILTIN / "text" / file).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no safetensors.*save_pretrained"):
        load_text_encoder(str(tmp_path))


def test_a_pipelines_folder_is_searched_for_its_parts(tmp_path: Path, encoder: TextEncoder):
    for part, files in {
        "text_encoder": ["config.json", "model.safetensors"],
        "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    }.items():
        (tmp_path / part).mkdir()
        for file in files:
            (tmp_path / part / file).write_bytes((BUILTIN / "text" / file).read_bytes())
    other = load_text_encoder(str(tmp_path))
    assert other.hash == encoder.hash
    torch.testing.assert_close(other.encode(["red"])[0], encoder.encode(["red"])[0])
