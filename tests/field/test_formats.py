"""TIFF, GIF and BMP have the right pixels; a .zip is read as a folder would be, and cannot do harm."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from small_files import png, put

import momatch.data.zips as zips
from momatch.data.image_io import DataError, read_picture
from momatch.data.reading import Reading
from momatch.data.sources import load_data, open_collection

LEVELS = np.random.default_rng(0).integers(0, 256, (6, 4), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def saved(pixels, kind, mode=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, format=kind, **options)
    return stream.getvalue()


def tiff(levels, order="<", white_is_zero=False):
    """A grey TIFF of one strip, written by hand: 8 or 16 bits, in either byte order."""
    bits, (height, width) = 8 * levels.dtype.itemsize, levels.shape
    data = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    entries = [struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    return head + data + struct.pack(order + "H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize(
    ("order", "white_is_zero", "bits"),
    [
        *[(order, white, 8) for order in "<>" for white in (False, True)],
        *[("<", False, 16), (">", False, 16), ("<", True, 16)],  # Pillow refuses (">", True, 16)
    ],
)
def test_a_grey_tiff_of_any_byte_order_and_direction(order, white_is_zero, bits):
    levels = LEVELS.astype(f"u{bits // 8}") * (257 if bits == 16 else 1)
    stored = ~levels if white_is_zero else levels
    found = read_picture(tiff(stored, order, white_is_zero), "it")
    np.testing.assert_array_equal(found, LEVELS)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_colour_tiff_however_packed(compression):
    np.testing.assert_array_equal(
        read_picture(saved(COLOURS, "TIFF", compression=compression), "it"), COLOURS
    )


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda p: p), (3, lambda p: p[::-1, ::-1]), (6, lambda p: np.rot90(p, -1)), (8, np.rot90)],
)
def test_a_tiff_is_turned_as_it_says(orientation, turned):
    contents = saved(COLOURS, "TIFF", tiffinfo={274: orientation})
    np.testing.assert_array_equal(read_picture(contents, "it"), turned(COLOURS))


def test_transparency_of_tiff_and_gif_is_laid_on_white_before_it_is_averaged():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255  # above black, below clear: on white half as bright as white
    assert (read_picture(saved(pixels, "TIFF"), "it", 1) == 128).all()
    palette = Image.fromarray(np.repeat([[0], [0], [1], [1]], 4, 1).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    stream = io.BytesIO()
    palette.save(stream, format="GIF", transparency=1)
    assert (read_picture(stream.getvalue(), "it", 1) == 128).all()


def test_of_frames_and_pages_the_first_is_read():
    frames = [Image.new("L", (3, 2), level) for level in (10, 200)]
    for kind in ("GIF", "TIFF", "WEBP"):
        stream = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(stream, format=kind, save_all=True, append_images=frames[1:], **options)
        assert np.unique(read_picture(stream.getvalue(), "it")).tolist() == [10], kind


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".gif", ".bmp", ".jfif", ".JPEG"])
def test_such_files_are_pictures_of_a_folder(tmp_path, suffix):
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".bmp": "BMP"}.get(suffix.lower(), "JPEG")
    found = open_collection(str(put(tmp_path, {f"cat/0{suffix}": saved(np.full((4, 4), 9, np.uint8), kind)})))
    assert (
        (found.item(0).pixels[0, 0] == 9).all() and not found.left_out and list(found.class_names) == ["cat"]
    )


def test_a_tiff_of_floating_point_is_refused():
    with pytest.raises(DataError, match="pixels of mode 'F', whose range is unknown"):
        read_picture(saved(LEVELS.astype(np.float32), "TIFF"), "it")


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in files.items():
            archive.writestr(name, png(contents) if isinstance(contents, int) else contents)
    return path


FOLDERS = {
    "classes": {"cat/0.png": 1, "dog/0.png": 2, "dog/a.md": b"x", "stray.png": 3},
    "all in one folder": {"mine/cat/0.png": 1, "mine/dog/0.png": 2, "__MACOSX/mine/cat/._0.png": b"x"},
    "train and val": {"train/cat/0.png": 1, "val/dog/0.png": 2},
    "metadata": {
        "0.png": 1,
        "more/1.png": 2,
        "metadata.jsonl": b'{"file_name": "0.png", "text": "a cat", "label": 4}\n'
        b'{"file_name": "more/1.png", "text": "a dog", "label": 0}',
    },
    "dataset.json": {
        "00000/img00000000.png": 1,
        "00000/img00000001.png": 2,
        "dataset.json": json.dumps(
            {"labels": [["00000/img00000000.png", 7], ["00000/img00000001.png", 0]]}
        ).encode(),
    },
    "captions beside": {"0.png": 1, "0.txt": b"a cat", "1.png": 2, "1.txt": b"a dog"},
    "records beside": {
        "0.png": 1,
        "0.json": b'{"caption": "a cat"}',
        "1.png": 2,
        "1.json": b'{"caption": "a dog"}',
    },
}


def described(source):
    found = open_collection(str(source), Reading(num_classes=0))
    items = [found.item(i) for i in range(len(found))]
    seen = [(int(item.pixels[0, 0]), item.label, item.caption) for item in items]
    return seen, list(found.class_names), dict(found.left_out), found.has_captions, list(found.notes)


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_its_folder_would_be(tmp_path, layout, compression):
    folder = put(tmp_path / "data", FOLDERS[layout])
    archive = zipped(tmp_path / "data.zip", FOLDERS[layout], compression)
    assert described(archive) == described(folder)
    found = open_collection(str(archive))
    assert found.name == "data" and found.identity() == open_collection(str(folder)).identity()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.zip"], "nothing was unpacked"


def test_a_zip_in_a_run(tmp_path):
    split = load_data(zipped(tmp_path / "d.zip", {f"{i % 2}/{i}.png": i for i in range(100)}))
    levels = {
        round(float(image[0, 0, 0] + 1) * 127.5)
        for part in (split.train, split.heldout)
        for image in part.images
    }
    assert levels == set(range(100)) and split.train.num_classes == 2


def test_names_that_lead_out_of_a_zip_are_left_out(tmp_path):
    put(tmp_path, {"secret.png": 9})
    names = ["../secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"]
    archive = zipped(
        tmp_path / "d.zip", {"win\\dir\\0.png": 1, "win\\dir\\1.png": 2, **dict.fromkeys(names, 5)}
    )
    found = open_collection(str(archive))
    assert sorted(int(found.item(i).pixels[0, 0]) for i in range(len(found))) == [1, 2]
    assert found.left_out["name outside the archive"] == len(names)


def test_a_record_in_a_zip_cannot_name_a_file_outside(tmp_path):
    put(tmp_path, {"secret.png": 9})
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        line = json.dumps({"file_name": name, "text": "it"}).encode()
        with pytest.raises(DataError, match="lies outside .*d.zip; .*--anywhere"):
            open_collection(str(zipped(tmp_path / "d.zip", {"0.png": 1, "metadata.jsonl": line})))


def test_a_link_in_a_zip_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("0.png", png(1))
        link = zipfile.ZipInfo("1.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    assert open_collection(str(tmp_path / "d.zip")).left_out == {"link in an archive": 1}


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(zips, "MOST_BYTES", 2**20)
    bomb = png(1) + bytes(2**22)
    found = open_collection(str(zipped(tmp_path / "d.zip", {"0.png": bomb, "1.png": 3})))
    assert (tmp_path / "d.zip").stat().st_size < 2**14 and found.item(1).pixels[0, 0] == 3
    with pytest.raises(DataError, match="d.zip/0.png unpacks to 4 MiB, more than a picture has; take it out"):
        found.item(0)


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    archive = zipped(tmp_path / "d.zip", {"0.png": png(1) + bytes(2**22)})
    contents = bytearray(archive.read_bytes())
    size = struct.pack("<I", len(png(1)) + 2**22)
    for place in (contents.index(size), contents.rindex(size)):
        contents[place : place + 4] = struct.pack("<I", len(png(1)))
    archive.write_bytes(contents)
    with pytest.raises(DataError, match="cannot unpack .*0.png .*copy the archive again"):
        open_collection(str(archive)).item(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[: len(data) // 2], "cannot read .*d.zip as a zip .*copy it again"),
        (lambda data: b"x", "cannot read .*d.zip as a zip"),
        (
            lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\x01"),
            "is encrypted; unpack the archive",
        ),
        (lambda data: data.replace(b"IDAT", b"XXXX"), "cannot unpack .*0.png"),
    ],
)
def test_a_damaged_zip_is_one_sentence(tmp_path, change, says):
    archive = zipped(tmp_path / "d.zip", {"0.png": 1}, zipfile.ZIP_STORED)
    archive.write_bytes(change(archive.read_bytes()))
    with pytest.raises(DataError, match=says) as error:
        open_collection(str(archive)).item(0)
    assert "\n" not in str(error.value)
