"""Data sets of the Hugging Face hub, or saved by the datasets library: "hf:ORG/NAME[:SPLIT]"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from momatch.data.collections import Collection, Item, digest
from momatch.data.image_io import DataError, to_picture
from momatch.data.reading import USUAL, Reading
from momatch.data.records import CAPTION_FIELDS, LABEL_FIELDS, as_caption, to_labels, usual_field
from momatch.utils.text import first_line

PREFIX = "hf:"


class Hub(Collection):
    """The pictures of one split of a data set.

    The picture column is the one of feature Image; the caption is the column of a usual name, or the only
    text; the label is the column of feature ClassLabel, or of a usual name.

    Args:
        source: "hf:ORG/NAME", "hf:ORG/NAME:SPLIT" ("train" if left out), "hf:ORG/NAME/CONFIG[:SPLIT]", or a
            folder that `save_to_disk` wrote in place of the name.
        reading: which columns are caption and label, if not those.
    """

    def __init__(self, source: str, reading: Reading = USUAL):
        self.source, self.empty_captions = source, reading.empty_captions
        name, _, split = source.removeprefix(PREFIX).partition(":")
        self.name = name.rstrip("/").rpartition("/")[2]
        dataset = _load(source, name, split or "train")
        self.picture = _picture_column(dataset, source)
        self.caption = _caption_column(dataset, reading.caption_field, source)
        self.label = _label_column(dataset, reading.label_field, source)
        self.has_captions = self.caption is not None
        self.caption_help = (
            f"it has the columns {', '.join(dataset.features)}, none of {', '.join(CAPTION_FIELDS)}: "
            "name one by --caption-field"
        )
        if self.label is not None:
            self.labels, self.class_names = _labels(dataset, self.label, source)
        columns = [self.picture, *([self.caption] if self.caption else [])]
        self.dataset = dataset.select_columns(columns)
        self._identity = digest([str(getattr(dataset, "_fingerprint", "")), str(len(dataset))])

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
            raise DataError(f"cannot read {name} ({error}); filter it out of the data set") from None
        caption = None
        if self.caption:
            value = row[self.caption]
            caption = "" if value is None and self.empty_captions else as_caption(value, name)
        return Item(pixels, caption, None if self.labels is None else self.labels[i], name)

    def identity(self) -> str:
        """See `Collection`."""
        return self._identity


def _load(source: str, name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} needs the datasets library, which is not installed; pip install 'momatch[datasets]'"
        ) from None
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        parts = name.split("/")
        path, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
        return datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, LookupError) as error:
        reason = first_line(error).strip("'\"")  # a KeyError quotes its text
        raise DataError(
            f"cannot load {source} ({reason}); give hf:ORG/NAME:SPLIT as the hub has it, or hf:FOLDER as "
            "save_to_disk wrote it"
        ) from None


def _picture_column(dataset: Any, source: str) -> str:
    import datasets

    names = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not names:
        kinds = ", ".join(f"{n} ({type(f).__name__})" for n, f in dataset.features.items())
        raise DataError(f"{source} has no column of pictures; it has {kinds}")
    return names[0]


def _caption_column(dataset: Any, wanted: str, source: str) -> str | None:
    _check_column(dataset, wanted, source)
    texts = [name for name, f in dataset.features.items() if getattr(f, "dtype", "") in _TEXTS]
    usual = usual_field([dataset.features], CAPTION_FIELDS)
    return wanted or usual or (texts[0] if len(texts) == 1 else None)


def _label_column(dataset: Any, wanted: str, source: str) -> str | None:
    import datasets

    _check_column(dataset, wanted, source)
    classes = [name for name, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
    usual = usual_field([dataset.features], LABEL_FIELDS)
    return wanted or (classes[0] if classes else usual)


def _labels(dataset: Any, column: str, source: str) -> tuple[list[int], list[str]]:
    """The label of every row, and the names of the classes if they have any."""
    values = list(dataset[column])
    if None in values:
        raise DataError(f"{source} has no {column} in row {values.index(None)}; filter such rows out")
    found = to_labels(values, source)
    names = found.names or list(getattr(dataset.features[column], "names", None) or ())
    return [number for number in found.numbers if number is not None], names


def _check_column(dataset: Any, wanted: str, source: str) -> None:
    if wanted and wanted not in dataset.features:
        raise DataError(f"{source} has no column {wanted!r}; it has {', '.join(dataset.features)}")


_TEXTS = ("string", "large_string")
