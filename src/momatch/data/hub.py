"""What the datasets library reads: the hub (hf:ORG/NAME[:SPLIT]), .parquet files and saved folders."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from momatch.data.collections import Collection, Item, digest
from momatch.data.folders import SPLITS
from momatch.data.image_io import DataError, to_picture
from momatch.data.reading import USUAL, Reading
from momatch.data.records import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    as_caption,
    as_number,
    no_label_note,
    to_labels,
    usual_field,
)
from momatch.utils.text import first_line

PREFIX = "hf:"
PARQUET = ".parquet"
IMAGE_FIELDS = ("image", "images", "img", "picture", "jpg", "jpeg", "png", "webp")  # before others
WORD = re.compile(r"[A-Za-z]+")


class Hub(Collection):
    """The pictures of one split of a data set.

    The picture column is the one of feature Image, or of bytes; the caption is the column of a usual name, or
    the only text; the label is the column of feature ClassLabel, or of a usual name.

    Args:
        source: "hf:ORG/NAME", "hf:ORG/NAME:SPLIT" ("train" if left out), "hf:ORG/NAME/CONFIG[:SPLIT]"; or, in
            place of the name, with "hf:" or without, a folder that `save_to_disk` wrote, .parquet files by
            name or pattern, or a folder of them.
        reading: which columns are caption and label, if not those.
    """

    def __init__(self, source: str, reading: Reading = USUAL):
        self.source, self.empty_captions = source, reading.empty_captions
        whole = source.removeprefix(PREFIX)
        name, _, split = (whole, "", "") if Path(whole).exists() else whole.partition(":")
        self.name = name.rstrip("/").rpartition("/")[2].removesuffix(".parquet")
        dataset, others = _load(source, name, split)
        unread = bool(others) and not split
        self.notes: list[str] = [f"its other splits are not read: {', '.join(others)}"] if unread else []
        self.notes += _notes_of_files(name)
        self.picture = self._choose(_picture_columns(dataset, source), "images")
        if not _is_image(dataset.features[self.picture]):
            dataset = _as_images(dataset, self.picture)
        labels = _label_columns(dataset, reading.label_field, source)
        self.label = self._choose(labels, "labels") if labels else None
        if self.label is None and (note := no_label_note(list(dataset.features))):
            self.notes += [note]
        captions = _caption_columns(dataset, reading.caption_field, source, self.label)
        self.caption = captions[0] if captions else None
        if self.caption and self.caption not in (reading.caption_field, *CAPTION_FIELDS):
            self.notes += [f"its column {self.caption} is taken as the caption"]
        self.has_captions = self.caption is not None
        self.caption_help = (
            f"it has the columns {', '.join(dataset.features)}, none of {', '.join(CAPTION_FIELDS)}: "
            "name one by --caption-field"
        )
        if self.label is not None:
            self.labels, self.class_names = _labels(dataset, self.label, source, bool(reading.num_classes))
        columns = [self.picture, *([self.caption] if self.caption else [])]
        self.dataset = dataset.select_columns(columns)
        self._identity = digest([str(getattr(dataset, "_fingerprint", "")), str(len(dataset))])

    def _choose(self, columns: list[str], what: str) -> str:
        """The first of several, and a note of the others."""
        first, *others = columns
        if others:
            self.notes += [f"the {what} are its column {first}; not read: {', '.join(others)}"]
        return first

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        name = f"{self.source}, picture {i}"
        try:
            row = self.dataset[i]
            image = row[self.picture]
            if image is None:
                raise ValueError("there is none")
            pixels = to_picture(image, name, image_size, smooth)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            reason = "no picture, or cut short" if "BytesIO" in str(error) else error
            raise DataError(
                f"cannot read {name} ({reason}); filter it out of the data set, or allow for some such by "
                "--skip-unreadable N"
            ) from None
        caption = None
        if self.caption:
            value = row[self.caption]
            caption = "" if value is None and self.empty_captions else as_caption(value, name)
        return Item(pixels, caption, None if self.labels is None else self.labels[i], name)

    def identity(self) -> str:
        """See `Collection`."""
        return self._identity


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) and (
        (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
    )


def parquet_files(source: str) -> list[str]:
    """The .parquet files of that name or pattern; none if it is another kind of source."""
    if not source.lower().endswith(PARQUET):
        return []
    found = [source] if Path(source).exists() else sorted(glob.glob(source))
    return [file for file in found if Path(file).is_file()]


def _notes_of_files(name: str) -> list[str]:
    """What is read as one set, though its names may say otherwise."""
    files = parquet_files(name)
    parts = [{word.lower() for word in WORD.findall(Path(file).stem)} & SPLITS for file in files]
    if len(files) > 1 and len(set().union(*parts)) > 1:
        return [f"the files of {', '.join(sorted(set().union(*parts)))} are read as one set"]
    inside = {file.parent for file in Path(name).rglob(f"*{PARQUET}")} if Path(name).is_dir() else set()
    return ["its subfolders are not read as classes"] if len(inside) > 1 else []


def _load(source: str, name: str, split: str) -> tuple[Any, list[str]]:
    """A split, and the names of the others as far as they lie here."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise DataError(
            f"{source} needs the datasets library, which is not installed; pip install 'momatch[datasets]'"
        ) from None
    try:
        if files := parquet_files(name):
            datasets.disable_progress_bars()
            return datasets.load_dataset("parquet", data_files=files, split=split or "train"), []
        if Path(name).is_dir():
            datasets.disable_progress_bars()
            saved = is_saved(Path(name))
            found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
            return _chosen(found, split, source) if isinstance(found, dict) else (found, [])
        parts = name.split("/")
        path, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
        return datasets.load_dataset(path, config, split=split or "train"), []
    except (OSError, ValueError, LookupError, DatasetsError) as error:
        reason = first_line(error).strip("'\"")  # a KeyError quotes its text
        raise DataError(
            f"cannot load {source} ({reason}); give hf:ORG/NAME:SPLIT as the hub has it, .parquet files, or "
            "a folder as save_to_disk wrote it"
        ) from None


def _chosen(found: Any, split: str, source: str) -> tuple[Any, list[str]]:
    """The split of that name, else "train", else the only one."""
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise DataError(
            f"{source} has no split {chosen!r}; it has {', '.join(found)}: name one, as in hf:FOLDER:SPLIT"
        )
    return found[chosen], [name for name in found if name != chosen]


def _picture_columns(dataset: Any, source: str) -> list[str]:
    """Those of feature Image, or of bytes; the usual names first."""
    features = dataset.features
    names = [name for name, feature in features.items() if _is_image(feature)]
    names = names or [name for name, feature in features.items() if _is_bytes(feature)]
    if not names:
        kinds = ", ".join(f"{n} ({type(f).__name__})" for n, f in features.items())
        raise DataError(f"{source} has no column of pictures; it has {kinds}")
    return sorted(names, key=lambda name: name.lower() not in IMAGE_FIELDS)


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _is_bytes(feature: Any) -> bool:
    """Whether it may hold image files: bytes, or {"bytes", "path"}, as tools write that know no Image."""
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", "") in ("binary", "large_binary")


def _as_images(dataset: Any, column: str) -> Any:
    import datasets

    return dataset.cast_column(column, datasets.Image())


def _caption_columns(dataset: Any, wanted: str, source: str, label: str | None) -> list[str]:
    """The column of captions: the one asked for, one of a usual name, or the only text that is no label."""
    _check_column(dataset, wanted, source)
    texts = [
        name for name, f in dataset.features.items() if getattr(f, "dtype", "") in _TEXTS and name != label
    ]
    usual = usual_field([dataset.features], CAPTION_FIELDS)
    found = wanted or usual or (texts[0] if len(texts) == 1 else None)
    return [found] if found else []


def _label_columns(dataset: Any, wanted: str, source: str) -> list[str]:
    """The column asked for, or one of a usual name, then those of feature ClassLabel."""
    import datasets

    _check_column(dataset, wanted, source)
    if wanted:
        return [wanted]
    classes = [name for name, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
    usual = usual_field([dataset.features], LABEL_FIELDS)
    return list(dict.fromkeys([*([usual] if usual else []), *classes]))


def _labels(dataset: Any, column: str, source: str, numbers: bool) -> tuple[list[int], list[str]]:
    """The label of every row, and the names of the classes if they have any; texts may be `numbers`."""
    values = list(dataset[column])
    if None in values:
        raise DataError(f"{source} has no {column} in row {values.index(None)}; filter such rows out")
    found = to_labels(values, source, as_number if numbers else None)
    names = found.names or list(getattr(dataset.features[column], "names", None) or ())
    return [number for number in found.numbers if number is not None], names


def _check_column(dataset: Any, wanted: str, source: str) -> None:
    if wanted and wanted not in dataset.features:
        raise DataError(f"{source} has no column {wanted!r}; it has {', '.join(dataset.features)}")


_TEXTS = ("string", "large_string")
