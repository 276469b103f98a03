"""A run's files, read as far as they go; what is wrong with one is noted under its path, in words for the page.

Boxes of an mp4: ISO/IEC 14496-12, section 4.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

PNG_END = b"IEND\xaeB`\x82"
MOST_BOXES = 10_000  # a video of ours has four; one of millions would keep the page waiting


def read_lines(path: Path, flaws: dict[Path, str]) -> Iterator[dict]:
    """The objects of a JSON-lines file; a line that is no object, such as one cut short, is left out and counted."""
    if not path.is_file():
        return
    lines = bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                lines += 1
                if (entry := _object(line)) is not None:
                    yield entry
                else:
                    bad += bool(line.strip())
    except OSError as error:
        flaws[path] = error.strerror or str(error)
        return
    if bad:
        flaws[path] = f"{bad:,} of {lines:,} lines"


def read_object(path: Path, flaws: dict[Path, str]) -> dict | None:
    """A file's JSON object, or None where there is none."""
    text = read_text(path, flaws)
    found = None if text is None else _object(text)
    if text is not None and found is None:
        flaws[path] = "cut short or no JSON object"
    return found


def read_text(path: Path, flaws: dict[Path, str]) -> str | None:
    """A file's text, whatever its bytes, or None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        flaws[path] = error.strerror or str(error)
        return None


def is_file(path: Path) -> bool:
    """A file of the run's own: a link could lead anywhere, and what it leads to would be put into the page."""
    return path.is_file() and not path.is_symlink()


def is_whole_mp4(path: Path) -> bool:
    """Whether a file is boxes that end where it ends, `moov` among them: no frame is decoded for it."""
    at, boxes, kinds = 0, 0, set()
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while at < end and boxes < MOST_BOXES:
                file.seek(at)
                head = file.read(16)
                size, kind = int.from_bytes(head[:4], "big"), head[4:8]
                size = int.from_bytes(head[8:], "big") if size == 1 else size or end - at
                if size < 8:
                    return False
                kinds.add(kind)
                at, boxes = at + size, boxes + 1
    except OSError:
        return False
    return at == end and b"moov" in kinds


def is_whole_png(path: Path) -> bool:
    """Whether a file ends as a PNG does."""
    try:
        with path.open("rb") as file:
            file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
