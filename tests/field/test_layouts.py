"""Layouts of other programs: parts of larger sets, numbered folders, named shards, grey of few bits."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from small_files import png, put, tar

from momatch.data.image_io import DataError, read_picture
from momatch.data.reading import Reading
from momatch.data.sources import load_data, open_collection

TWELVE = {str(i): i for i in range(12)}


def labels(source, **reading):
    """Level → label of every picture."""
    found = open_collection(str(source), Reading(**reading))
    items = [found.item(i) for i in range(len(found))]
    return {int(item.pixels.flat[0]): item.label for item in items}


def packed_png(depth, key=None):
    """A grey PNG of `depth` bits, 64×64: a checkerboard of 0 and 1, one of which may be transparent."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = np.indices((64, 64)).sum(0) % 2
    rows = ["".join(f"{value:0{depth}b}" for value in row) for row in bits]
    raw = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    clear = b"" if key is None else chunk(b"tRNS", struct.pack(">H", key))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + clear + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_key_of_a_grey_png_of_few_bits_is_laid_on_white(depth, size):
    one = 255 / (2**depth - 1)
    for key, mean in ((None, one / 2), (0, (255 + one) / 2), (1, 255 / 2)):
        found = read_picture(packed_png(depth, key), "packed", size)
        np.testing.assert_allclose(found.mean(), mean, atol=0.51)


@pytest.mark.parametrize("kind", ["folders", "folders in a tar", "texts of metadata", "texts of KEY.json"])
def test_of_more_classes_numbers_keep_their_number(tmp_path, kind):
    numbers = {10: 2, 20: 7, 30: 999}
    if kind.startswith("folders"):
        files = {f"{number}/0.png": level for level, number in numbers.items()}
    else:
        files = {f"{level}.png": level for level in numbers}
    if kind == "texts of metadata":
        rows = [{"file_name": f"{level}.png", "label": str(n)} for level, n in numbers.items()]
        files["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "texts of KEY.json":
        files |= {f"{level}.json": json.dumps({"label": str(n)}).encode() for level, n in numbers.items()}
    in_tar = kind in ("folders in a tar", "texts of KEY.json")
    source = tar(tmp_path / "data.tar", files) if in_tar else put(tmp_path / "data", files)
    assert labels(source, num_classes=1000) == numbers
    assert labels(source) == {10: 0, 20: 1, 30: 2}


@pytest.mark.filterwarnings("ignore::momatch.utils.errors.Notice")
def test_folders_that_are_numbers_beyond_the_classes_are_refused(tmp_path):
    source = put(tmp_path / "data", {f"{i % 3 * 50}/{i}.png": i for i in range(120)})
    with pytest.raises(DataError, match="labels from 0 to 100 on 120 pictures.* num_classes is 100"):
        load_data(str(source), reading=Reading(num_classes=100))
    assert load_data(str(source), reading=Reading(num_classes=101)).train.num_classes == 101


@pytest.mark.parametrize("make", [put, tar])
@pytest.mark.parametrize("above", ["", "x/", "./x/", "x/y/", "train/", "x/train/"])
def test_numbers_below_a_common_folder_are_no_words(tmp_path, make, above):
    name = "data.tar" if make is tar else "data"
    source = make(tmp_path / name, {f"{above}{folder}/0.png": level for folder, level in TWELVE.items()})
    assert labels(source) == {i: i for i in range(12)}
    assert list(open_collection(str(source)).class_names) == list(TWELVE)


@pytest.mark.parametrize("make", [put, tar])
@pytest.mark.parametrize("name", ["{0:05d}/img{1:08d}.png", "{2:05d}/{1:05d}.png"], ids=["EDM", "FFHQ"])
def test_folders_of_numbered_files_are_no_classes(tmp_path, make, name):
    places = {0: 0, 1: 1, 1000: 2, 1999: 3, 2000: 4}
    files = {name.format(n // 1000, n, n // 1000 * 1000): level for n, level in places.items()}
    found = open_collection(str(make(tmp_path / ("data.tar" if make is tar else "data"), files)))
    assert not found.class_names and {found.item(i).label or 0 for i in range(5)} == {0}
    assert "folders hold the thousands of numbered files" in found.summary()


def test_numbered_files_of_other_thousands_are_in_classes(tmp_path):
    source = put(tmp_path / "data", {"00001/00001.png": 1, "00002/00002.png": 2})
    assert labels(source) == {1: 0, 2: 1}


def test_folders_that_name_their_shard_are_no_classes(tmp_path):
    for i in range(2):
        tar(tmp_path / "data" / f"{i}.tar", {f"{i:05d}/{k}.png": 10 * i + k for k in range(2)})
    assert set(labels(tmp_path / "data").values()) == {None}
    assert "folders are no classes" in open_collection(str(tmp_path / "data")).summary()
    tar(tmp_path / "data" / "2.tar", {"00000/7.png": 7})
    assert labels(tmp_path / "data") == {0: 0, 1: 0, 7: 0, 10: 1, 11: 1}, "a folder in two shards is a class"


def test_shards_of_several_parts_are_said_to_be_read_as_one(tmp_path):
    for name in ("in1k-train-0.tar", "in1k-validation-0.tar"):
        tar(tmp_path / "data" / name, {"0.png": png(1)})
    assert (
        "shards of train, validation are read as one set" in open_collection(str(tmp_path / "data")).summary()
    )
    (tmp_path / "data" / "in1k-validation-0.tar").rename(tmp_path / "data" / "in1k-train-1.tar")
    assert open_collection(str(tmp_path / "data")).is_plain
