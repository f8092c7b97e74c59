"""Pictures one by one, each with caption and label: what `load_data` and `momatch prepare` read."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from momatch.data.image_io import SUFFIXES, DataError, central_square, read_picture

CAPTION_FIELDS = ("text", "caption", "captions", "prompt")
LABEL_FIELDS = ("label", "labels", "class")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        pixels: uint8 (H, W) or (H, W, 3).
        caption: its text, or None.
        label: its class, or None.
        name: what to call it in an error.
    """

    pixels: np.ndarray
    caption: str | None
    label: int | None
    name: str


@dataclass(frozen=True)
class Fields:
    """Which entries of a picture's record are its caption and its label; "" looks for the usual names."""

    caption: str = ""
    label: str = ""


USUAL = Fields()


class Collection(ABC):
    """Pictures that can be read one by one, in a fixed order.

    Attributes:
        name: how tables and reports call them.
        has_captions: whether every picture has a caption.
        caption_help: if not, what the captions were looked for under.
    """

    name: str
    has_captions: bool = False
    caption_help: str = "this kind of source has none: use a folder with metadata.jsonl, or tar shards"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """The picture at i; for `image_size` and `smooth` see `pictures.read_picture`.

        Raises:
            DataError: if it cannot be read.
        """

    @abstractmethod
    def identity(self) -> str:
        """Hexadecimal digits that change if files are added, removed, renamed or resized."""


class Folder(Collection):
    """A folder of pictures, the classes in subfolders (or none)."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise DataError(f"{path} is neither a folder of pictures nor an .npz file, nor a .tar")
        self.name, self.path = path.stem, path
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise DataError(f"no pictures in {path}; put {', '.join(sorted(SUFFIXES))} files there")
        classes = sorted({file.parent for file in self.files})
        self.labels = {folder: i for i, folder in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.files)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        file = self.files[i]
        pixels = read_picture(file, str(file), image_size, smooth)
        return Item(pixels, None, self.labels[file.parent], str(file))

    def identity(self) -> str:
        """See `Collection`."""
        return digest(f"{file.relative_to(self.path)} {file.stat().st_size}" for file in self.files)


class ImageFolder(Collection):
    """The imagefolder convention: metadata.jsonl beside the pictures, a line {"file_name": …, …} for each."""

    def __init__(self, path: Path, fields: Fields = USUAL):
        self.name, self.path = path.stem, path
        self.records = [record for file in sorted(path.rglob(METADATA)) for record in _records(file)]
        for file, where, _ in self.records:
            if not file.is_file():
                raise DataError(
                    f"{where} names {file.name!r}, but there is no {file}; add it or drop the line"
                )
        rows = [(where, record) for _, where, record in self.records]
        self.captions = column(rows, fields.caption, CAPTION_FIELDS)
        self.labels = to_labels(column(rows, fields.label, LABEL_FIELDS), str(path))
        self.has_captions = self.captions is not None
        self.caption_help = "its metadata.jsonl has " + _fields_help(rows[0][1] if rows else {})
        if not self.records:
            raise DataError(f"{path / METADATA} names no pictures; write a line for each, with its file_name")

    def __len__(self) -> int:
        return len(self.records)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        file = self.records[i][0]
        caption = None if self.captions is None else as_caption(self.captions[i], str(file))
        label = None if self.labels is None else self.labels[i]
        return Item(read_picture(file, str(file), image_size, smooth), caption, label, str(file))

    def identity(self) -> str:
        """See `Collection`; the records count too."""
        return digest(
            f"{file.relative_to(self.path)} {file.stat().st_size} {json.dumps(record, sort_keys=True)}"
            for file, _, record in self.records
        )


class Npz(Collection):
    """An .npz with `images` (N, H, W[, C]) uint8 and perhaps `labels` (N,) integers."""

    def __init__(self, path: Path):
        self.name, self.path = path.stem, path
        self.images, self.labels = _read_npz(path)

    def __len__(self) -> int:
        return len(self.images)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        from PIL import Image as pil

        pixels = self.images[i]
        pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        if image_size:
            pixels = np.asarray(central_square(pil.fromarray(pixels), image_size, smooth))
        return Item(pixels, None, int(self.labels[i]), f"{self.path}, picture {i}")

    def identity(self) -> str:
        """See `Collection`."""
        return digest([f"{self.path.name} {self.path.stat().st_size}"])


def column(
    rows: Sequence[tuple[str, Mapping[str, Any]]], wanted: str, usual: Iterable[str]
) -> list[Any] | None:
    """One field of all records; None if the first record has none of the usual names.

    Args:
        rows: (what to call it in an error, the record) of each.
        wanted: the field's name; "" takes the first of the usual ones that the first record has.
        usual: names to look for.

    Raises:
        DataError: if `wanted`, or what the first record has, is absent from a record.
    """
    first = rows[0][1] if rows else {}
    name = wanted or next((name for name in usual if name in first), None)
    if name is None:
        return None
    for where, record in rows:
        if name in record and record[name] is None:
            raise DataError(f"{where} has nothing in its field {name!r}; fill it in, or name another field")
        if name not in record:
            have = ", ".join(record) or "nothing"
            raise DataError(f"{where} has no field {name!r} (it has {have}); add it, or name another field")
    return [record[name] for _, record in rows]


def to_labels(values: list[Any] | None, name: str) -> list[int] | None:
    """Labels as integers from 0: whole numbers as they are, texts in alphabetical order.

    Raises:
        DataError: if they are neither all whole numbers nor all texts.
    """
    if values is None or all(type(value) is int for value in values):
        return values
    if not all(isinstance(value, str) for value in values):
        first = values[0]
        odd = next((value for value in values if type(value) is not type(first)), first)
        raise DataError(f"{name} has the label {odd!r}; labels are whole numbers from 0, or all texts")
    order = {value: i for i, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]


def as_caption(value: Any, name: str) -> str:
    """A caption; of several the first.

    Raises:
        DataError: if it is no text.
    """
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str):
        raise DataError(f"the caption of {name} is {value!r}; a caption is a text")
    return value


def digest(lines: Iterable[str]) -> str:
    """16 hexadecimal digits of some lines."""
    found = hashlib.blake2b(digest_size=8)
    for line in lines:
        found.update(line.encode() + b"\n")
    return found.hexdigest()


def _records(file: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """(the picture's path, "file, line n", record) of each line."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found.append((file.parent / record["file_name"], where, record))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{where} is not an object with a "file_name"; repair it: {line[:60]!r}'
            ) from None
    return found


def _fields_help(record: Mapping[str, Any]) -> str:
    have = ", ".join(record) or "no fields"
    return f"{have}, none of {', '.join(CAPTION_FIELDS)}; name one by --caption-field"


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.zeros(len(images), dtype=np.int64)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, BadZipFile) as error:
        raise DataError(f"cannot read {path} as an .npz with an array 'images': {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"'images' in {path} is {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, C)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"'labels' in {path} is {labels.dtype} {labels.shape}; give one integer for each picture"
        )
    return images, labels.astype(np.int64)
