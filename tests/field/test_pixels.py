"""The level that a picture must have, whatever mode and transparency it was saved with."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from momatch.data.image_io import DataError, on_white, read_picture

SIDE, SMALL = 64, 8
CHECKER = np.indices((SIDE, SIDE)).sum(0) % 2  # half of it is 0, half 1, in every block of 8×8
CAMERA = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF's number: how Pillow calls what was done


def saved(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def checker(mode):
    """Black and white squares of one pixel, in any mode."""
    grey = Image.fromarray((CHECKER * 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((CHECKER * 65535).astype(np.uint16))
    if mode == "P":
        picture = Image.fromarray(CHECKER.astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
        return picture
    return grey.convert(mode)


MODES = [
    ("1", "PNG"),
    ("L", "PNG"),
    ("P", "PNG"),
    ("RGB", "PNG"),
    ("I;16", "PNG"),
    ("L", "BMP"),
    ("1", "BMP"),
]
MODES += [("RGB", "BMP"), ("RGB", "WEBP"), ("CMYK", "TIFF")]


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_a_checkerboard_reduced_is_half_grey(mode, kind):
    contents = saved(checker(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    reduced = read_picture(contents, "it", SMALL).astype(float)
    np.testing.assert_allclose(reduced, 127.5, atol=1)
    whole = read_picture(contents, "it").astype(float)
    channel = whole if whole.ndim == 2 else whole[:, :, 0]
    np.testing.assert_allclose(channel, CHECKER * 255, atol=2)


def clear(how):
    """The white squares opaque, the black ones invisible."""
    grey = (CHECKER * 255).astype(np.uint8)
    if how == "alpha of RGB":
        return saved(Image.fromarray(np.dstack([grey * 0, grey * 0, grey * 0, grey])))
    if how == "alpha of grey":
        return saved(Image.merge("LA", [Image.fromarray(grey * 0), Image.fromarray(grey)]))
    if how == "alpha in WebP":
        return saved(Image.fromarray(np.dstack([grey * 0, grey * 0, grey * 0, grey])), "WEBP", lossless=True)
    if how == "key of RGB":
        return saved(checker("RGB"), transparency=(0, 0, 0))
    if how == "key of grey":
        return saved(checker("L"), transparency=0)
    if how == "key of 1 bit":
        return saved(checker("1"), transparency=0)
    if how == "key of 16 bits":
        return saved(checker("I;16"), transparency=0)
    if how == "index of a palette":
        return saved(checker("P"), transparency=0)
    return saved(checker("P"), transparency=bytes([0, 255]))


CLEAR = ["alpha of RGB", "alpha of grey", "alpha in WebP", "key of RGB", "key of grey", "key of 1 bit"]
CLEAR += ["key of 16 bits", "index of a palette", "table of a palette"]


@pytest.mark.parametrize("how", CLEAR)
@pytest.mark.parametrize("size", [0, SMALL])
def test_what_is_invisible_is_white_before_it_is_averaged(how, size):
    """Alpha pictures: black squares, opaque where the board is white, so half of the light comes through."""
    pixels = read_picture(clear(how), "it", size).astype(float)
    if how.startswith("alpha"):
        want = 255.0 - 255 * CHECKER if not size else np.full((SMALL, SMALL), 127.5)
    else:
        want = np.full((size or SIDE,) * 2, 255.0)
    channel = pixels if pixels.ndim == 2 else pixels[:, :, 1]
    np.testing.assert_allclose(channel, want, atol=1)


def test_arrays_of_four_channels_lie_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 4), dtype=np.uint8)
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    np.testing.assert_allclose(on_white(rgba), colour * alpha + 255 * (1 - alpha), atol=0.5 + 1e-9)


@pytest.mark.parametrize("orientation", CAMERA)
def test_a_picture_is_turned_as_its_camera_noted(orientation):
    upright = np.zeros((8, 12, 3), np.uint8)
    upright[0, 0] = 255  # the corner that must come out at the top left
    image, turn = Image.fromarray(upright), CAMERA[orientation]
    stored = image if turn is None else image.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_picture(saved(stored, exif=exif), "it"), upright)


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def with_chunk(png: bytes, extra: bytes, after_pixels: bool = False) -> bytes:
    place = png.index(b"IEND") - 4 if after_pixels else 33  # behind the header
    return png[:place] + extra + png[place:]


REMARKS = {
    "workflow": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 200_000)),
    "international text": chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
    "colour profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))),
    "damaged text": chunk(b"zTXt", b"x\0\0not zlib"),
    "many texts": b"".join(chunk(b"tEXt", b"x%d\0" % i + b"a" * 1_000_000) for i in range(70)),
}


@pytest.mark.parametrize(
    ("remark", "after_pixels"),
    [
        (remark, after)
        for remark in REMARKS
        for after in (False, True)
        if remark != "colour profile" or not after
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_long_remarks_in_a_png_do_not_matter(tmp_path, remark, after_pixels, from_file):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    contents = with_chunk(saved(Image.fromarray(pixels)), REMARKS[remark], after_pixels)
    source = contents
    if from_file:
        source = tmp_path / "it.png"
        source.write_bytes(contents)
    np.testing.assert_array_equal(read_picture(source, "it"), pixels)


def test_a_picture_too_large_to_be_read_unasked_names_the_option():
    width = 14_000
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width // 8 + 1) * width))
    contents = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="196 million pixels.*--max-megapixels") as error:
        read_picture(contents, "it")
    assert "\n" not in str(error.value)
    limit = Image.MAX_IMAGE_PIXELS
    assert not read_picture(contents, "it", 4, max_megapixels=200).any()
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="196 million"):
        read_picture(contents, "it", 4, max_megapixels=190)
