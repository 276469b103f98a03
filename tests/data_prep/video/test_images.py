"""Pictures as clips of one frame."""

import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.reasons import ClipError
from data_prep.video.clips import Source
from data_prep.video.images import image_format, read_image, read_image_header
from data_prep.video.transforms import resize_to_bucket
from sora_train.data.config import DataConfig, SelectionConfig

RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 256, (6, 10, 3), np.uint8), np.ones((16, 16, 1), np.uint8))  # 96 x 160


def save(path: Path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "JPEG", "AVIF"])
def test_an_image_is_recognised_by_its_first_bytes(tmp_path: Path, kind: str):
    best = {"quality": 100, "subsampling": 0}
    options = {"WEBP": {"lossless": True}, "JPEG": best, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    path = save(tmp_path / "name.mp4", Image.fromarray(PICTURE), format=kind, **options)
    assert image_format(path) == kind
    header = read_image_header(path)
    assert (header.width, header.height, header.remark) == (160, 96, "")
    assert np.abs(read_image(path).astype(int) - PICTURE).max() <= (6 if kind in ("JPEG", "AVIF") else 0)


def test_a_video_is_no_picture(tmp_path: Path, write, shared: Path):
    path = write(tmp_path / "clip.mp4", np.arange(4) / 30)
    assert image_format(str(path.rename(tmp_path / "clip.png"))) == ""
    assert image_format(str(shared / "data" / "clips" / "derived" / "flower.gif")) == ""


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
        assert (read_image_header(path).width, read_image_header(path).height) == (160, 96)
        frame = read_image(path)
        assert frame.shape == PICTURE.shape
        assert np.abs(frame.astype(int) - PICTURE).mean() < 4


def test_transparent_parts_are_black(tmp_path: Path):
    alpha = np.zeros((96, 160), np.uint8)
    alpha[:, :80], alpha[:, 80:120] = 255, 128
    rgba = Image.fromarray(np.dstack([np.full_like(PICTURE, 200), alpha]))
    for kind in ("PNG", "WEBP", "TIFF", "AVIF"):
        path = save(tmp_path / "a", rgba, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        frame = read_image(path)
        assert np.abs([int(frame[0, x, 0]) - wanted for x, wanted in ((10, 200), (100, 100), (150, 0))]).max() <= 2, (
            kind
        )
    palette = Image.fromarray((np.arange(96 * 160).reshape(96, 160) // 7680).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    frame = read_image(save(tmp_path / "a", palette, format="PNG", transparency=1))
    assert frame[0, 0].tolist() == [200, 0, 0]
    assert frame[-1, 0].tolist() == [0, 0, 0]


def test_sixteen_bits_and_grey_become_eight_and_colour(tmp_path: Path):
    grey = np.linspace(0, 65535, 96 * 160).reshape(96, 160).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        frame = read_image(save(tmp_path / "a", Image.fromarray(grey), format=kind))
        np.testing.assert_array_equal(frame, (grey >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    frame = read_image(save(tmp_path / "a", Image.fromarray(PICTURE[..., 0]), format="PNG"))
    np.testing.assert_array_equal(frame, PICTURE[..., :1].repeat(3, 2))
    frame = read_image(save(tmp_path / "a", Image.fromarray(PICTURE).convert("CMYK"), format="JPEG", quality=100))
    assert np.abs(frame.astype(int) - PICTURE).mean() < 8


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path):
    large = np.kron(PICTURE, np.ones((20, 20, 1), np.uint8))
    path = save(tmp_path / "a", Image.fromarray(large), format="JPEG", quality=95)
    small = read_image(path, at_least=100)
    assert small.shape == (240, 400, 3)
    assert np.abs(small[20::40, 20::40].astype(int) - PICTURE[8::16, 8::16]).mean() < 5


def test_the_first_page_of_a_tiff_is_taken_with_a_remark(tmp_path: Path):
    pages = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (50, 100, 200)]
    path = save(tmp_path / "a", pages[0], format="TIFF", save_all=True, append_images=pages[1:])
    assert read_image_header(path).remark == "pages: the first of its 3 images"
    assert (read_image(path) == 50).all()


BOTH = DataConfig(fps=8, buckets=("1x64x64", "4x64x64"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "AVIF"])
def test_an_animation_is_a_video(tmp_path: Path, kind: str):
    pictures = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (50, 100, 150, 200)]
    path = save(tmp_path / "a", pictures[0], format=kind, save_all=True, append_images=pictures[1:], duration=250)
    source = Source(path, BOTH, SelectionConfig())
    span = source.plan_clips().spans[0]
    assert span.bucket.frames == 4
    frames = source.read(span, "").frames
    assert np.abs(frames[:, 32, 32, 0].astype(int) - [50, 50, 100, 100]).max() <= 3


def test_an_animated_webp_is_refused_by_name(tmp_path: Path):
    pictures = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (50, 100)]
    path = save(tmp_path / "a", pictures[0], format="WEBP", save_all=True, append_images=pictures[1:])
    with pytest.raises(ClipError, match="animated WebP") as error:
        Source(path, BOTH, SelectionConfig()).plan_clips()
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "mjpeg"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mjpeg"),
        ("a.mpg", "mpeg2video"),
        ("a.flv", "libx264"),
        ("a.nut", "ffv1"),
    ],
)
def test_one_picture_in_a_container_is_a_still(tmp_path: Path, write, name: str, codec: str):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / name, np.zeros(1), codec, size=(160, 96), pix_fmt=pix_fmt, pictures=lambda _: PICTURE)
    check_still(str(path), 40)


def test_one_picture_as_gif_avif_and_heic_is_a_still(tmp_path: Path, write):
    image = Image.fromarray(PICTURE)
    check_still(save(tmp_path / "a.gif", image), 40)
    check_still(save(tmp_path / "a.avif", image, quality=95), 25)
    options = {"x265-params": "log-level=none:bframes=0"}
    film = write(
        tmp_path / "a.mov", np.zeros(1), "libx265", size=(160, 96), options=options, pictures=lambda _: PICTURE
    )
    path = tmp_path / "a.heic"
    path.write_bytes(heic(film, 160, 96))
    check_still(str(path), 40)


def check_still(path: str, tolerance: float) -> None:
    """A still where there are buckets for videos too, and the same picture as a PNG of it, but for its codec."""
    source = Source(path, BOTH, SelectionConfig())
    cut = source.plan_clips()
    assert (cut.is_image, cut.width, cut.height, [span.bucket.name for span in cut.spans]) == (
        True,
        160,
        96,
        ["1x64x64"],
    )
    frames = source.read(cut.spans[0], "").frames
    expected = resize_to_bucket(PICTURE, cut.spans[0].bucket)
    assert np.abs(frames[0].astype(int) - expected).mean() < tolerance
    with pytest.raises(ClipError, match="has a single frame, and data.buckets"):
        Source(path, DataConfig(fps=8, buckets=("4x64x64",)), SelectionConfig()).plan_clips()


def heic(film: Path, width: int, height: int) -> bytes:
    """A film's only HEVC picture as an image: ISO/IEC 23008-12, with one item."""

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)

    with av.open(str(film)) as file:
        stream = file.streams.video[0]
        config = bytes(stream.codec_context.extradata or b"")
        picture = next(bytes(packet) for packet in file.demux(stream) if packet.size)
    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")

    def meta(place: int) -> bytes:
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), struct.pack(">H", 1)),
            box(b"iloc", bytes(4), b"\x44\x00", struct.pack(">HHHHII", 1, 1, 0, 1, place, len(picture))),
            box(
                b"iinf", bytes(4), struct.pack(">H", 1), box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), b"hvc1\0")
            ),
            box(
                b"iprp",
                box(b"ipco", box(b"hvcC", config), box(b"ispe", bytes(4), struct.pack(">II", width, height))),
                box(b"ipma", bytes(4), struct.pack(">IHBBB", 1, 1, 2, 0x81, 2)),
            ),
        )

    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", picture)


def test_a_picture_is_taken_to_srgb_by_its_profile(tmp_path: Path):
    """Here by one whose red is green; Pillow's own sRGB with two primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ", 128), profile.index(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    swapped = bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
        path = save(tmp_path / "a", Image.fromarray(PICTURE), format=kind, icc_profile=swapped, **options.get(kind, {}))
        assert read_image_header(path).remark == ""
        assert np.abs(read_image(path)[8::16, 8::16].astype(int) - PICTURE[8::16, 8::16, [1, 0, 2]]).mean() < 4, kind
    path = save(tmp_path / "a", Image.fromarray(PICTURE), format="PNG", icc_profile=b"no profile")
    assert "ICC profile" in read_image_header(path).remark
    np.testing.assert_array_equal(read_image(path), PICTURE)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_picture_that_breaks_off_is_corrupt(tmp_path: Path, kind: str, share: float):
    noise = Image.fromarray(RNG.integers(0, 256, (200, 200, 3), np.uint8))
    path = Path(save(tmp_path / "a", noise, format=kind))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ClipError) as error:
        read_image(str(path))
    assert error.value.reason == "corrupt"


def test_a_picture_with_damage_is_corrupt(tmp_path: Path):
    path = Path(save(tmp_path / "a", Image.fromarray(PICTURE), format="PNG"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 - 50 : len(content) // 2 + 50] = b"x" * 100
    path.write_bytes(content)
    with pytest.raises(ClipError, match="ends early: broken PNG") as error:
        read_image(str(path))
    assert error.value.reason == "corrupt"


@pytest.mark.parametrize("options", [{"quality": 92}, {"quality": 80, "progressive": True}, {"optimize": True}])
def test_a_jpeg_with_damage_is_refused(tmp_path: Path, options: dict):
    """libjpeg only warns of it, and Pillow doesn't listen."""
    y, x = np.mgrid[:256, :256]
    slope = Image.fromarray(np.stack([x, y, (x + y) // 2], -1).astype(np.uint8))
    path = Path(save(tmp_path / "a", slope, format="JPEG", **options))
    read_image(str(path))
    whole = path.read_bytes()
    begin = whole.index(b"\xff\xda") + 20
    middle = (begin + len(whole)) // 2
    for content in (
        whole[:middle] + b"\xff\xd9",
        whole[:begin] + bytes(40) + whole[begin + 40 :],
        whole[:begin] + b"w" * 60 + whole[begin + 60 :],
    ):
        path.write_bytes(content)
        with pytest.raises(ClipError) as error:
            read_image(str(path))
        assert error.value.reason == "corrupt"
    for padding in (b"\0" * 8, b"\xff" * 300):  # before and behind its end, as cameras leave it
        path.write_bytes(whole[:-2] + padding[:8] + b"\xff\xd9" + padding)
        read_image(str(path))


def test_a_webp_with_a_hole_is_corrupt(tmp_path: Path):
    path = Path(save(tmp_path / "a", Image.fromarray(RNG.integers(0, 256, (200, 200, 3), np.uint8)), format="WEBP"))
    content = bytearray(path.read_bytes())
    content[5000:5512] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(ClipError, match="run of zeros") as error:
        read_image(str(path))
    assert error.value.reason == "corrupt"


def test_a_size_beyond_the_limit_is_refused_before_decoding(tmp_path: Path):
    path = Path(save(tmp_path / "a", Image.new("1", (8192, 8192)), format="PNG"))  # a kilobyte or so
    assert path.stat().st_size < 20_000
    for read in (read_image_header, read_image):
        with pytest.raises(ClipError, match="8192x8192") as error:
            read(str(path))
        assert error.value.reason == "too_large"
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = struct.pack(">II", 65535, 65535)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    path.write_bytes(bomb)
    with pytest.raises(ClipError) as error:
        read_image_header(str(path))
    assert error.value.reason == "too_large"


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_images_without_a_fixed_range_are_scaled_to_theirs(tmp_path: Path, dtype: str):
    ramp = np.linspace(-40, 90_000, 256 * 16).reshape(16, 256).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    grey = read_image(str(tmp_path / "ramp.tiff"))
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0] - np.linspace(0, 255, 256 * 16).reshape(16, 256)).max() <= 0.51


def test_an_image_of_values_that_are_not_finite_is_corrupt(tmp_path: Path):
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ClipError, match="not finite") as error:
        read_image(str(tmp_path / "nan.tiff"))
    assert error.value.reason == "corrupt"


def test_colours_that_an_image_signals_in_vain_have_a_remark(tmp_path: Path):
    image = Image.fromarray(PICTURE)
    png = Path(save(tmp_path / "a.png", image)).read_bytes()

    def with_chunk(kind: bytes, content: bytes) -> str:
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        (tmp_path / "b.png").write_bytes(png[:33] + chunk + png[33:])  # after IHDR
        return read_image_header(str(tmp_path / "b.png")).remark

    assert with_chunk(b"gAMA", struct.pack(">I", 45455)) == ""
    assert with_chunk(b"gAMA", struct.pack(">I", 100000)).startswith("image_colours: has a gamma of 1, which is not")
    assert with_chunk(b"cICP", bytes([9, 16, 0, 1])).startswith("image_colours: has HDR (PQ)")
    assert with_chunk(b"cICP", bytes([1, 13, 0, 1])) == ""
    avif = Path(save(tmp_path / "a.avif", image)).read_bytes()
    place = avif.index(b"colrnclx") + 8
    for primaries, transfer, what in ((9, 18, "HDR (HLG)"), (12, 13, "colours of P3")):
        (tmp_path / "b.avif").write_bytes(avif[:place] + struct.pack(">HH", primaries, transfer) + avif[place + 4 :])
        assert read_image_header(str(tmp_path / "b.avif")).remark.startswith(f"image_colours: has {what}, which")
