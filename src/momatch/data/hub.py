"""What the datasets library reads: the hub (hf:ORG/NAME[:SPLIT]), .parquet files and saved folders."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from momatch.data.collections import Collection, Item, digest
from momatch.data.image_io import DataError, to_picture
from momatch.data.reading import USUAL, Reading
from momatch.data.records import CAPTION_FIELDS, LABEL_FIELDS, as_caption, to_labels, usual_field
from momatch.utils.text import first_line

PREFIX = "hf:"
PARQUET = ".parquet"


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
        name, _, split = source.removeprefix(PREFIX).partition(":")
        self.name = name.rstrip("/").rpartition("/")[2].removesuffix(".parquet")
        dataset, others = _load(source, name, split)
        self.notes = [f"its other splits are not read: {', '.join(others)}"] if others and not split else []
        self.picture = _picture_column(dataset, source)
        if not _is_image(dataset.features[self.picture]):
            dataset = _as_images(dataset, self.picture)
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


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) and (
        (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
    )


def parquet_files(source: str) -> list[str]:
    """The .parquet files of that name or pattern; none if it is another kind of source."""
    return sorted(glob.glob(source)) if source.lower().endswith(PARQUET) else []


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
            return _chosen(found, split) if isinstance(found, dict) else (found, [])
        parts = name.split("/")
        path, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
        return datasets.load_dataset(path, config, split=split or "train"), []
    except (OSError, ValueError, LookupError, DatasetsError) as error:
        reason = first_line(error).strip("'\"")  # a KeyError quotes its text
        raise DataError(
            f"cannot load {source} ({reason}); give hf:ORG/NAME:SPLIT as the hub has it, .parquet files, or "
            "a folder as save_to_disk wrote it"
        ) from None


def _chosen(found: Any, split: str) -> tuple[Any, list[str]]:
    """The split of that name, else "train", else the only one."""
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    return found[chosen], [name for name in found if name != chosen]


def _picture_column(dataset: Any, source: str) -> str:
    features = dataset.features
    names = [name for name, feature in features.items() if _is_image(feature)]
    names += [name for name, feature in features.items() if _is_bytes(feature)]
    if not names:
        kinds = ", ".join(f"{n} ({type(f).__name__})" for n, f in features.items())
        raise DataError(f"{source} has no column of pictures; it has {kinds}")
    return names[0]


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
