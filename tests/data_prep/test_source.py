"""CSV to rows: what is wrong is said by name, once."""

from pathlib import Path

import pytest

from data_prep.buckets import Bucket
from data_prep.source import read_rows, sample_id
from sora_train.errors import RecipeError
from sora_train.recipe import DataConfig

BUCKET = Bucket(8, 32, 64, 8)


def rows_of(folder: Path, text: str | bytes):
    (folder / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(DataConfig(captions=str(folder / "captions.csv")), BUCKET)


def test_rows_are_found_beside_their_csv(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ä b.mp4").write_bytes(b"12345")
    (row,) = rows_of(tmp_path, '\ufeffprompt , other, video_file_name\n"two\nlines, ""quoted""",x,sub/ä b.mp4\n')
    assert (row.source, row.captions, row.size, row.reason) == ("sub/ä b.mp4", ('two\nlines, "quoted"',), 5, "")
    assert Path(row.path) == tmp_path / "sub" / "ä b.mp4"
    assert (row.start_s, row.end_s) == (0, 1)


def test_captions_may_be_named_by_a_uri(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("video_file_name,prompt\na.mp4,a caption\n")
    (row,) = read_rows(DataConfig(captions=(tmp_path / "captions.csv").as_uri()), BUCKET)
    assert (row.path, row.reason) == (str(tmp_path / "a.mp4"), "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../etc/passwd", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("sub/../../x.mp4", "outside_root"),
        ("s3://bucket/x.mp4", "outside_root"),
        ("..", "outside_root"),
        ("", "outside_root"),
        ("nope.mp4", "missing_file"),
        ("sub", "missing_file"),
        ("empty.mp4", "empty_file"),
        ("sub/../good.mp4", ""),
        ("..good.mp4", ""),
    ],
)
def test_a_file_that_can_not_be_had_has_its_reason(tmp_path: Path, name: str, reason: str):
    (tmp_path / "sub").mkdir()
    for file, content in (("empty.mp4", b""), ("good.mp4", b"x"), ("..good.mp4", b"x")):
        (tmp_path / file).write_bytes(content)
    (row,) = rows_of(tmp_path, f"video_file_name,prompt\n{name},a caption\n")
    assert row.reason == reason
    assert bool(row.message) == bool(reason)


def test_rows_without_a_caption_and_rows_twice_are_named_by_line(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = rows_of(tmp_path, "video_file_name,prompt\na.mp4,one\na.mp4,\na.mp4,two\na.mp4,one\na.mp4\n")
    assert [row.reason for row in rows] == ["", "no_caption", "", "duplicate_row", "no_caption"]
    assert rows[3].message.startswith("line 5 ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; its first line must be video_file_name,prompt"),
        ("video_file_name,prompt\n", "has a header but no rows"),
        ("file,text\na,b\n", "no column video_file_name and no prompt; its columns are file, text"),
        ("video_file_name,caption\na,b\n", "no column prompt; its columns are video_file_name, caption"),
        (b"video_file_name,prompt\na,\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_a_csv_that_is_no_good_says_what_is_wrong_with_it(tmp_path: Path, text: str | bytes, words: str):
    with pytest.raises(RecipeError, match=words) as error:
        rows_of(tmp_path, text)
    assert str(tmp_path / "captions.csv") in str(error.value)


def test_a_csv_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="nope.csv is no file"):
        read_rows(DataConfig(captions=str(tmp_path / "nope.csv")), BUCKET)
    with pytest.raises(RecipeError, match="data.captions is empty"):
        read_rows(DataConfig(), BUCKET)


def test_a_sample_id_depends_on_name_span_and_caption_and_on_nothing_else():
    assert sample_id("a.mp4", 0.0, 1.0, ("x",)) == "832108f3d6fa2a939d319b8ec7e75369"  # the same in every version
    ids = {
        sample_id(*a)
        for a in [("a", 0.0, 1.0, ("x",)), ("b", 0.0, 1.0, ("x",)), ("a", 1.0, 2.0, ("x",)), ("a", 0.0, 1.0, ("y",))]
    }
    assert len(ids) == 4
