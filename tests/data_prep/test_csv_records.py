"""CSV files of many writers are read as meant, or refused with line and cause."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import sources
from data_prep.captions import NO_CAPTION
from data_prep.csv_records import Records
from data_prep.sources import SourceRow
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError
from sora_train.text_files import decoded_lines


def read_rows(data: DataConfig) -> list[SourceRow]:
    return list(sources.read_rows(data))


HEAD = "video_file_name,prompt\n"


def read(folder: Path, content: str | bytes, name: str = "captions.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(DataConfig(captions=str(folder / name)))


def captions_of(folder: Path, content: str | bytes) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.source, row.captions) for row in read(folder, content)]


MEANT = [("a.mp4", ("x, y; z",)), ("b.mp4", ('"two"',))]


@pytest.mark.parametrize(
    "content",
    [
        HEAD + 'a.mp4,"x, y; z"\nb.mp4,"""two"""\n',
        HEAD + 'a.mp4, "x, y; z"\nb.mp4 , """two"""\n',  # a blank before the quotation mark
        'video_file_name;prompt\na.mp4;"x, y; z"\nb.mp4;"""two"""\n',
        'video_file_name\tprompt\na.mp4\tx, y; z\nb.mp4\t"""two"""\n',
        'video_file_name|prompt\na.mp4|x, y; z\nb.mp4|"""two"""\n',
        'sep=;\nvideo_file_name;prompt\na.mp4;"x, y; z"\nb.mp4;"""two"""\n',
        '"sep=,"\r\nvideo_file_name,prompt\r\na.mp4,"x, y; z"\r\nb.mp4,"""two"""\r\n',
        HEAD.replace("\n", "\r") + 'a.mp4,"x, y; z"\rb.mp4,"""two"""\r',  # line ends of old Macs
        "\ufeff" + HEAD + 'a.mp4,"x, y; z"\n,,,\n  \nb.mp4,"""two"""\n;;\n'.replace(";;\n", ",,\n"),
        ("\ufeff" + HEAD + 'a.mp4,"x, y; z"\nb.mp4,"""two"""\n').encode("utf-16-le"),
        ("\ufeff" + HEAD + 'a.mp4,"x, y; z"\nb.mp4,"""two"""\n').encode("utf-16-be"),
        ("\ufeffvideo_file_name\tprompt\r\n" + 'a.mp4\tx, y; z\r\nb.mp4\t"""two"""\r\n').encode("utf-32"),
        'prompt;number;video_file_name\n"x, y; z";1,5;a.mp4\n"""two""";2;b.mp4\n',
    ],
)
def test_a_dialect_is_read_as_it_was_meant(tmp_path: Path, content: str | bytes):
    assert captions_of(tmp_path, content) == MEANT


def test_another_separator_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    read(tmp_path, "video_file_name;prompt\na.mp4;x\n")
    assert capsys.readouterr().out == f"{tmp_path}/captions.csv: cells are separated by semicolons\n"
    read(tmp_path, HEAD + "a.mp4,x\n")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEAD + 'b,x\na.mp4,"a \\"red\\" car"\n', r"line 3: a quotation mark is escaped by a backslash .*Double the"),
        (HEAD + 'a.mp4,"2\\" seam, blue"\n', "line 2: a quotation mark is escaped by a backslash"),
        (HEAD + 'a.mp4,"give \\"buyers what,\\" and"\n', "line 2: a quotation mark is escaped by a backslash"),
        (HEAD + 'a.mp4,"5\\""\nb.mp4,"6\\""\n', "line 2: a quotation mark is escaped by a backslash"),
        (HEAD + 'a.mp4,"said \\",\\" twice"\n', "line 2: a quotation mark is escaped by a backslash"),
        (HEAD + 'a.mp4,a \\"red\\" car\n', "line 2: a quotation mark is escaped by a backslash"),
        (HEAD + "a.mp4,red\\, blue\n", "line 2: 3 cells, but the header has 2: a comma is escaped by a backslash"),
        (HEAD + "a.mp4,\u201cred, blue\u201d\n", "line 2: 3 cells.* are text in CSV, not quotation marks"),
        (HEAD + 'a.mp4,"Hello" she said\n', "line 2: text follows a closing quotation mark"),
        (HEAD + 'a.mp4,"b\nb.mp4,"x"\n', "line 2: a quotation mark is not closed before line 3"),
        (HEAD + "a.mp4,x\n" + HEAD + "b.mp4,y\n", "line 3: the header again"),
        (HEAD + "a.mp4,x\n\ufeff" + HEAD + "b.mp4,y\n", "line 3: the header again"),
        ("video_file_name;prompt\na.mp4;x; y\n", "line 2: 3 cells, .*a caption with a semicolon in it"),
        ("sep=;\nvideo_file_name;prompt\na.mp4;x; y\n", "line 3: 3 cells"),
        ("file;text\na.mp4;x\n", "the header, its first line, is file, text. Add a header, or set"),
        ("a.mp4,a dog runs\n", "the header, its first line, is a.mp4, a dog runs. Add a header"),
        (";".join(f"c{i}" for i in range(99)) + "\n", "is c0, .*, c11 and 87 more"),
        (HEAD.encode() + b"a.mp4,x\0y\n", "has a NUL byte in line 2, so it is damaged"),
        (HEAD.encode("utf-16-le"), "is UTF-16 without a byte order mark; save it as UTF-8"),
        ("\ufeffab".encode("utf-16-le")[:-1], "is not UTF-16 text; save it as UTF-8"),
        (HEAD.encode() + "a.mp4,café\n".encode("cp1252"), "is not UTF-8 text in line 2 .byte 0xe9."),
        (gzip.compress(HEAD.encode(), mtime=0), "is compressed by gzip; add .gz to its name"),
        (b"PK\x03\x04" + bytes(range(256)), "is a zip archive or an Excel workbook; save it as CSV in UTF-8"),
    ],
)
def test_an_unreadable_record_names_its_line_and_cause(tmp_path: Path, content: str | bytes, words: str):
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, content)


@pytest.mark.parametrize("cell", ['"ends in C:\\"', '"a \\""b\\"" c"', "C:\\dir, ".strip(", "), 'a 5" nail'])
def test_backslashes_that_are_text_stay(tmp_path: Path, cell: str):
    ((_, (caption,)),) = captions_of(tmp_path, HEAD + f"a.mp4,{cell}\n")
    assert caption == next(csv.reader([cell]))[0]


def test_a_row_with_too_few_cells_says_so(tmp_path: Path):
    (row,) = read(tmp_path, HEAD + "a.mp4;x\n")
    assert (row.reason, row.message) == ("no_caption", "line 2 has 1 cells of the header's 2, and no caption")


def test_a_very_long_caption_is_read(tmp_path: Path):
    words = "word " * 60_000
    assert captions_of(tmp_path, HEAD + f'a.mp4,"{words}"\n') == [("a.mp4", (words.strip(),))]


@pytest.mark.parametrize("word", [*sorted(NO_CAPTION), "\u200b\u200d\ufeff"])
def test_a_word_for_a_missing_value_is_no_caption(tmp_path: Path, word: str):
    (row,) = read(tmp_path, HEAD + f"a.mp4,{word}\n")
    assert (row.reason, row.captions) == ("no_caption", ())
    assert repr(word) in row.message
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(b"x")
    (tmp_path / "media" / "a.txt").write_text(word)
    (row,) = read_rows(DataConfig(captions=str(tmp_path / "media")))
    assert row.reason == "no_caption"


def test_nan_in_json_lines_is_null(tmp_path: Path):
    text = '{"video_file_name": "a.mp4", "prompt": NaN}\r{"video_file_name": "b.mp4", "prompt": [NaN, "x"]}\r'
    rows = read(tmp_path, text, "c.jsonl")
    assert [(row.captions, row.reason) for row in rows] == [((), "no_caption"), (("x",), "missing_file")]


def test_a_json_array_is_named_as_one(tmp_path: Path):
    for text in ('[\n{"video_file_name": "a.mp4", "prompt": "x"}\n]', '[{"video_file_name": "a.mp4"}]'):
        with pytest.raises(RecipeError, match="c.json is one JSON array, not JSON lines. Convert it"):
            read(tmp_path, text, "c.json")


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20)


def written(rows, delimiter: str, quoting, end: str) -> str:
    """What Python's writer makes of them. It leaves a line end unquoted where that is not its own."""
    quoting = csv.QUOTE_ALL if any("\r" in cell or "\n" in cell for row in rows for cell in row) else quoting
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([("f", "p"), *rows])
    return text.getvalue()


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_what_pythons_writer_writes_is_read_back(rows, delimiter: str, quoting, end: str):
    stripped = [(a.strip(), b.strip()) for a, b in rows]
    lines = decoded_lines([written(rows, delimiter, quoting, end).encode()])
    found = [tuple(cells) for _, cells in Records("c.csv", lines, ("f", "p"))]
    assert found == [row for row in stripped if any(row)]
