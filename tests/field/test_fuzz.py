"""Pictures and folders at random: never a traceback, and what is read and left out is all that lies there."""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_files import png

from momatch.data.collections import Collection, ImageFolder
from momatch.data.image_io import DataError, read_picture
from momatch.data.samples import Folder
from momatch.data.sources import open_collection

MUTATIONS = 400  # of each format
TREES = 150
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 4), dtype=np.uint8)


def saved(kind, **options):
    stream = io.BytesIO()
    image = Image.fromarray(PIXELS if options.pop("alpha", False) else PIXELS[:, :, :3])
    palette = options.pop("palette", False)
    (image.quantize(16) if palette else image).save(stream, format=kind, **options)
    return stream.getvalue()


FORMATS = {
    "PNG": saved("PNG"),
    "PNG with alpha": saved("PNG", alpha=True),
    "PNG of a palette": saved("PNG", palette=True, transparency=3),
    "JPEG": saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "progressive JPEG": saved("JPEG", progressive=True),
    "WebP": saved("WEBP"),
    "lossless WebP": saved("WEBP", lossless=True, alpha=True),
    "BMP": saved("BMP"),
    "BMP of a palette": saved("BMP", palette=True),
    "TIFF": saved("TIFF"),
    "packed TIFF": saved("TIFF", compression="tiff_lzw"),
    "GIF": saved("GIF", palette=True, transparency=3),
}


def mutated(contents: bytes, random: np.random.Generator) -> bytes:
    """One to four of: bytes replaced, a piece cut out, doubled, or the end cut off."""
    data = bytearray(contents)
    for _ in range(random.integers(1, 5)):
        start = int(random.integers(0, max(len(data), 1)))
        length = int(random.integers(1, 9))
        kind = random.integers(0, 4)
        if kind == 0:
            data[start : start + length] = random.bytes(length)
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = data[start : start + length]
        elif random.random() < 0.3:
            del data[start:]
    return bytes(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_read_or_refused_in_one_sentence(kind):
    random, outcomes = np.random.default_rng(1), Counter()
    for i in range(MUTATIONS):
        contents = mutated(FORMATS[kind], random)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on damage
                # No mutation may cost more memory than a machine has: what is larger is refused.
                pixels = read_picture(contents, "it", 8 if i % 2 else 0, max_megapixels=4)
        except DataError as error:
            assert "\n" not in str(error) and "it" in str(error)
            outcomes["refused"] += 1
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and pixels.size
            assert pixels.ndim == 2 or pixels.shape[2] == 3
            assert i % 2 == 0 or pixels.shape[:2] == (8, 8)
            outcomes["read"] += 1
    assert outcomes["refused"] and outcomes.total() == MUTATIONS


NAMES = st.sampled_from(
    ["cat", "dog", "0", "10", "9", "train", "val", "test", ".git", "__MACOSX", "é", "a b"]
)
STEMS = st.sampled_from(["0", "1", "2", "a.b", ".hidden", "._0", "é", "metadata"])
ENDINGS = st.sampled_from(
    [".png", ".PNG", ".jpg", ".tif", ".heic", ".txt", ".cls", ".caption", ".json", ".md", "", ".csv"]
)
FILES = st.tuples(st.lists(NAMES, max_size=3), STEMS, ENDINGS)
LINKS = st.tuples(
    st.lists(NAMES, max_size=2), STEMS, st.sampled_from(["above", "outside", "nothing", "file"])
)
METADATA = st.sampled_from(["none", "none", "jsonl", "csv"])


def build(root: Path, files, links, metadata) -> None:
    """A tree of these; whatever clashes with what is there already is passed over."""
    outside = root.with_name("outside")
    for folder in (root, outside):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    (outside / "linked.png").write_bytes(PNG)
    for folders, stem, ending in files:
        path = root.joinpath(*folders, stem + ending)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PNG if ending.lower() in (".png", ".jpg", ".tif") else b"text")
        except OSError:
            continue
    targets = {"above": root, "outside": outside, "nothing": root / "gone", "file": outside / "linked.png"}
    for folders, stem, target in links:
        path = root.joinpath(*folders, stem + (".png" if target in ("nothing", "file") else ""))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(targets[target])
        except OSError:
            continue
    pictures = [os.path.relpath(path, root) for path in sorted(root.rglob("*.png")) if path.is_file()][:4]
    if metadata == "jsonl":
        lines = [json.dumps({"file_name": name, "text": "it"}) for name in pictures]
        (root / "metadata.jsonl").write_text("\n".join(lines))
    elif metadata == "csv":
        (root / "metadata.csv").write_text(
            "\n".join(["file_name,label", *(f"{name},1" for name in pictures)])
        )


PNG = png()


def entries(folder: Path, above: tuple[str, ...] = ()) -> int:
    """Files that lie under a folder, links followed, each broken link and each loop as one."""
    here, total = (*above, os.path.realpath(folder)), 0
    for name in os.listdir(folder):
        path = folder / name
        if not path.is_dir():
            total += 1
        elif path.is_symlink() and os.path.realpath(path) in here:
            total += 1
        else:
            total += entries(path, here)
    return total


def used(found: Collection) -> int:
    """Files that are read: pictures, captions beside them, records."""
    if isinstance(found, ImageFolder):
        pictures = {record.file for record in found.records}
        return len(pictures) + len({record.where.rpartition(", line")[0] for record in found.records})
    assert isinstance(found, Folder)
    return len(found.files) + len({*found.sidecars})


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_read_or_refused_in_one_sentence(tmp_path, compression):
    random, outcomes = np.random.default_rng(2), Counter()
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in ("cat/0.png", "cat/0.txt", "dog/1.png", "dog/1.txt", "../x.png", "metadata.json"):
            archive.writestr(name, PNG if name.endswith(".png") else "a text")
    whole = path.read_bytes()
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(whole, random))
        try:
            found = open_collection(str(path))
            for i in range(len(found)):
                found.item(i)
            assert found.identity() and "\n" not in found.summary()
        except DataError as error:
            assert "\n" not in str(error) and "d.zip" in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > MUTATIONS / 4 and outcomes["read"], outcomes


def test_what_is_read_and_left_out_is_all_that_lies_there(tmp_path):
    root, outcomes = tmp_path / "root", Counter()

    @settings(max_examples=TREES, deadline=None, derandomize=True, database=None)
    @given(st.lists(FILES, max_size=14), st.lists(LINKS, max_size=3), METADATA)
    def check(files, links, metadata):
        build(root, files, links, metadata)
        try:
            found = open_collection(str(root))
        except DataError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        assert used(found) + found.left_out.total() == entries(root), found.summary()
        labels = [found.item(i).label for i in range(len(found))]
        if found.class_names:
            assert set(labels) == set(range(len(found.class_names))), "every class has a picture"
        assert len(found.identity()) == 16 and "\n" not in found.summary()

    check()
    assert outcomes["read"] > TREES / 4 and outcomes["refused"] > TREES / 50, outcomes
