"""Pictures as clips of one frame."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.reasons import ClipError
from data_prep.stills import read_still, read_still_header, still_kind

RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 256, (6, 10, 3), np.uint8), np.ones((16, 16, 1), np.uint8))  # 96 x 160


def save(path: Path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "JPEG"])
def test_a_picture_is_known_by_its_first_bytes_and_read_as_it_was_written(tmp_path: Path, kind: str):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    path = save(tmp_path / "name.mp4", Image.fromarray(PICTURE), format=kind, **options)
    assert still_kind(path) == kind
    header = read_still_header(path)
    assert (header.width, header.height, header.remark) == (160, 96, "")
    assert np.abs(read_still(path).astype(int) - PICTURE).max() <= (6 if kind == "JPEG" else 0)


def test_a_video_is_no_picture(tmp_path: Path, write, shared: Path):
    path = write(tmp_path / "clip.mp4", np.arange(4) / 30)
    assert still_kind(str(path.rename(tmp_path / "clip.png"))) == ""
    assert still_kind(str(shared / "data" / "clips" / "derived" / "flower.gif")) == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path, orientation: int):
    stored = {  # how the picture lies in the file, EXIF 2.3, 4.6.4
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        path = save(tmp_path / "a", Image.fromarray(np.ascontiguousarray(stored)), format=kind, exif=exif, **options)
        assert (read_still_header(path).width, read_still_header(path).height) == (160, 96)
        frame = read_still(path)
        assert frame.shape == PICTURE.shape
        assert np.abs(frame.astype(int) - PICTURE).mean() < 4


def test_transparent_parts_are_black(tmp_path: Path):
    alpha = np.zeros((96, 160), np.uint8)
    alpha[:, :80], alpha[:, 80:120] = 255, 128
    rgba = Image.fromarray(np.dstack([np.full_like(PICTURE, 200), alpha]))
    for kind in ("PNG", "WEBP", "TIFF"):
        path = save(tmp_path / "a", rgba, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        frame = read_still(path)
        assert [int(frame[0, x, 0]) for x in (10, 100, 150)] == [200, 100, 0], kind
    palette = Image.fromarray((np.arange(96 * 160).reshape(96, 160) // 7680).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    frame = read_still(save(tmp_path / "a", palette, format="PNG", transparency=1))
    assert frame[0, 0].tolist() == [200, 0, 0]
    assert frame[-1, 0].tolist() == [0, 0, 0]


def test_sixteen_bits_and_grey_become_eight_and_colour(tmp_path: Path):
    grey = np.linspace(0, 65535, 96 * 160).reshape(96, 160).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        frame = read_still(save(tmp_path / "a", Image.fromarray(grey), format=kind))
        np.testing.assert_array_equal(frame, (grey >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    frame = read_still(save(tmp_path / "a", Image.fromarray(PICTURE[..., 0]), format="PNG"))
    np.testing.assert_array_equal(frame, PICTURE[..., :1].repeat(3, 2))
    frame = read_still(save(tmp_path / "a", Image.fromarray(PICTURE).convert("CMYK"), format="JPEG", quality=100))
    assert np.abs(frame.astype(int) - PICTURE).mean() < 8


def test_a_large_photograph_is_decoded_small_where_that_is_enough(tmp_path: Path):
    large = np.kron(PICTURE, np.ones((20, 20, 1), np.uint8))
    path = save(tmp_path / "a", Image.fromarray(large), format="JPEG", quality=95)
    small = read_still(path, at_least=100)
    assert small.shape == (240, 400, 3)
    assert np.abs(small[20::40, 20::40].astype(int) - PICTURE[8::16, 8::16]).mean() < 5


def test_of_a_moving_picture_the_first_is_taken_and_the_remark_says_so(tmp_path: Path):
    pictures = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (50, 100, 200)]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        path = save(tmp_path / "a", pictures[0], format=kind, save_all=True, append_images=pictures[1:], **options)
        assert read_still_header(path).remark == "the first of its 3 pictures", kind
        assert (read_still(path) == 50).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_picture_that_breaks_off_is_truncated(tmp_path: Path, kind: str, share: float):
    noise = Image.fromarray(RNG.integers(0, 256, (200, 200, 3), np.uint8))
    path = Path(save(tmp_path / "a", noise, format=kind))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ClipError) as error:
        read_still(str(path))
    assert error.value.reason == "truncated"


def test_a_picture_with_damage_is_corrupt(tmp_path: Path):
    path = Path(save(tmp_path / "a", Image.fromarray(PICTURE), format="PNG"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 - 50 : len(content) // 2 + 50] = b"x" * 100
    path.write_bytes(content)
    with pytest.raises(ClipError, match="can't be decoded: broken PNG") as error:
        read_still(str(path))
    assert error.value.reason == "corrupt"


def test_a_declared_size_beyond_the_limit_is_refused_before_decoding(tmp_path: Path):
    path = Path(save(tmp_path / "a", Image.new("1", (8192, 8192)), format="PNG"))  # a kilobyte or so
    assert path.stat().st_size < 20_000
    for read in (read_still_header, read_still):
        with pytest.raises(ClipError, match="8192x8192") as error:
            read(str(path))
        assert error.value.reason == "too_large"
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = struct.pack(">II", 65535, 65535)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    path.write_bytes(bomb)
    with pytest.raises(ClipError) as error:
        read_still_header(str(path))
    assert error.value.reason == "too_large"
