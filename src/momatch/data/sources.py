"""From a name or a path to a `Split`: digits, emoji and Fashion-MNIST by name, pictures in a folder, idx
files, an .npz, a tar, a .parquet or on the hub, or what `momatch prepare` made of them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from momatch.data import fashion
from momatch.data.collections import Collection, ImageFolder, Item, Npz, has_metadata
from momatch.data.digits import load_digits
from momatch.data.emoji import load_emoji
from momatch.data.folders import Tree, walk
from momatch.data.hub import PREFIX, Hub, is_saved, parquet_files
from momatch.data.idx import Idx, image_files, to_split
from momatch.data.image_io import DataError
from momatch.data.images import ImageSet, Split, random_split, stratified_split
from momatch.data.prepared import is_prepared, load_prepared
from momatch.data.readable import Readable
from momatch.data.reading import USUAL, Reading
from momatch.data.records import check_labels
from momatch.data.rows import Pixels
from momatch.data.samples import Folder
from momatch.data.tars import TARS, Tars, expand
from momatch.data.tokens import is_tokens, load_tokens
from momatch.data.vectors import is_vectors, load_vectors
from momatch.data.zips import ZipTree
from momatch.utils.errors import Notice
from momatch.utils.files import as_path
from momatch.utils.settings import shown

__all__ = ["BY_NAME", "DataError", "available", "load_data", "open_collection"]

BY_NAME = ("digits", "emoji", fashion.NAME)  # need no path and no preparation
HELDOUT_FRACTION = 0.1
MIN_PICTURES = 100


def load_data(source: str | Path, image_size: int = 0, reading: Reading = USUAL) -> Split:
    """Load pictures and hold some out; a `Notice` says what was read, in which classes, and what left out.

    Args:
        source: one of these; a tenth of every class is held out, always the same, unless the data come with
            test images, or are the digits.

            - "digits"
            - "emoji": captioned pictures, 32×32, or 16×16 by image_size
            - "fashion-mnist": 28×28, or 14×14 by image_size, if its files are installed
            - a folder of idx files, as MNIST is published, .gz or not; its test images are the held-out ones
            - a folder of equally sized pictures, the classes in subfolders (or none), a caption in KEY.txt
              beside KEY.png (or none)
            - a folder with metadata.jsonl or metadata.csv: file_name, text and label of each picture
            - an .npz with `images` (N, H, W[, C]) uint8 and, for a conditional model, `labels` (N,) integers
            - a .tar or .tar.gz, a folder of them, or a pattern such as "shards/{000..012}.tar", in the manner
              of webdataset
            - a .zip of any such folder, as the tools of StyleGAN and EDM make them, read as it is
            - an .npz or .safetensors with `x` (N, …), vectors or trajectories, and conditions by name
            - a .txt in UTF-8, cut into rows of characters or bytes, or an .npz with `tokens` (N, L)
            - a .parquet, a folder of them, or a pattern such as "data/*.parquet": a column of images, perhaps
              one of labels and one of captions
            - a folder that the datasets library wrote (`save_to_disk`)
            - "hf:ORG/NAME[:SPLIT]", a data set of the Hugging Face hub, or hf:FOLDER:SPLIT for a split of one
              that lies here
            - a folder that `momatch prepare` wrote: latents or pictures, with prompt embeddings
        image_size: pictures are cut to their central square and reduced to this side; 0 takes them as they
            are. Those of an .npz or a prepared folder are never resized, those of idx files only by whole
            factors.
        reading: which entries of records are caption and label, how many classes there are, and what is
            allowed.

    Raises:
        DataError: if the path is missing or empty, or the pictures do not fit together.
    """
    source = _checked(source, image_size, reading)
    if source == "digits":
        if image_size not in (0, 8):
            raise DataError(f"image_size is {image_size}, but the built-in digits are 8×8; leave it out")
        return load_digits()
    if source == "emoji":
        return load_emoji(image_size)
    if source == fashion.NAME:
        return fashion.load_fashion(image_size)
    if not source.startswith(PREFIX) and is_prepared(Path(source)):
        return _split(_prepared(Path(source), image_size), source)
    if is_vectors(Path(source)):
        if image_size:
            raise DataError(
                f"image_size is {image_size}, but {source} holds vectors, no pictures; leave it out"
            )
        return load_vectors(Path(source), reading)
    if is_tokens(Path(source)):
        if image_size:
            raise DataError(f"image_size is {image_size}, but {source} holds tokens, no images; leave it out")
        return load_tokens(Path(source), reading)
    collection = open_collection(source, reading)
    if isinstance(collection, Idx):
        return _idx_split(collection, source, image_size, reading)
    images, labels, captions, grey = _read_all(collection, 0 if isinstance(collection, Npz) else image_size)
    if grey:
        collection.notes = [*collection.notes, f"{grey:,} grey among them are read as RGB"]
    if not collection.is_plain:
        warnings.warn(collection.summary(), Notice, stacklevel=2)
    _check_pictures(images, source, image_size)
    classes = check_labels(labels.tolist(), len(collection.class_names), reading.num_classes, source)
    names = tuple(collection.class_names)
    pictures = ImageSet(images, labels, classes, collection.name, captions=captions, class_names=names)
    return _split(pictures, source)


def _checked(source: object, image_size: object, reading: object) -> str:
    """The source's name; the command line gives these types, Python may give any."""
    as_path(source, "data")
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 0:
        raise DataError(f"image_size is {shown(image_size)}; give the side in pixels, or 0")
    if not isinstance(reading, Reading):
        raise DataError(f"reading is {shown(reading)}; give momatch.config.Reading(…)")
    return str(source)


def available(source: str) -> bool:
    """Whether the data are there, as far as can be told without reading them."""
    return (
        fashion.folder() is not None if source == fashion.NAME else source in BY_NAME or Path(source).exists()
    )


def open_collection(source: str, reading: Reading = USUAL) -> Collection:
    """The pictures of a source one by one; for the kinds of source see `load_data`.

    Raises:
        DataError: if there is nothing that can be read.
    """
    found = _opened(_checked(source, 0, reading), reading)
    if reading.skip_unreadable and not isinstance(found, (Idx, Npz)):  # which are one file
        found = Readable(found, reading.skip_unreadable)
    if reading.renumber_labels:
        found.renumber()
    return found


def _opened(source: str, reading: Reading) -> Collection:
    if source.startswith(PREFIX):
        return Hub(source, reading)
    path = Path(source)
    if parquet_files(source):
        return Hub(source, reading)
    if not path.exists():
        shards = expand(source)
        if shards:
            return Tars(shards, path.parent.name or "shards", reading)
        raise DataError(
            f"no data at {source!r}; give 'digits', 'emoji', 'fashion-mnist', a folder, an .npz, a .tar, a "
            ".zip, a .parquet or hf:ORG/NAME"
        )
    if path.suffix == ".npz":
        return Npz(path)
    if path.is_file() and path.name.lower().endswith(TARS):
        return Tars([path], path.stem, reading)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _folder(ZipTree(path), reading)
    if not path.is_dir():
        remedy = "; give its folder" if path.suffix in (".jsonl", ".csv") else ""
        raise DataError(
            f"{path} is neither a folder of pictures nor an .npz file, nor a .tar, .zip or .parquet{remedy}"
        )
    if is_saved(path):
        return Hub(source, reading)
    tree = walk(path)
    if image_files(tree):
        return Idx(tree)
    shards = [file for file in tree.files if file.name.lower().endswith(TARS)]
    if shards and (any(file.parent == path for file in shards) or not tree.pictures()):
        return Tars(shards, path.stem, reading, tree.without(shards))
    if tree.having([".parquet"]) and not tree.pictures():
        return Hub(source, reading)
    return _folder(tree, reading)


def _folder(tree: Tree, reading: Reading) -> Collection:
    return (ImageFolder if has_metadata(tree) else Folder)(tree, reading)


def _idx_split(collection: Idx, source: str, image_size: int, reading: Reading) -> Split:
    warnings.warn(collection.summary(), Notice, stacklevel=3)
    if len(collection) < MIN_PICTURES:
        raise DataError(f"{source} holds {len(collection)} pictures; {MIN_PICTURES} or more are needed")
    classes = check_labels(collection.labels or [0], 0, reading.num_classes, source)
    return to_split(collection, classes, image_size)


def _prepared(path: Path, image_size: int) -> ImageSet:
    images = load_prepared(path)
    made = images.origin.get("image_size")
    if image_size and made != image_size:
        raise DataError(f"image_size is {image_size}, but {path} was prepared at {made}; use {made} or 0")
    return images


def _split(pictures: ImageSet, source: str) -> Split:
    """Hold out a tenth of every class, or, of classes too small to give a tenth each, of all."""
    if len(pictures) < MIN_PICTURES:
        raise DataError(f"{source} holds {len(pictures)} pictures; {MIN_PICTURES} or more are needed")
    split = stratified_split(pictures, HELDOUT_FRACTION, seed=0)
    if len(split.heldout) < HELDOUT_FRACTION * len(pictures) / 2:
        split = random_split(pictures, HELDOUT_FRACTION, seed=0)
    return split


def _check_pictures(images: Pixels, source: str, image_size: int) -> None:
    if len(images) < MIN_PICTURES:
        raise DataError(f"{source} holds {len(images)} pictures; {MIN_PICTURES} or more are needed")
    if image_size and images.shape[2:] != (image_size, image_size):
        raise DataError(
            f"image_size is {image_size}, but {source} has pictures of {images.shape[2]}×{images.shape[3]}; "
            "only a folder's pictures are resized"
        )
    if images.shape[1] not in (1, 3) or not images[0].numel():
        raise DataError(
            f"{source} has pictures of {images.shape[1]} channels and {images.shape[2]}×{images.shape[3]} "
            "pixels; give grey (1) or RGB (3) pictures"
        )


def _read_all(collection: Collection, image_size: int) -> tuple[Pixels, Tensor, list[str] | None, int]:
    """All pictures as (N, C, H, W) levels, labels (0 where there are none), captions, grey ones among RGB."""
    if isinstance(collection, Npz):
        arrays = torch.from_numpy(collection.images)
        arrays = arrays[:, None] if arrays.ndim == 3 else arrays.permute(0, 3, 1, 2).contiguous()
        return Pixels(arrays), torch.tensor(collection.labels), None, 0
    first, n = collection.item(0, image_size), len(collection)
    levels: np.ndarray = np.empty((n, *_channels_first(first.pixels).shape), np.uint8)
    labels, captions, grey = torch.zeros(n, dtype=torch.int64), [], 0
    for i in range(n):
        item = collection.item(i, image_size)
        _check_same(item, first)
        pixels = _channels_first(item.pixels)
        grey += len(pixels) == 1
        if len(pixels) > levels.shape[1]:  # the first RGB after grey ones
            levels = np.repeat(levels, len(pixels), axis=1)
        levels[i] = pixels  # grey is spread over three channels
        labels[i] = item.label or 0
        captions.append(item.caption)
    mixed = grey if levels.shape[1] == 3 else 0
    return Pixels(torch.from_numpy(levels)), labels, captions if collection.has_captions else None, mixed


def _check_same(item: Item, first: Item) -> None:
    if item.pixels.shape[:2] != first.pixels.shape[:2]:
        sizes = [f"{pixels.shape[1]}×{pixels.shape[0]}" for pixels in (item.pixels, first.pixels)]
        raise DataError(
            f"{item.name} has {sizes[0]} pixels, {first.name} {sizes[1]}; "
            "convert all pictures to one size, or have them reduced to one by --image-size"
        )


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
