"""Captions to rows; every error names its line or file."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import sources
from data_prep.lookup import data_root
from data_prep.sources import SourceRow, row_id, sample_id
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError


def read_rows(data: DataConfig) -> list[SourceRow]:
    return list(sources.read_rows(data))


def rows_of(folder: Path, text: str | bytes):
    (folder / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(DataConfig(captions=str(folder / "captions.csv")))


def test_files_are_found_next_to_their_csv(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ä b.mp4").write_bytes(b"12345")
    (row,) = rows_of(tmp_path, '\ufeffprompt , other, video_file_name\n"two\nlines, ""quoted""",x,sub/ä b.mp4\n')
    assert (row.source, row.captions, row.size, row.reason) == ("sub/ä b.mp4", ('two\nlines, "quoted"',), 5, "")
    assert Path(row.path) == tmp_path / "sub" / "ä b.mp4"
    assert row.row_id == row_id(row.source, row.captions)


def test_captions_may_be_named_by_a_uri(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("video_file_name,prompt\na.mp4,a caption\n")
    (row,) = read_rows(DataConfig(captions=(tmp_path / "captions.csv").as_uri()))
    assert (row.path, row.reason) == (str(tmp_path / "a.mp4"), "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../etc/passwd", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("sub/../../x.mp4", "outside_root"),
        ("s3://bucket/x.mp4", "outside_root"),
        ("..", "outside_root"),
        ("..\\..\\x.mp4", "outside_root"),
        ("sub\\..\\..\\x.mp4", "outside_root"),
        ("C:\\x.mp4", "outside_root"),
        ("\\\\server\\x.mp4", "outside_root"),
        ("sub\\good.mp4", "missing_file"),
        ("n" * 300, "missing_file"),
        ("good.mp4/x.mp4", "missing_file"),
        ("", "outside_root"),
        ("nope.mp4", "missing_file"),
        ("sub", "missing_file"),
        ("empty.mp4", "empty_file"),
        ("sub/../good.mp4", ""),
        ("..good.mp4", ""),
    ],
)
def test_an_unusable_file_has_a_reason(tmp_path: Path, name: str, reason: str):
    (tmp_path / "sub").mkdir()
    for file, content in (("empty.mp4", b""), ("good.mp4", b"x"), ("..good.mp4", b"x")):
        (tmp_path / file).write_bytes(content)
    (row,) = rows_of(tmp_path, f"video_file_name,prompt\n{name},a caption\n")
    assert row.reason == reason
    assert bool(row.message) == bool(reason)
    assert reason != "outside_root" or not name or repr(name) in row.message


def test_missing_captions_and_repeated_rows_name_their_line(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = rows_of(tmp_path, "video_file_name,prompt\na.mp4,one\na.mp4,\na.mp4,two\na.mp4,one\na.mp4\n")
    assert [row.reason for row in rows] == ["", "no_caption", "", "duplicate_row", "no_caption"]
    assert rows[3].message.startswith("line 5 ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; its first line must be video_file_name,prompt"),
        ("\n\n", "is empty; its first line must be video_file_name,prompt"),
        ("video_file_name,prompt\n\n", "has no rows"),
        ("video_file_name,prompt,prompt\na,b,c\n", "has the column prompt twice"),
        (
            "video_file_name,prompt\na.mp4,a dog, running\n",
            "line 2: 3 cells, but the header has 2. Put a caption with a comma",
        ),
        ('video_file_name,prompt\na,"b\n\nb"\nb,"c\nc,d\n', "line 5: a quotation mark is never closed"),
        ("file,text\na,b\n", "no column video_file_name and no prompt; the header, its first line, is file, text"),
        ("video_file_name,caption\na,b\n", "no column prompt; its columns are video_file_name, caption"),
        (b"video_file_name,prompt\na,\xff\xfe\n", "is not UTF-8 text in line 2 .byte 0xff."),
    ],
)
def test_an_invalid_csv_says_what_is_wrong(tmp_path: Path, text: str | bytes, words: str):
    with pytest.raises(RecipeError, match=words) as error:
        rows_of(tmp_path, text)
    assert str(tmp_path / "captions.csv") in str(error.value)


def test_a_missing_csv_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="nope.csv is not a file"):
        read_rows(DataConfig(captions=str(tmp_path / "nope.csv")))
    with pytest.raises(RecipeError, match="data.captions is empty"):
        read_rows(DataConfig())


def test_a_line_is_counted_as_an_editor_counts_them(tmp_path: Path):
    rows = rows_of(tmp_path, 'video_file_name,prompt\r\n\r\na.mp4,"one\r\ntwo"\r\nb.mp4,\r\nc.mp4,a 5" nail,,\r\n')
    assert rows[0].captions == ("one\r\ntwo",)
    assert rows[1].message.startswith("line 5 ")
    assert rows[2].captions == ('a 5" nail',)


def test_columns_may_have_other_names(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "c.tsv").write_text("text,file,video_file_name\nwords,a.mp4,b.mp4\n")
    data = DataConfig(captions=str(tmp_path / "c.tsv"), file_column="file", caption_column="text")
    (row,) = read_rows(data)
    assert (row.source, row.captions, row.reason) == ("a.mp4", ("words",), "")


TABLE = [
    {"video_file_name": "a.mp4", "prompt": ["one", "", "two"]},
    {"video_file_name": " b.mp4", "prompt": [" line\nbreak "]},
    {"video_file_name": "c.mp4", "prompt": ["", " "]},
    {"video_file_name": "c.mp4", "prompt": []},
    {"video_file_name": "d.mp4", "prompt": None},
    {"video_file_name": "./a.mp4", "prompt": ["one", None, "two", "nan"]},
    {"video_file_name": "a.mp4", "prompt": ["one"]},
]


@pytest.mark.parametrize("name", ["c.jsonl", "c.NDJSON", "c.jsonl.gz", "c.parquet", "c.PQ"])
def test_lists_of_captions_are_the_same_in_json_and_parquet(tmp_path: Path, name: str):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    text = "\n".join(json.dumps(line | {"other": 1}) for line in TABLE).encode()
    if name.lower().endswith((".parquet", ".pq")):
        pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text + b"\n\n")
    rows = read_rows(DataConfig(captions=str(tmp_path / name)))
    assert [(row.source, row.captions, row.reason) for row in rows] == [
        ("a.mp4", ("one", "two"), ""),
        ("b.mp4", ("line\nbreak",), ""),
        ("c.mp4", (), "no_caption"),
        ("c.mp4", (), "no_caption"),
        ("d.mp4", (), "no_caption"),
        ("a.mp4", ("one", "two"), "duplicate_row"),
        ("a.mp4", ("one",), ""),
    ]
    assert rows[2].message.startswith("row 3 " if ".p" in name.lower() else "line 3 ")
    assert rows[0].row_id == row_id("a.mp4", ("one", "two")) != rows[6].row_id


def test_a_single_caption_is_the_same_in_all_formats(tmp_path: Path):
    table = [{"video_file_name": "a.mp4", "prompt": 'a "b", c'}, {"video_file_name": "b.mp4", "prompt": None}]
    (tmp_path / "c.csv").write_text('video_file_name,prompt\na.mp4,"a ""b"", c"\nb.mp4,\n')
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(line) for line in table))
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "c.parquet")
    (tmp_path / "a.mp4").write_bytes(b"x")
    read = [read_rows(DataConfig(captions=str(tmp_path / f"c.{end}"))) for end in ("csv", "jsonl", "parquet")]
    assert [(row.row_id, row.captions, row.reason, row.version) for row in read[0]] == [
        (row.row_id, row.captions, row.reason, row.version) for row in read[1]
    ]
    assert [(row.row_id, row.reason) for row in read[1]] == [(row.row_id, row.reason) for row in read[2]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON .* write one object per line, such as"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1, 2]", r"line 2 is \[1, 2\], not an object"),
        ("null", "line 2 is None, not an object"),
        ('{"video_file_name": 5, "prompt": "x"}', "line 2: the file name is 5, not text"),
        ('{"video_file_name": null, "prompt": "x"}', "line 2: the file name is None, not text"),
        ('{"video_file_name": "a", "prompt": 1.5}', "line 2: the caption is 1.5, not text"),
        ('{"video_file_name": "a", "prompt": {"en": "x"}}', "line 2: the caption is {'en': 'x'}, not text"),
        ('{"video_file_name": NaN, "prompt": "x"}', "line 2: the file name is nan, not text"),
        ('{"video_file_name": "a", "prompt": "x\\u0000"}', "line 2: the caption .* has a NUL character"),
        ('{"video_file_name": "a", "prompt": [["x"]]}', r"line 2: the caption is \['x'\], not text"),
        ('{"video_file_name": "a", "prompt": "\\ud800"}', "line 2: the caption '.ud800' has half of a surrogate pair"),
        ('{"file": "a", "prompt": "x"}', "line 2 has no column video_file_name; its columns are file, prompt"),
    ],
)
def test_an_invalid_line_of_json_is_named(tmp_path: Path, line: str, words: str):
    (tmp_path / "c.jsonl").write_text('{"video_file_name": "a.mp4", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=words) as error:
        read_rows(DataConfig(captions=str(tmp_path / "c.jsonl")))
    assert str(tmp_path / "c.jsonl") in str(error.value)


def test_a_column_that_no_line_has_is_named(tmp_path: Path):
    (tmp_path / "c.jsonl").write_text('{"video_file_name": "a.mp4", "caption": "x"}\n')
    with pytest.raises(RecipeError, match="no column prompt; its columns are video_file_name, caption; .*caption_col"):
        read_rows(DataConfig(captions=str(tmp_path / "c.jsonl")))
    pq.write_table(pa.table({"path": ["a"], "prompt": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(RecipeError, match="no column video_file_name; its columns are path, prompt"):
        read_rows(DataConfig(captions=str(tmp_path / "c.parquet")))
    pq.write_table(pa.table({"video_file_name": [1], "prompt": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(RecipeError, match="c.parquet, row 1: the file name is 1, not text"):
        read_rows(DataConfig(captions=str(tmp_path / "c.parquet")))
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(RecipeError, match="c.parquet can't be read as Parquet"):
        read_rows(DataConfig(captions=str(tmp_path / "c.parquet")))
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(RecipeError, match="data.captions: .*c.jsonl.gz can't be read"):
        read_rows(DataConfig(captions=str(tmp_path / "c.jsonl.gz")))


def media(folder: Path) -> Path:
    for name, content in {
        "b.MP4": b"bb",
        "b.txt": "\ufeff of ä\nin two lines \n".encode(),
        "in/a.webm": b"a",
        "in/a.TXT": b"of a",
        "c.jpg": b"c",
        "d.png": b"d",
        "d.txt": b" \n",
        "e.gif": b"e",
        "e.txt": b"\xff",
        "f.mkv": b"",
        "f.txt": b"of f",
        ".g.mp4": b"hidden",
        ".h/h.mp4": b"hidden",
        "i.txt": b"alone",
        "j.txt": b"alone",
        "notes.pdf": b"something else",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_gives_its_media_with_the_texts_next_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = media(tmp_path / "clips")
    data = DataConfig(captions=str(folder))
    rows = read_rows(data)
    assert [(row.source, row.captions, row.size, row.reason) for row in rows] == [
        ("b.MP4", ("of ä\nin two lines",), 2, ""),
        ("c.jpg", (), 0, "no_caption"),
        ("d.png", (), 0, "no_caption"),
        ("e.gif", (), 0, "no_caption"),
        ("f.mkv", ("of f",), 0, "empty_file"),
        ("in/a.webm", ("of a",), 1, ""),
    ]
    assert [row.message for row in rows[1:4]] == [
        "there is no c.txt next to it",
        "d.txt has no caption",
        "e.txt is not UTF-8 text in line 1 (byte 0xff); save it as UTF-8",
    ]
    assert capsys.readouterr().out == f"{folder}: 2 .txt without a video or image, such as i.txt\n"
    assert data_root(data) == str(folder)
    assert Path(rows[5].path) == folder / "in" / "a.webm"
    assert read_rows(DataConfig(captions=f"{folder}/", root=str(folder))) == rows


def test_circular_links_and_odd_names_are_read_once(tmp_path: Path):
    folder = media(tmp_path / "clips")
    (folder / "in" / "again").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.mp4").write_bytes(b"z")
    (tmp_path / "elsewhere" / "z.txt").write_bytes(b"of z")
    (folder / "link").symlink_to(tmp_path / "elsewhere")  # the user's own business
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / "broken.txt").write_bytes(b"of nothing")
    Path(os.fsdecode(bytes(folder) + b"/odd\xff.mp4")).write_bytes(b"x")
    rows = {row.source: row for row in read_rows(DataConfig(captions=str(folder)))}
    assert len(rows) == 9
    assert (rows["link/z.mp4"].captions, rows["link/z.mp4"].reason) == (("of z",), "")
    assert rows["broken.mp4"].reason == "missing_file"
    assert "not UTF-8" in rows["odd\ufffd.mp4"].message


def test_a_folder_without_media_or_with_another_root_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("of a")
    with pytest.raises(RecipeError, match="is a folder without a video or image; .* CSV, JSONL or Parquet"):
        read_rows(DataConfig(captions=str(tmp_path)))
    media(tmp_path / "clips")
    with pytest.raises(RecipeError, match="leave data.root out"):
        read_rows(DataConfig(captions=str(tmp_path / "clips"), root=str(tmp_path)))


def test_a_root_that_is_no_folder_is_named_once(tmp_path: Path):
    (tmp_path / "c.csv").write_text("video_file_name,prompt\na.mp4,x\nb.mp4,y\n")
    for root in (tmp_path / "nope", tmp_path / "c.csv"):
        with pytest.raises(RecipeError, match=f"data.root: there is no folder {root}"):
            read_rows(DataConfig(captions=str(tmp_path / "c.csv"), root=str(root)))


def test_a_hundred_thousand_missing_files_take_little_memory(tmp_path: Path):
    lines = "".join(f"videos/{i // 1000}/clip_{i}.mp4,a caption of some length with number {i}\n" for i in range(10**5))
    (tmp_path / "c.csv").write_text("video_file_name,prompt\n" + lines)
    code = (
        "import sys; from data_prep.sources import read_rows; from sora_train.data.config import DataConfig\n"
        "rows = read_rows(DataConfig(captions=sys.argv[1]))\n"
        "assert {row.reason for row in rows} == {'missing_file'} and len(rows) == 10**5\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 500 * 1024  # KiB


def test_a_sample_id_depends_on_name_span_and_caption_only():
    assert sample_id("a.mp4", 0.0, 1.0, ("x",)) == "832108f3d6fa2a939d319b8ec7e75369"  # the same in every version
    ids = {
        sample_id(*a)
        for a in [("a", 0.0, 1.0, ("x",)), ("b", 0.0, 1.0, ("x",)), ("a", 1.0, 2.0, ("x",)), ("a", 0.0, 1.0, ("y",))]
    }
    assert len(ids) == 4
