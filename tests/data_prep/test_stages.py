"""A clip that a network can't encode costs only itself; a lost device costs none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_prep.compare import NO_PROGRESS
from data_prep.reasons import remark_kinds
from data_prep.resume import reconcile
from data_prep.schemas import DECODED, END_OF_SOURCE, WITH_LATENTS
from data_prep.sink import ShardSink
from data_prep.sources import SourceRows
from data_prep.stages import EmbedText, EncodeVideo, run_batch
from data_prep.stats import PrepStats
from data_prep.stored import NO_CLIPS
from data_prep.watchdog import DeviceLost
from data_prep.writers import facts_of
from sora_train.codec import CodecConfig
from sora_train.codec.text import load_text_encoder
from sora_train.data.config import DataConfig
from sora_train.errors import UserError
from sora_train.recipe import Recipe

CODEC = CodecConfig(precision="fp32", text_precision="fp32", caption_cleaning="none")


class Short:
    """Stands before a network and has no memory for inputs of more than `most` values."""

    def __init__(self, network: torch.nn.Module, most: int):
        self.network, self.most = network, most
        self.device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, **options: torch.Tensor):
        if input_ids.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.network(input_ids=input_ids, **options)


def row(sample: str, captions: Sequence[str], **more: object) -> dict:
    known = {"row_id": sample, "source": f"{sample}.mp4", "source_size": 1, "source_version": "v", "sample_id": sample}
    times = {"start_s": 0.0, "end_s": 1.0, "content_hash": "", "perceptual_hash": ""}
    empty = {"reason": "", "message": "", "remark": "", "note": "", "asked": []}
    return known | times | empty | {"captions": list(captions), "bucket": "4x16x16"} | more


def test_a_caption_that_needs_too_much_memory_costs_one_clip():
    stage = EmbedText(CODEC, {"4x16x16": (1, 4, 4, 2, 2)}, 32, 1, "cpu")
    stage.encoder.model = Short(stage.encoder.model, most=12)
    latents = np.zeros((1, 4, 4, 2, 2), np.float32).tobytes()
    long = "a very long caption " * 5
    rows = [row(name, captions, latents=latents) for name, captions in
            {"a": ["a dog"], "b": ["a cat", long], "c": [long], "d": ["a dog"]}.items()]  # fmt: skip
    made = stage(pa.Table.from_pylist(rows, WITH_LATENTS)).to_pylist()
    assert [clip["reason"] for clip in made] == ["", "encode_failed", "encode_failed", ""]
    assert made[1]["message"].startswith("text encoder: CUDA out of memory")
    expected = load_text_encoder("builtin").encode(["a dog"])[0].numpy().astype(np.float16)
    np.testing.assert_allclose(np.frombuffer(made[3]["text"][0], np.float16).reshape(expected.shape), expected)


def test_a_source_ends_with_a_remark_on_its_long_caption():
    codec = CODEC.model_copy(update={"max_tokens": 5})
    stage = EmbedText(codec, {"4x16x16": (1, 4, 4, 2, 2)}, 32, 1, "cpu")
    short, long = "a red circle", "a red circle moving left and up"
    latents = np.zeros((1, 4, 4, 2, 2), np.float32).tobytes()
    ends = [row(name, [name], reason=END_OF_SOURCE, remark=remark) for name, remark in ((short, ""), (long, "hdr: x"))]
    made = stage(pa.Table.from_pylist([row("b", [long], latents=latents), *ends], WITH_LATENTS)).to_pylist()
    assert [remark_kinds(each["remark"] or "") for each in made] == [[], [], ["hdr", "long_caption"]]
    assert "codec.max_tokens 5; not used: 'left and up'" in made[0]["note"]
    assert made[0]["tokens"] == [5]


def test_a_clip_that_the_vae_fails_on_costs_only_itself():
    stage = EncodeVideo(CODEC, 1, "cpu")
    encode = stage.vae.model.encode

    def picky(x: torch.Tensor):
        if x.max() == 1:  # white
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        return encode(x)

    stage.vae.model.encode = picky
    grey = {"a": 99, "b": 255, "c": 99}
    rows = [row(name, ["x"], frames=np.full((4, 16, 16, 3), value, np.uint8).tobytes()) for name, value in grey.items()]
    made = stage(pa.Table.from_pylist(rows, DECODED)).to_pylist()
    assert [clip["reason"] for clip in made] == ["", "encode_failed", ""]
    assert made[1]["message"] == "VAE: CUDNN_STATUS_NOT_SUPPORTED"
    assert made[0]["latents"] == made[2]["latents"]


def test_latents_beyond_float16_cost_their_own_clip():
    stage = EncodeVideo(CODEC, 1, "cpu")
    random = np.random.default_rng(0)
    clips = [np.full((4, 16, 16, 3), 99, np.uint8), random.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)]
    grey, noise = (float(abs(mean).max()) for mean in stage.vae.encode(torch.from_numpy(np.stack(clips)))[:, 0])
    assert noise > 1.2 * grey
    last = stage.vae.model.quant_conv
    with torch.no_grad():
        for parameter in last.parameters():  # all that follows it is the mean itself
            parameter.mul_(np.finfo(np.float16).max / (noise * grey) ** 0.5)
    rows = [row(name, ["x"], frames=clip.tobytes()) for name, clip in zip("ab", clips, strict=True)]
    encoded = stage(pa.Table.from_pylist(rows, DECODED))
    made = EmbedText(CODEC, {"4x16x16": (2, 4, 4, 2, 2)}, 32, 1, "cpu")(encoded).to_pylist()
    assert [clip["reason"] for clip in made] == ["", "not_finite"]
    assert made[1]["message"] == "b.mp4: latents are not finite in float16"
    assert made[1]["latents"] is None


def test_a_vae_that_gives_nan_makes_every_clip_not_finite():
    stage = EncodeVideo(CODEC, 1, "cpu")
    with torch.no_grad():
        stage.vae.model.quant_conv.bias[0] = torch.nan
    clip = np.full((4, 16, 16, 3), 99, np.uint8)
    encoded = stage(pa.Table.from_pylist([row(name, ["x"], frames=clip.tobytes()) for name in "ab"], DECODED))
    made = EmbedText(CODEC, {"4x16x16": (2, 4, 4, 2, 2)}, 32, 1, "cpu")(encoded).to_pylist()
    assert [clip["reason"] for clip in made] == ["not_finite"] * 2


def test_a_worker_that_can_not_start_ends_prep_with_one_message(tmp_path: Path):
    codec, shapes = CODEC.model_copy(update={"vae": str(tmp_path / "none")}), {"4x16x16": (2, 4, 4, 2, 2)}
    frames = np.zeros((4, 16, 16, 3), np.uint8).tobytes()
    rows = pa.Table.from_pylist([row(name, ["x"], frames=frames) for name in "ab"], DECODED)
    made = EmbedText(CODEC, shapes, 32, 1, "cpu")(EncodeVideo(codec, 1, "cpu")(rows))
    recipe = Recipe(data=DataConfig(output=str(tmp_path / "shards")))
    sink = ShardSink(
        recipe, "", "", reconcile(recipe.data, SourceRows.of([]), NO_CLIPS, NO_PROGRESS, PrepStats(2, 0.5, ""))
    )
    with pytest.raises(UserError, match=r"codec\.vae: no folder '.*none'"):
        sink.consume(facts_of(made), None)
    (failed,) = EncodeVideo(CODEC, 0, "cpu")(rows).to_pylist()
    assert failed["message"].startswith("a worker of prep (EncodeVideo) can't start: RuntimeError: set_num_threads")


def broken(items: list[int]) -> list[int]:
    if 3 in items:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return [2 * item for item in items]


def test_an_error_costs_one_item_while_the_device_works():
    assert run_batch(broken, [1, 2, 3, 4], "VAE", "cpu") == [
        2, 4, "VAE: CUDA error: an illegal memory access was encountered", 8,
    ]  # fmt: skip


def test_a_lost_device_costs_no_clip():
    with pytest.raises(DeviceLost, match="VAE: meta no longer works: CUDA error: an illegal memory access"):
        run_batch(broken, [1, 2, 3, 4], "VAE", "meta")  # torch's device without memory: nothing can be read from it
