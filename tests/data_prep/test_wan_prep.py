"""Real clips through `sora prep` with the networks of a small random WanPipeline; the pipeline is the oracle."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from wan_models import latents_by_diffusers, make_wan_pipeline, open_wan_pipeline

from data_prep.inspect.table import inspect
from data_prep.pipeline import prep
from sora_train.codec.conventions import clean
from sora_train.recipe import Recipe
from sora_train.schema import decode_rows, shard_files
from tests.data_prep.clip_files import plan_clips, read_clip

CLIPS = ("flower.mp4", "asl_eat.mkv", "asl_milk.mkv", "friday.mp4")


@pytest.mark.ray
def test_shards_hold_what_the_pipeline_would_make_of_real_clips(tmp_path: Path, shared: Path, local_ray):
    folder = make_wan_pipeline(tmp_path / "wan", "2.2", shared / "models" / "t5_tokenizer")
    with (shared / "data" / "clips" / "captions.csv").open(newline="") as file:
        captions = {row["video_file_name"]: row["prompt"] for row in csv.DictReader(file)}
    texts = {name: f"  {captions[name]} &amp;  more" for name in CLIPS}
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video_file_name", "prompt"), *texts.items()])
    data = {"captions": str(tmp_path / "captions.csv"), "root": str(shared / "data" / "clips"), "fps": 8}
    data |= {"output": str(tmp_path / "shards"), "buckets": ["9x64x96"]}
    codec = {"vae": str(folder), "text": str(folder), "text_precision": "fp32", "max_tokens": 512}
    model = {"family": "wan", "in_channels": 48, "text_width": 32, "init_from": str(folder)}
    recipe = Recipe.model_validate(
        {"name": "wan", "data": data, "codec": codec, "model": model, "cluster": {"address": "local"}}
    )
    manifest = prep(recipe)
    assert (manifest.vae.channels, manifest.vae.factor, manifest.vae.time_factor) == (48, 16, 4)
    assert (manifest.counts.written, manifest.text.caption_cleaning, manifest.text.width) == (len(CLIPS), "wan", 32)

    pipeline = open_wan_pipeline(folder)
    embeddings, null = pipeline.encode_prompt(list(texts.values()), max_sequence_length=512, device=torch.device("cpu"))
    assert null is not None
    expected = dict(zip(texts, embeddings, strict=True))
    (file,) = shard_files(str(tmp_path / "shards"))
    clips = decode_rows(pq.read_table(file), manifest, "9x64x96")
    assert sorted(clips.sources) == sorted(CLIPS)
    mean, std = (torch.tensor(values)[:, None, None] for values in (manifest.vae.mean, manifest.vae.std))
    for name, asked, stored, (embedding,) in zip(clips.sources, clips.captions, clips.latents, clips.text, strict=True):
        assert asked == [texts[name].strip()]  # not cleaned further: what was embedded is
        path = str(shared / "data" / "clips" / name)
        span = plan_clips(path, recipe.data, recipe.selection).spans[0]
        frames = torch.from_numpy(read_clip(path, span, recipe.data, recipe.selection, "").frames)
        latents = (torch.from_numpy(stored[0]).float() - mean) / std
        torch.testing.assert_close(latents, latents_by_diffusers(pipeline.vae, frames), atol=1e-2, rtol=1e-3)
        text = torch.from_numpy(embedding).float()
        assert len(text) == len(pipeline.tokenizer(clean(texts[name], "wan"))["input_ids"])
        torch.testing.assert_close(text, expected[name][: len(text)], atol=5e-3, rtol=1e-3)
        assert not expected[name][len(text) :].any()
    ours = torch.tensor(manifest.null_embedding("eos")).float()
    torch.testing.assert_close(ours, null[0, :1], atol=5e-3, rtol=1e-3)
    assert inspect(str(tmp_path / "shards"))["buckets"] == {"9x64x96": len(CLIPS)}
