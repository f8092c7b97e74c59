"""Records of pictures: lines of metadata.jsonl and metadata.csv, and what in them is caption and label."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momatch.data.folders import Tree, class_order
from momatch.data.image_io import DataError

CAPTION_FIELDS = ("text", "caption", "captions", "prompt")
LABEL_FIELDS = ("label", "labels", "class")
METADATA = ("metadata.jsonl", "metadata.csv")  # where a folder has both, the first is read
DATASET = "dataset.json"  # of StyleGAN and EDM: {"labels": [["00000/img00000000.png", 6], …]}, or null
MAX_LABEL = 2**31
MOST_FIELDS = 8  # that a note lists


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        file: the picture.
        where: "file, line n", for errors.
        entries: all that the line says.
    """

    file: Path
    where: str
    entries: Mapping[str, Any]


@dataclass(frozen=True)
class Labels:
    """Labels as numbers.

    Attributes:
        numbers: of each row, None where it has none.
        names: the classes in order, where they were texts; else empty.
    """

    numbers: list[int | None]
    names: list[str]


def read_records(file: Path, tree: Tree, anywhere: bool = False) -> list[Record]:
    """The lines of a metadata.jsonl or metadata.csv.

    Args:
        file: what to read.
        tree: the files among which the pictures have to be.
        anywhere: they may lie outside, too.

    Raises:
        DataError: if the file or a line cannot be read, or a picture is missing.
    """
    read = {".csv": _csv_lines, ".json": _dataset_lines}.get(file.suffix, _json_lines)
    lines = read(file, read_text(tree.read(file), str(file)))
    return [
        Record(_picture(entries["file_name"], file, where, tree, anywhere), where, entries)
        for where, entries in lines
    ]


def read_text(contents: bytes, name: str) -> str:
    """A text in UTF-8, with a byte order mark or without.

    Raises:
        DataError: if it is in another encoding.
    """
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line} is not UTF-8 (byte {error.object[error.start]:#x}); save the file as UTF-8"
        ) from None


def _json_lines(file: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    # Lines end at \n alone: other characters that str.splitlines knows may stand in a caption.
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["file_name"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f'{where} is not an object with a "file_name"; repair it: {line[:60]!r}'
            ) from None
        yield where, record


def is_dataset(contents: bytes) -> bool:
    """Whether a dataset.json is of StyleGAN's kind, and not somebody else's."""
    try:
        return "labels" in json.loads(contents)
    except (ValueError, TypeError, RecursionError):
        return False


def dataset_has_labels(contents: bytes) -> bool:
    """Whether the pictures of such a dataset.json have labels."""
    return json.loads(contents)["labels"] is not None


def _dataset_lines(file: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        for i, (name, label) in enumerate(json.loads(text)["labels"]):
            if not isinstance(name, str):
                raise TypeError
            yield f"{file}, label {i}", {"file_name": name, "label": label}
    except (ValueError, TypeError):
        raise DataError(
            f'the "labels" of {file} are no list of [file name, label]; repair it, or take it away'
        ) from None


def _csv_lines(file: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        names = list(rows.fieldnames or ())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{file} has the column {twice[0]} twice; take one away")
        if "file_name" not in (rows.fieldnames or ()):
            have = ", ".join(map(str, rows.fieldnames or ())) or "nothing"
            raise DataError(f"{file} has no column file_name (it has {have}); add it to the first line")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if None in row or not row["file_name"]:
                raise DataError(f"{where} does not fit the columns of the first line; repair it")
            yield where, {key: value if value != "" else None for key, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num} is no CSV ({error}); repair it") from None


def _picture(name: str, file: Path, where: str, tree: Tree, anywhere: bool) -> Path:
    places = list(_places(name, file.parent))
    path = next(filter(tree.has, places), places[0])
    path = Path(os.path.normpath(path)) if ".." in path.parts else path
    if not anywhere and os.path.relpath(path, tree.root).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{where} names {name!r}, which lies outside {tree.root}; put the picture there, or allow it by "
            "--anywhere (in Python Reading(anywhere=True))"
        )
    if not tree.has(path):
        raise DataError(f"{where} names {path.name!r}, but there is no {path}; add it or drop the line")
    return path


def _places(name: str, folder: Path) -> Iterable[Path]:
    """Where a record's picture may lie: from its folder; as Windows writes it; from a folder further up."""
    yield folder / name
    plain = name.replace("\\", "/")
    yield folder / plain
    parts = Path(plain).parts
    for i in range(1, len(parts)):
        if parts[:i] == folder.parts[-i:]:
            yield folder.joinpath(*parts[i:])


def column(
    rows: Sequence[tuple[str, Mapping[str, Any]]], wanted: str, usual: Iterable[str], may_lack: float = 0.0
) -> list[Any] | None:
    """One field of all records; None if no record has one of the usual names.

    Args:
        rows: (what to call it in an error, the record) of each.
        wanted: the field's name; "" takes the first of the usual ones that any record has.
        usual: names to look for.
        may_lack: share of the records, if fewer than this lack it, they have None.

    Raises:
        DataError: if it is absent from a record that must have it.
    """
    name = wanted or usual_field((record for _, record in rows), usual)
    if name is None:
        return None
    values = [record.get(name) for _, record in rows]
    lacking = [i for i, value in enumerate(values) if value is None]
    if lacking and not len(lacking) < may_lack * len(values):
        where, record = rows[lacking[0]]
        if name in record:
            raise DataError(f"{where} has nothing in its field {name!r}; fill it in, or name another field")
        have = ", ".join(record) or "nothing"
        raise DataError(f"{where} has no field {name!r} (it has {have}); add it, or name another field")
    return values


def usual_field(records: Iterable[Mapping[str, Any]], usual: Iterable[str]) -> str | None:
    """The first of the usual names that any record has, as the record writes it: Label is label, too."""
    fields = all_fields(records)
    plain = {field.strip().lower(): field for field in reversed(fields)}
    return next((name if name in fields else plain[name] for name in usual if name in plain), None)


def all_fields(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all fields, in the order of their first appearance."""
    return list(dict.fromkeys(field for record in records for field in record))


def no_label_note(fields: Iterable[str]) -> str:
    """What a summary says of fields that may have been meant for a label; "" if there are none."""
    others = [field for field in fields if field not in ("file_name", *CAPTION_FIELDS)]
    if not others:
        return ""
    return (
        f"no label is read: of its fields {', '.join(others[:MOST_FIELDS])} none is called "
        f"{' or '.join(LABEL_FIELDS)}; name one by --label-field, if there is one"
    )


def to_labels(values: Sequence[Any], name: str, read: Callable[[str], Any] | None = None) -> Labels:
    """Labels as integers: whole numbers, true and false as they are, texts by `class_order`.

    Args:
        values: of each row; None where there is none.
        name: whose they are, for errors.
        read: what a text stands for, if it may be a number (see `as_number`).

    Raises:
        DataError: if they are neither all whole numbers nor all texts.
    """
    there = [value for value in values if value is not None]
    if read and all(isinstance(value, str) and isinstance(read(value), int) for value in there):
        values = [None if value is None else read(value) for value in values]
        there = [value for value in values if value is not None]
    if all(_is_whole(value) for value in there):
        return Labels([None if value is None else int(value) for value in values], [])
    if not all(isinstance(value, str) for value in there):
        texts = isinstance(there[0], str)
        odd = next(
            value for value in there if (not isinstance(value, str) if texts else not _is_whole(value))
        )
        raise DataError(f"{name} has the label {odd!r}; labels are whole numbers from 0, or all texts")
    names = class_order(there)
    number = {value: i for i, value in enumerate(names)}
    return Labels([None if value is None else number[value] for value in values], names)


def check_labels(
    labels: Sequence[int], named: int, num_classes: int, source: str, kind: str = "pictures"
) -> int:
    """How many classes labels are of.

    Args:
        labels: of each row.
        named: classes that have names.
        num_classes: that there are, as the user says; 0 if nothing was said.
        source: whose they are, for errors.
        kind: what the rows are, for errors.

    Raises:
        DataError: if labels are negative, or run so far that they can hardly be counted from 0.
    """
    low, high = min(labels), max(labels)
    most = num_classes or max(len(labels), named)
    if not 0 <= low <= high < most:
        remedy = "labels count from 0, one for each class"
        if num_classes:
            remedy += f", and num_classes is {num_classes}"
        elif low >= 0:
            remedy += (
                f"; if these are some of more classes, say how many by --num-classes {high + 1}, or "
                "have them numbered anew by --renumber-labels"
            )
        raise DataError(f"{source} has labels from {low} to {high} on {len(labels)} {kind}; {remedy}")
    return num_classes or max(high + 1, named)


def as_number(text: str) -> int | str:
    """A whole number if it is one: of files that know texts alone."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text


def as_caption(value: Any, name: str) -> str:
    """A caption; of several the first.

    Raises:
        DataError: if it is no text.
    """
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str):
        raise DataError(f"the caption of {name} is {value!r}; a caption is a text")
    return value


def empty_note(lacking: int) -> str:
    """What a summary says of pictures without a caption, if they may lack it."""
    return f"{lacking:,} without a caption have the empty one"


def fields_help(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What records have in place of a caption, for errors."""
    have = ", ".join(rows[0][1] if rows else {}) or "no fields"
    return f"{have}, none of {', '.join(CAPTION_FIELDS)}; name one by --caption-field"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_LABEL and float(value).is_integer()
