"""The whole pipeline with videos, captions and shards on an S3-compatible server."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline import prep
from sora_train.codec import CodecConfig
from sora_train.data.config import DataConfig
from sora_train.data.shards import ShardSet
from sora_train.recipe import Recipe
from sora_train.storage import atomic_write, resolve
from sora_train.workers import ClusterConfig


@pytest.mark.slow
@pytest.mark.ray
def test_videos_on_s3_become_shards_on_s3(tmp_path: Path, write, s3: str, one_ray):
    one_ray.stop()  # workers must inherit the address of the server
    system, bucket = resolve(s3)
    lines = ["video_file_name,prompt"]
    for i in range(3):
        atomic_write(system, f"{bucket}/videos/{i}.mp4", write(tmp_path / f"{i}.mp4", np.arange(36) / 30).read_bytes())
        lines.append(f"{i}.mp4,clip {i}")
    atomic_write(system, f"{bucket}/videos/captions.csv", "\n".join([*lines, "gone.mp4,nothing"]).encode())
    made = Recipe(
        data=DataConfig(
            captions=f"{s3}/videos/captions.csv", output=f"{s3}/shards", frames=4, fps=4.0, height=64, width=64,
            max_bad_fraction=0.3,
        ),
        codec=CodecConfig(precision="fp32", text_precision="fp32"),
        cluster=ClusterConfig(address="local"),
    )  # fmt: skip

    manifest = prep(made)

    assert manifest.counts.model_dump() == {"asked": 4, "written": 3, "quarantined": 1, "filtered": 0}
    assert manifest.reasons == {"missing_file": 1}
    assert ShardSet(f"{s3}/shards").rows == {"4x64x64": 3}
    assert prep(made) == manifest
