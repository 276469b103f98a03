"""The parts of the page of `sora inspect --html`, by arithmetic: which clips, how good, how large, how many."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.inspect.previews import clip_images, read_rows_at
from data_prep.inspect.table import read_inventory


def test_rows_are_read_by_their_index_in_the_bucket(tiny_shards: Path):
    """Its row groups hold 8, 8 and 5 rows."""
    inventory = read_inventory(str(tiny_shards))
    for places in ([0], [7, 8], [3, 15, 16, 20], list(range(21))):
        assert [row["sample_id"] for row in read_rows_at(inventory, "2x32x32", places)] == [f"{i:04x}" for i in places]


def test_an_animation_keeps_time():
    clip = np.random.default_rng(0).integers(0, 255, (80, 48, 96, 3), np.uint8)
    moving, strip = clip_images([clip, clip], fps=16.0)
    assert strip.startswith("data:image/webp")
    image = Image.open(io.BytesIO(base64.b64decode(moving.partition(",")[2])))
    durations = []
    for frame in range(image.n_frames):
        image.seek(frame)
        image.load()
        durations.append(image.info["duration"])
    assert np.isclose(sum(durations), 80 / 16 * 1000, rtol=0.05)
    assert len(clip_images([clip[:1]], fps=16.0)) == 1
