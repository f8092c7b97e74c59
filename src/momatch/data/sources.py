"""From a name or a path to a `Split`: the built-in digits or emoji, pictures in a folder, an .npz, a tar or
on the hub, or what `momatch prepare` made of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from momatch.data.collections import METADATA, USUAL, Collection, Fields, Folder, ImageFolder, Item, Npz
from momatch.data.digits import load_digits
from momatch.data.emoji import load_emoji
from momatch.data.hub import PREFIX, Hub
from momatch.data.image_io import DataError
from momatch.data.images import ImageSet, Split, random_split, stratified_split
from momatch.data.prepared import is_prepared, load_prepared
from momatch.data.rows import Pixels
from momatch.data.tars import Tars

__all__ = ["DataError", "load_data", "open_collection"]

HELDOUT_FRACTION = 0.1
MIN_PICTURES = 100


def load_data(source: str, image_size: int = 0) -> Split:
    """Load pictures and hold some out.

    Args:
        source: one of these; of all but the digits a tenth of every class is held out, always the same.

            - "digits"
            - "emoji": captioned pictures, 32×32, or 16×16 by image_size
            - a folder of equally sized pictures, the classes in subfolders (or none)
            - a folder with metadata.jsonl: {"file_name": …, "text": …, "label": …} for each picture
            - an .npz with `images` (N, H, W[, C]) uint8 and, for a conditional model, `labels` (N,) integers
            - a .tar, or a folder of them, in the manner of webdataset
            - "hf:ORG/NAME[:SPLIT]", a data set of the Hugging Face hub
            - a folder that `momatch prepare` wrote: latents or pictures, with prompt embeddings
        image_size: pictures are cut to their central square and reduced to this side; 0 takes them as they
            are. Those of an .npz or a prepared folder are never resized.

    Raises:
        DataError: if the path is missing or empty, or the pictures do not fit together.
    """
    if source == "digits":
        if image_size not in (0, 8):
            raise DataError(f"image_size is {image_size}, but the built-in digits are 8×8; leave it out")
        return load_digits()
    if source == "emoji":
        return load_emoji(image_size)
    if not source.startswith(PREFIX) and is_prepared(Path(source)):
        return _split(_prepared(Path(source), image_size), source)
    collection = open_collection(source)
    images, labels, captions = _read_all(collection, 0 if isinstance(collection, Npz) else image_size)
    _check_pictures(images, source, image_size)
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(images):
        raise DataError(
            f"{source} has labels from {int(labels.min())} to {int(labels.max())} on {len(images)} pictures; "
            "labels count from 0, one for each class"
        )
    pictures = ImageSet(images, labels, int(labels.max()) + 1, collection.name, captions=captions)
    return _split(pictures, source)


def open_collection(source: str, fields: Fields = USUAL) -> Collection:
    """The pictures of a source one by one; for the kinds of source see `load_data`.

    Raises:
        DataError: if there is nothing that can be read.
    """
    if source.startswith(PREFIX):
        return Hub(source, fields)
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"no data at {source!r}; give 'digits', 'emoji', a folder, an .npz, a .tar or hf:ORG/NAME"
        )
    if path.suffix == ".npz":
        return Npz(path)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return Tars(path, fields)
    if path.is_dir() and any(path.rglob(METADATA)):
        return ImageFolder(path, fields)
    return Folder(path)


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


def _read_all(collection: Collection, image_size: int) -> tuple[Pixels, Tensor, list[str] | None]:
    """All pictures as (N, C, H, W) levels, their labels (0 where there are none) and captions."""
    if isinstance(collection, Npz):
        levels = torch.from_numpy(collection.images)
        levels = levels[:, None] if levels.ndim == 3 else levels.permute(0, 3, 1, 2).contiguous()
        return Pixels(levels), torch.from_numpy(collection.labels), None
    first, n = collection.item(0, image_size), len(collection)
    levels = np.empty((n, *_channels_first(first.pixels).shape), np.uint8)
    labels, captions = torch.zeros(n, dtype=torch.int64), []
    for i in range(n):
        item = collection.item(i, image_size)
        _check_same(item, first)
        levels[i] = _channels_first(item.pixels)
        labels[i] = item.label or 0
        captions.append(item.caption)
    return Pixels(torch.from_numpy(levels)), labels, captions if collection.has_captions else None


def _check_same(item: Item, first: Item) -> None:
    if item.pixels.shape != first.pixels.shape:
        raise DataError(
            f"{item.name} has shape {item.pixels.shape}, {first.name} has {first.pixels.shape}; "
            "convert all pictures to one size, and all to grey or all to RGB"
        )


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
