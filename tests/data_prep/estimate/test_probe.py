"""`sora prep --plan` on files: headers of a sample opened, and a few clips measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.estimate.estimate import estimate_prep
from data_prep.estimate.probe import probe_files
from data_prep.estimate.table import check_estimate, format_estimate, show_plan
from data_prep.pipeline import encoding_hash, find_codec, prep
from data_prep.shards import shard_name, write_shard
from data_prep.sources import read_rows
from sora_train.data.config import SelectionConfig
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import SHARD_SCHEMA, encode_row
from sora_train.storage import resolve


def recipe(folder: Path, **data: object) -> Recipe:
    fixed = {"captions": str(folder / "captions.csv"), "output": str(folder / "shards"), "fps": 8.0}
    return Recipe.model_validate({"data": fixed | data})


def test_large_sets_are_sampled_evenly(folder: Path, monkeypatch: pytest.MonkeyPatch):
    data = recipe(folder, frames=8, height=32, width=64).data
    asked = [row for row in read_rows(data) if not row.reason]
    every = probe_files(asked, data, SelectionConfig())
    assert len(every) == 5
    monkeypatch.setattr("data_prep.estimate.probe.MAX_FILES", 2)
    assert probe_files(asked, data, SelectionConfig()).items() < every.items()


@pytest.fixture
def folder(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """A wide and a tall video of 3 s, one of 0.2 s, a picture, and bytes that are none of them."""
    write(tmp_path / "wide.mp4", np.arange(40) / 12, size=(128, 64))
    write(tmp_path / "tall.mp4", np.arange(40) / 12, size=(64, 128))
    write(tmp_path / "short.mp4", np.arange(3) / 12)
    Image.new("RGB", (96, 96), "red").save(tmp_path / "still.png")
    (tmp_path / "junk.mp4").write_bytes(b"no video" * 100)
    names = ("wide.mp4", "tall.mp4", "short.mp4", "still.png", "junk.mp4", "none.mp4")
    lines = [f"{name},a thing called {name}" for name in names]
    (tmp_path / "captions.csv").write_text("\n".join(["video_file_name,prompt", *lines]))
    return tmp_path


def test_a_plan_of_files_counts_their_clips_and_measures_a_few(folder: Path):
    buckets = ["8x32x64", "8x64x32", "1x64x64", "8x128x128"]
    wanted = recipe(folder, buckets=buckets, stride_s=1.0, max_enlarge=1.0)
    found = estimate_prep(wanted)
    assert {bucket.name: bucket.clips for bucket in found.buckets} == {
        "8x32x64": 3, "8x64x32": 3, "1x64x64": 1, "8x128x128": 0,
    }  # fmt: skip
    assert {reason: rows for reason, (rows, _) in found.dropped.items()} == {
        "too_short": 1,
        "unreadable": 1,
        "missing_file": 1,
    }
    assert found.measured is not None
    assert found.measured.clips == 3
    assert found.measured.vae_s > 0
    text = format_estimate(found, wanted)
    assert "work, 3 clips measured" in text
    assert not (folder / "shards").exists()
    with pytest.raises(UserError, match="2 of 6 sources"):
        check_estimate(found, wanted.data)
    data = wanted.data.model_copy(update={"max_bad_fraction": 0.5})
    with pytest.raises(RecipeError, match="no clip fills 8x128x128"):
        check_estimate(found, data)


def test_the_table_is_shown_before_the_error(folder: Path, capsys: pytest.CaptureFixture[str]):
    wanted = recipe(folder, frames=800, height=32, width=64, max_bad_fraction=0.5)
    with pytest.raises(UserError, match=r"no clip in 6 rows: 4 too_short"):
        show_plan(wanted)
    assert "800x32x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"height": 64}, "holds clips of 8x32x64; the recipe asks for 8x64x64. Set data.output to another folder"),
        ({"fps": 5.0}, "holds shards of another encoding .*set data.output to another folder"),
    ],
)
def test_the_plan_refuses_what_prep_refuses(folder: Path, other: dict[str, float], says: str):
    settings = {"frames": 8, "height": 32, "width": 64, "max_bad_fraction": 0.5}
    made = recipe(folder, **settings)
    clip = encode_row(
        sample_id="0", source="wide.mp4", source_size=1, source_version="v", content_hash="", start_s=0.0, end_s=1.0,
        captions=["x"], latents=np.zeros((1, 8, 4, 4, 8)), text=[np.zeros((1, 64))],
    )  # fmt: skip
    system, path = resolve(made.data.output)
    key = encoding_hash(made, *find_codec(made))
    write_shard(system, f"{path}/bucket=8x32x64/{shard_name(0)}", key, [pa.Table.from_pylist([clip], SHARD_SCHEMA)])
    for command in (estimate_prep, prep):
        with pytest.raises(UserError, match=says):
            command(recipe(folder, **settings | other))
