"""Text files of users: UTF-8, or what a byte order mark names, with clear errors for what is no text."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from itertools import chain


def decode_text(content: bytes) -> str:
    """Decodes a small file as `decoded_lines` does."""
    return "".join(decoded_lines([content]))


def decoded_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decodes UTF-8, or the encoding that a byte order mark names (Excel and Windows write UTF-16), line by line.

    Lines end with a line feed, a carriage return or both. Raises ValueError, whose message continues a sentence that
    begins with the file's name.
    """
    chunks, head = iter(chunks), b""
    while len(head) < 4 and (chunk := next(chunks, b"")):
        head += chunk
    encoding = _encoding_of(head)
    decoder, count, is_start = codecs.getincrementaldecoder(encoding)(), 0, True
    rest: list[str] = []  # the line that goes on in the next chunk
    for chunk in chain([head], chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            text = "".join(rest) + codecs.decode(error.object[: error.start], encoding, "ignore") + "x"
            line = count + len(io.StringIO(text, newline="").readlines())
            where = f"in line {line} (byte 0x{error.object[error.start]:02x})" if encoding.startswith("utf-8") else ""
            name = encoding.removesuffix("-sig").upper()
            raise ValueError(f"is not {name} text {where}".rstrip() + "; save it as UTF-8") from None
        if is_start and text:
            text, is_start = text.removeprefix("\ufeff"), False  # some writers write two
        if "\0" in text:
            line = count + 1 + ("".join(rest) + text[: text.index("\0")]).count("\n")
            raise ValueError(f"has a NUL byte in line {line}, so it is damaged; write it again")
        rest.append(text)
        if chunk and "\n" not in text and "\r" not in "".join(rest[-2:]):
            continue
        lines = io.StringIO("".join(rest), newline="").readlines()
        # A \r at the end may be the first half of \r\n.
        rest = [lines.pop()] if chunk and not lines[-1].endswith("\n") else []
        count += len(lines)
        yield from lines


def _encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these bytes. Raises ValueError if it is no text."""
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    encoding = next((name for mark, name in marks if head.startswith(mark)), "utf-8")
    if head.startswith(b"PK\3\4"):
        raise ValueError("is a zip archive or an Excel workbook; save it as CSV in UTF-8")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError("is compressed by gzip; add .gz to its name")
    if encoding == "utf-8" and head[:2].count(0) == 1:
        raise ValueError("is UTF-16 without a byte order mark; save it as UTF-8")
    return encoding
