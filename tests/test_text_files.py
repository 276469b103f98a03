"""Text files of users: lines are right however they come, and what is no text is named."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.text_files import decoded_lines


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=30),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    cuts=st.lists(st.integers(1, 9), max_size=40),
)
def test_lines_are_the_same_wherever_chunks_are_cut(text: str, encoding: str, cuts: list[int]):
    content = text.replace("a", "\r").replace("b", "\r\n").replace("c", "\n").encode(encoding)
    parts = [content[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
    whole = io.StringIO(content.decode(encoding), newline="").readlines()
    assert list(decoded_lines(part for part in [*parts, content[sum(cuts) :]] if part)) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_bad_byte_is_named_with_its_line_wherever_chunks_are_cut(size: int):
    for content, says in (
        ("ä\r\nb\rc\n".encode() + b"d\xff", r"not UTF-8 text in line 4 .byte 0xff."),
        ("ä\nb".encode() + "é".encode()[:1], r"not UTF-8 text in line 2 .byte 0xc3."),
        (b"ab\n\ncd\0", "NUL byte in line 3"),
    ):
        parts = [content[i : i + size] for i in range(0, len(content), size)]
        with pytest.raises(ValueError, match=says):
            list(decoded_lines(parts))
