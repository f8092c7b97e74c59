"""Folders of idx files, as MNIST, Fashion-MNIST and their like are published: read as they come, .gz or not.

A file begins with two zero bytes, a byte for the type of its numbers (8: uint8), a byte for how many
dimensions it has, and each dimension as a big-endian uint32; the numbers follow, the last dimension running
fastest.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.data.collections import Collection, Item, digest
from momatch.data.folders import Tree
from momatch.data.image_io import DataError, central_square
from momatch.data.images import ImageSet, Split, stratified_split
from momatch.data.rows import Pixels, to_unit
from momatch.utils.text import count_of

UINT8, GZIP = 8, b"\x1f\x8b"
IMAGES = re.compile(r"(?P<part>train|t10k|test)-images([-.]idx3-ubyte)(\.gz)?$")
LABELS = {"-images": "-labels", "idx3": "idx1"}
HELDOUT_FRACTION = 0.1


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file, compressed or not, whatever its name.

    Raises:
        DataError: if it is no such file, cut short, or of other numbers than uint8.
    """
    try:
        contents = path.read_bytes()
        contents = gzip.decompress(contents) if contents.startswith(GZIP) else contents
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}); fetch it again") from None
    if len(contents) < 4 or contents[:2] != b"\0\0" or contents[2] != UINT8:
        raise DataError(
            f"{path} begins with the bytes {contents[:4].hex(' ')}, but an idx file of uint8 numbers begins "
            "with 00 00 08; fetch it again"
        )
    start = 4 + 4 * contents[3]
    shape = np.frombuffer(contents[4:start], ">u4").tolist() if len(contents) >= start else []
    if len(shape) != contents[3] or len(contents) - start != math.prod(shape):
        raise DataError(
            f"{path} holds {len(contents):,} bytes, which does not fit its own dimensions {shape}; "
            "it is cut short, so fetch it again"
        )
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)


def image_files(tree: Tree) -> list[Path]:
    """The idx files of images that lie in a folder itself."""
    return [file for file in tree.files if file.parent == tree.root and IMAGES.search(file.name)]


class Idx(Collection):
    """Images and labels of idx files: those for training first, then those for testing.

    Args:
        tree: the folder; beside `train-images-idx3-ubyte` lies `train-labels-idx1-ubyte`, and the same with
            t10k or test, or no test images at all.

    Attributes:
        images: (N, H, W) uint8.
        held_out: how many of them, the last ones, are test images; 0 if the folder has none.

    Raises:
        DataError: if the files do not fit together.
    """

    def __init__(self, tree: Tree):
        self.name, self.path = tree.root.name, tree.root
        self.files: list[Path] = []
        train, test = (self._part(tree, parts) for parts in (("train",), ("t10k", "test")))
        if train is None:
            raise DataError(f"{tree.root} has test images but no train-images-idx3-ubyte; add it")
        parts = [train] if test is None else [train, test]
        if len(self.files) % len(parts):
            raise DataError(f"{tree.root} has labels of one part of its images alone; fetch the others too")
        shapes = [images.shape[1:] for images, _ in parts]
        if len(set(shapes)) > 1:
            raise DataError(f"{tree.root} has training images of {shapes[0]} and test images of {shapes[1]}")
        self.images = np.concatenate([images for images, _ in parts])
        self._labels = np.concatenate([labels for _, labels in parts])
        self.labels = self._labels.tolist()
        self.held_out = 0 if test is None else len(test[0])
        if self.held_out:
            self.notes = [f"{count_of(self.held_out, 'test image')} among them, as published"]
        self.left_out = tree.without(self.files)

    def __len__(self) -> int:
        return len(self.images)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        from PIL import Image as pil

        pixels = self.images[i]
        if image_size:
            pixels = np.asarray(central_square(pil.fromarray(pixels), image_size, smooth))
        return Item(pixels, None, int(self._labels[i]), f"{self.path}, picture {i}")

    def identity(self) -> str:
        """See `Collection`."""
        return digest([f"{file.name} {file.stat().st_size}" for file in self.files])

    def _part(self, tree: Tree, parts: Iterable[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Images and labels of a part of the data; None if there is no such part."""
        names = [(file, IMAGES.search(file.name)) for file in image_files(tree)]
        found = [file for file, match in names if match and match["part"] in parts]
        if not found:
            return None
        if len(found) > 1:
            raise DataError(
                f"{found[0]} and {found[1]} are both images of the same part; move one set of files elsewhere"
            )
        file = found[0]
        name = file.name
        for old, new in LABELS.items():
            name = name.replace(old, new)
        plain = name.removesuffix(".gz")
        beside = [path for path in tree.files if path.parent == tree.root]
        labels_file = next((path for path in beside if path.name in (plain, f"{plain}.gz")), None)
        images = read_idx(file)
        if images.ndim != 3:
            raise DataError(f"{file} has the shape {images.shape}; images have (N, H, W)")
        labels = np.zeros(len(images), np.uint8) if labels_file is None else read_idx(labels_file)
        if labels.shape != images.shape[:1]:
            raise DataError(
                f"{labels_file} has the shape {labels.shape}, {file} {images.shape}; fetch both again"
            )
        self.files += [file, *([labels_file] if labels_file else [])]
        return images, labels


def to_split(found: Idx, num_classes: int, image_size: int = 0, **fields: object) -> Split:
    """Training and test images as published; a tenth of every class is held out where none are for testing.

    Args:
        found: the images.
        num_classes: of them.
        image_size: side to which they are reduced by exact means over squares of pixels, in float32; 0 takes
            them as they are.
        fields: of `ImageSet`.

    Raises:
        DataError: if that side does not divide theirs.
    """
    images = ImageSet(
        _reduced(torch.from_numpy(found.images)[:, None], image_size, found.path),
        torch.tensor(found.labels),
        num_classes,
        **{"name": found.name, **fields},  # type: ignore[arg-type]
    )
    if not found.held_out:
        return stratified_split(images, HELDOUT_FRACTION, seed=0)
    rows, first = torch.arange(len(found)), len(found) - found.held_out
    return Split(
        images.subset(rows[:first], f"{images.name}-train"),
        images.subset(rows[first:], f"{images.name}-test"),
    )


def _reduced(levels: Tensor, image_size: int, path: Path) -> Tensor | Pixels:
    """(N, 1, H, W) uint8 → images of that side."""
    height, width = levels.shape[2:]
    if not image_size or (height, width) == (image_size, image_size):
        return Pixels(levels)
    if height != width or height % image_size:
        halves = ", ".join(str(n) for n in range(4, height) if height % n == 0)
        raise DataError(
            f"image_size is {image_size}, but {path} has images of {width}×{height}, which are reduced by "
            f"whole factors only; use {halves if halves and height == width else '0 (as they are)'}"
        )
    # Means of squares: kept as float32, since rounding them to levels would add noise to what is learnt.
    return to_unit(F.avg_pool2d(levels.float(), height // image_size))
