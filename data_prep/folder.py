"""A folder of media with captions beside them: `walk.mp4` and `walk.txt`, in the folder or one within."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

from data_prep.captions import NO_CAPTION, CaptionLine, no_caption
from sora_train.errors import RecipeError
from sora_train.log import log
from sora_train.storage import decode_text, storage_errors

PICTURES = "avif bmp heic heif jpeg jpg png tif tiff webp"
VIDEOS = "3g2 3gp apng asf avi f4v flv gif m2ts m4v mkv mov mp4 mpe mpeg mpg mts mxf ogg ogv ts vob webm wmv y4m"
MEDIA = frozenset(f".{name}" for name in f"{PICTURES} {VIDEOS}".split())
READERS = 16  # texts read at a time


def read_folder(place: str, system: fs.FileSystem, path: str) -> list[CaptionLine]:
    """A line for every video and picture of the folder, sorted by name; hidden ones are left out.

    One without a text is `no_caption`; texts without media are counted in one printed line. Raises RecipeError where
    there is no media at all, UserError where the folder can't be read.
    """
    with storage_errors(place, "read", system):
        names = sorted(_walk(path) if isinstance(system, fs.LocalFileSystem) else _list(system, path))
    media = [name for name in names if posixpath.splitext(name)[1].lower() in MEDIA]
    texts: dict[str, list[str]] = {}  # by stem in one normal form: macOS and zips write names in another
    for name in names:
        if name.lower().endswith(".txt"):
            texts.setdefault(_composed(name[:-4]), []).append(name)
    if not media:
        raise RecipeError(
            f"data.captions: {place} is a folder without a video or picture; name one with media and a .txt of the "
            "same name beside each, or a CSV, JSONL or Parquet file"
        )
    if alone := sorted(set(texts) - {_composed(posixpath.splitext(name)[0]) for name in media}):
        example = _plain(texts[alone[0]][0])
        log.info(f"{place}: {len(alone)} .txt without a video or picture, such as {example}")
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: _line(system, path, name, texts), media))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _line(system: fs.FileSystem, path: str, name: str, texts: dict[str, list[str]]) -> CaptionLine:
    """The line of a file by the text beside it, which is one caption, line breaks and all."""
    plain, stem = _plain(name), posixpath.splitext(name)[0]
    if plain != name:
        return CaptionLine(
            plain, plain, (), "missing_file", "the file's name is not UTF-8, and can't be passed on; rename it"
        )
    there = texts.get(_composed(stem), [])
    if not there:
        return CaptionLine(name, name, (), "no_caption", f"there is no {posixpath.basename(stem)}.txt beside it")
    if len(there) > 1:
        return CaptionLine(name, name, (), "no_caption", f"{' and '.join(there)} are both beside it; remove one")
    (text,) = there
    try:
        with system.open_input_stream(f"{path}/{text}", compression=None) as file:
            caption = decode_text(file.read()).strip()
    except ValueError as error:
        return CaptionLine(name, name, (), "no_caption", f"{text} {error}")
    except OSError as error:
        return CaptionLine(name, name, (), "fetch_failed", f"its caption {text} can't be read: {error}")
    if not caption:
        return CaptionLine(name, name, (), "no_caption", f"{text} is empty")
    if caption in NO_CAPTION:
        return CaptionLine(name, name, (), "no_caption", f"{text} holds {no_caption([caption])}")
    return CaptionLine(name, name, (caption,))


def _plain(name: str) -> str:
    """The name with a mark for every byte that is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _walk(root: str, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Names below a local folder. Not by pyarrow, which runs in circles where a link does, and fails at odd names."""
    real = os.path.realpath(os.path.join(root, below))
    if real in above:
        return
    with os.scandir(real) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{below}{entry.name}/", (*above, real))
            else:
                yield f"{below}{entry.name}"


def _list(system: fs.FileSystem, root: str) -> Iterator[str]:
    """Names below a remote folder."""
    for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
        name = posixpath.relpath(info.path, root)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name
