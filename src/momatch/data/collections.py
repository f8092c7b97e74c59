"""Pictures one by one, each with caption and label: what `load_data` and `momatch prepare` read."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from momatch.data.folders import Tree, listed
from momatch.data.image_io import DataError, central_square, on_white, read_picture
from momatch.data.reading import USUAL, Reading
from momatch.data.records import (
    CAPTION_FIELDS,
    DATASET,
    LABEL_FIELDS,
    METADATA,
    Labels,
    Record,
    all_fields,
    as_caption,
    as_number,
    column,
    dataset_has_labels,
    empty_note,
    fields_help,
    is_dataset,
    no_label_note,
    read_records,
    to_labels,
)
from momatch.utils.text import count_of

LISTED_CLASSES = 12  # that a summary names


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


Fields = Reading  # its former name


class Collection(ABC):
    """Pictures that can be read one by one, in a fixed order.

    Attributes:
        name: how tables and reports call them.
        has_captions: whether every picture has a caption.
        caption_help: if not, what the captions were looked for under.
        labels: of each picture; None if there are none.
        class_names: the classes in the order of their labels; empty if they have no names.
        left_out: what lies there and is not read: kind → how many.
        notes: what was decided in reading that the user may want otherwise, a clause each.
    """

    name: str
    has_captions: bool = False
    caption_help: str = "this kind of source has none: use a folder with metadata.jsonl, or tar shards"
    labels: Sequence[int] | None = None
    class_names: Sequence[str] = ()
    left_out: Counter[str] = Counter()
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """The picture at i; for `image_size` and `smooth` see `image_io.read_picture`.

        Raises:
            DataError: if it cannot be read.
        """

    @abstractmethod
    def identity(self) -> str:
        """Hexadecimal digits that change if files or classes are added, removed, renamed or resized."""

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to say but how many pictures there are."""
        return not (self.class_names or self.left_out or self.notes or self.empty_labels)

    @property
    def empty_labels(self) -> int:
        """Labels from 0 to the largest that no picture has."""
        return max(self.labels) + 1 - len(set(self.labels)) if self.labels else 0

    def renumber(self) -> None:
        """Number the labels anew, from 0, in their order; a class keeps its name, or its number as one."""
        if not self.labels:
            return
        occurring = sorted(set(self.labels))
        number = {label: i for i, label in enumerate(occurring)}
        if not self.class_names and occurring != list(range(len(occurring))):
            self.notes = [
                *self.notes,
                f"labels {occurring[0]} to {occurring[-1]} are numbered anew, 0 to {len(occurring) - 1}",
            ]
        self.class_names = [self.class_names[i] if self.class_names else str(i) for i in occurring]
        self.labels = [number[label] for label in self.labels]

    def class_counts(self) -> list[tuple[int, str, int]]:
        """(label, class, pictures in it) in order; of classes without names those that occur."""
        counts = Counter(self.labels or ())
        if self.class_names:
            return [(label, name, counts[label]) for label, name in enumerate(self.class_names)]
        return [(label, str(label), counts[label]) for label in sorted(counts)]

    def summary(self) -> str:
        """'read 1,240 pictures of 3 classes (cat 400, …); left out 12 .tif, 1 hidden file'."""
        words = f"read {count_of(len(self), 'picture')}"
        if self.class_names:
            shown = [f"{name} {count:,}" for _, name, count in self.class_counts()]
            more = len(shown) - LISTED_CLASSES
            shown = [*shown[:LISTED_CLASSES], f"and {more:,} more"] if more > 0 else shown
            words += f" of {count_of(len(self.class_names), 'class', 'classes')} ({', '.join(shown)})"
        empty = self.empty_labels
        some = [f"{empty:,} of the labels 0 to {max(self.labels or [0])} have no picture"] if empty else []
        left_out = [f"left out {listed(self.left_out)}"] if self.left_out else []
        return "; ".join([words, *self.notes, *some, *left_out])


class ImageFolder(Collection):
    """The imagefolder convention: metadata.jsonl (or .csv) beside the pictures, an entry for each.

    An entry has the file_name, from the folder of the metadata, and perhaps caption and label. The
    dataset.json of StyleGAN and EDM is read, too.
    """

    def __init__(self, tree: Tree, reading: Reading = USUAL):
        self.name, self.path, self.reading, self.tree = tree.root.stem, tree.root, reading, tree
        metadata = _metadata(tree)
        records = [record for file in metadata for record in _records(file, tree, reading.anywhere)]
        if not records:
            raise DataError(f"{metadata[0]} names no pictures; write a line for each, with its file_name")
        rows = [(record.where, record.entries) for record in records]
        captions = column(
            rows, reading.caption_field, CAPTION_FIELDS, may_lack=1.0 if reading.empty_captions else 0.0
        )
        values = column(rows, reading.label_field, LABEL_FIELDS, may_lack=0.5)
        self.has_captions = captions is not None
        self.caption_help = f"its {metadata[0].name} has " + fields_help(rows)
        self.notes: list[str] = []
        kept = list(range(len(records)))
        if values is not None:
            tables = all(file.suffix == ".csv" for file in metadata)  # which know texts alone
            known = as_number if tables or reading.num_classes else None
            labels = to_labels(values, str(self.path), known)
            self.class_names = labels.names
            kept = self._with_label(labels, records)
        else:
            self._note_no_label(records)
        self.records = [records[i] for i in kept]
        self.captions = captions and [captions[i] for i in kept]
        if self.captions and None in self.captions:
            self.notes += [empty_note(self.captions.count(None))]
            self.captions = ["" if caption is None else caption for caption in self.captions]
        self.left_out = tree.without([*metadata, *(record.file for record in records)])

    def _note_no_label(self, records: Sequence[Record]) -> None:
        """Say what is not read as a label, though it may have been meant for one."""
        if len({record.file.parent for record in records}) > 1:
            self.notes += ["its subfolders are not read as classes, since its metadata has no label"]
        if note := no_label_note(all_fields(record.entries for record in records)):
            self.notes += [note]

    def _with_label(self, labels: Labels, records: Sequence[Record]) -> list[int]:
        """The places of the records that have one."""
        kept = [i for i, number in enumerate(labels.numbers) if number is not None]
        self.labels = [number for number in labels.numbers if number is not None]
        lacking = len(records) - len(kept)
        if lacking:
            first = next(i for i, number in enumerate(labels.numbers) if number is None)
            self.notes += [f"not read: {lacking:,} without a label, such as {records[first].where}"]
        return kept

    def __len__(self) -> int:
        return len(self.records)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        file = self.records[i].file
        caption = None if self.captions is None else as_caption(self.captions[i], str(file))
        label = None if self.labels is None else self.labels[i]
        contents = self.tree.contents(file)
        pixels = read_picture(contents, str(file), image_size, smooth, self.reading.max_megapixels)
        return Item(pixels, caption, label, str(file))

    def identity(self) -> str:
        """See `Collection`; the records count too."""
        files = [f"{os.path.relpath(r.file, self.path)} {self.tree.size(r.file)}" for r in self.records]
        entries = [json.dumps(record.entries, sort_keys=True) for record in self.records]
        return digest([*map(" ".join, zip(files, entries, strict=True)), *self.class_names])


class Npz(Collection):
    """An .npz with `images` (N, H, W[, C]) uint8 and perhaps `labels` (N,) integers.

    Arrays without names (arr_0, arr_1) are taken for images and labels. Channels may come first; RGBA is
    laid on white.
    """

    def __init__(self, path: Path):
        self.name, self.path = path.stem, path
        self.images, labels, self.notes = _read_npz(path)
        self.labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        from PIL import Image as pil

        pixels = self.images[i]
        pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        if image_size:
            pixels = np.asarray(central_square(pil.fromarray(pixels), image_size, smooth))
        return Item(pixels, None, self.labels[i], f"{self.path}, picture {i}")

    def identity(self) -> str:
        """See `Collection`."""
        return digest([f"{self.path.name} {self.path.stat().st_size}"])


def digest(lines: Iterable[str]) -> str:
    """16 hexadecimal digits of some lines."""
    found = hashlib.blake2b(digest_size=8)
    for line in lines:
        found.update(line.encode(errors="surrogateescape") + b"\n")  # names of files may be any bytes
    return found.hexdigest()


def has_metadata(tree: Tree) -> bool:
    """Whether the pictures of a folder have records."""
    return bool(_metadata(tree))


def _metadata(tree: Tree) -> list[Path]:
    """The files of records; one of each folder."""
    first: dict[Path, Path] = {}
    for name in METADATA:
        for file in tree.named(name):
            first.setdefault(file.parent, file)
    whole = tree.root / DATASET
    return sorted(first.values()) or ([whole] if whole in tree.files and is_dataset(tree.read(whole)) else [])


def _records(file: Path, tree: Tree, anywhere: bool) -> list[Record]:
    if file.name == DATASET and not dataset_has_labels(tree.read(file)):
        return [Record(picture, str(file), {}) for picture in tree.pictures()]
    return read_records(file, tree, anywhere)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            nameless = "images" not in arrays and "arr_0" in arrays
            names = ("arr_0", "arr_1") if nameless else ("images", "labels")
            if names[0] not in arrays:
                raise KeyError(f"it has {', '.join(arrays.files) or 'none'}; rename the pictures' to images")
            images = arrays[names[0]]
            labels = arrays[names[1]] if names[1] in arrays else np.zeros(len(images), dtype=np.int64)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, BadZipFile) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise DataError(f"cannot read {path} as an .npz with an array 'images': {reason}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"'{names[0]}' in {path} is {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, C)"
        )
    numbers = labels.reshape(-1) if labels.shape in {images.shape[:1], (len(images), 1)} else None
    if (
        numbers is not None
        and numbers.dtype.kind in "bf"
        and bool((numbers == numbers.astype(np.int64)).all())
    ):
        numbers = numbers.astype(np.int64)
    if numbers is None or numbers.dtype.kind not in "iu":
        raise DataError(
            f"'{names[1]}' in {path} is {labels.dtype} {labels.shape}; give one integer for each picture"
        )
    images, notes = _channels_last(images)
    return images, numbers.astype(np.int64), notes


def _channels_last(images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(N, H, W) or (N, H, W, 1 or 3), and what was taken for what."""
    notes = []
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        notes += [f"the array {images.shape} is taken as (N, C, H, W)"]
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if images.ndim == 4 and images.shape[3] == 4:
        notes += ["its fourth channel is taken as opacity, and laid on white"]
        images = on_white(images)
    return images, notes
