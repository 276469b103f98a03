"""`sora prep --plan` on files: headers opened here, on Ray and from afar, and a few clips measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import fs

from data_prep.estimate import probe as surveys
from data_prep.estimate.command import plan, show_plan
from data_prep.estimate.probe import ends_of
from data_prep.estimate.text import format_plan, judge
from data_prep.pipeline import encoding_hash, find_codec, prep
from data_prep.shards import ShardWriter
from data_prep.sources import read_rows
from sora_train.data.config import SelectionConfig
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import SHARD_SCHEMA, encode_row


def recipe(folder: Path, **data: object) -> Recipe:
    fixed = {"captions": str(folder / "captions.csv"), "output": str(folder / "shards"), "fps": 8.0}
    return Recipe.model_validate({"data": fixed | data})


def test_of_a_remote_file_both_ends_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = np.random.default_rng(0).integers(1, 255, 100_000, np.uint8).tobytes()
    (tmp_path / "a.mp4").write_bytes(content)
    monkeypatch.setattr(surveys, "END_BYTES", 1000)
    with ends_of(fs.LocalFileSystem(), str(tmp_path / "a.mp4"), len(content)) as copy:
        got = Path(copy).read_bytes()
    assert len(got) == len(content)
    assert (got[:1000], got[-1000:]) == (content[:1000], content[-1000:])
    assert not any(got[1000:-1000])
    assert not Path(copy).exists()


def test_a_remote_videos_ends_say_what_the_whole_says(shared: Path, monkeypatch: pytest.MonkeyPatch):
    clips = shared / "data" / "clips"
    data = recipe(clips, stride_s=1.0).data
    opener = surveys.Opener(str(clips), data, SelectionConfig())
    names = ("bbb_0_30.webm", "intel_car.mp4", "intel_bolt.gif")
    paths = {str(clips / name): (clips / name).stat().st_size for name in names}
    whole = [opener.look(path, size) for path, size in paths.items()]
    opener.system = fs.SubTreeFileSystem("/", fs.LocalFileSystem())  # as good as remote: no local paths
    monkeypatch.setattr(surveys, "WHOLE_BYTES", 0)
    monkeypatch.setattr(surveys, "END_BYTES", 2**17)
    assert [opener.look(path, size) for path, size in paths.items()] == whole
    assert all(look.clips for look in whole)
    opener.decoder.close()


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
    found = plan(wanted)
    assert {bucket.name: bucket.clips for bucket in found.buckets} == {
        "8x32x64": 3, "8x64x32": 3, "1x64x64": 1, "8x128x128": 0,
    }  # fmt: skip
    assert {drop.reason: drop.rows for drop in found.dropped} == {"too_short": 1, "unreadable": 1, "missing_file": 1}
    assert found.work is not None
    assert found.work.measured.clips == 3
    assert found.work.vae > 0
    text = format_plan(found)
    assert "work, 3 clips measured" in text
    assert not (folder / "shards").exists()
    with pytest.raises(UserError, match="2 of 6 sources"):
        judge(found, wanted.data)
    data = wanted.data.model_copy(update={"max_bad_fraction": 0.5})
    with pytest.raises(RecipeError, match="no clip fills 8x128x128"):
        judge(found, data)


def test_the_table_is_shown_before_the_error(folder: Path, capsys: pytest.CaptureFixture[str]):
    wanted = recipe(folder, frames=800, height=32, width=64, max_bad_fraction=0.5)
    with pytest.raises(UserError, match=r"no clip in 6 rows: 4 too_short"):
        show_plan(wanted)
    assert "800x32x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"height": 64}, "holds clips of 8x32x64 and the recipe asks for 8x64x64; set data.output to another folder"),
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
    writer = ShardWriter(made.data.output, "8x32x64", encoding_hash(made, *find_codec(made)))
    writer.add(pa.Table.from_pylist([clip], SHARD_SCHEMA))
    writer.close()
    for command in (plan, prep):
        with pytest.raises(UserError, match=says):
            command(recipe(folder, **settings | other))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_and_threads_find_the_same(folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch):
    data = recipe(folder, frames=8, height=32, width=64).data
    asked = read_rows(data)
    here = surveys.survey(asked, data, SelectionConfig())
    monkeypatch.setattr(surveys, "HERE", 0)
    assert surveys.is_large(asked, data)
    assert surveys.survey(asked, data, SelectionConfig(), "local") == here
