"""Tar shards in the manner of webdataset: KEY.jpg beside KEY.txt, KEY.json or KEY.cls.

The headers are read once; pictures and captions are then read from where they lie, in any order.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momatch.data.collections import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    USUAL,
    Collection,
    Fields,
    Item,
    as_caption,
    digest,
    to_labels,
)
from momatch.data.image_io import SUFFIXES, DataError, read_picture

RECORDS = ("txt", "json", "cls")


@dataclass
class _Sample:
    """A picture's key, its shard, and where in the shard each of its files lies: suffix → (offset, size)."""

    key: str
    shard: Path
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


class Tars(Collection):
    """Pictures in one .tar, or in all those of a folder.

    Args:
        path: the .tar, or the folder.
        fields: which entries of KEY.json are caption and label.
    """

    def __init__(self, path: Path, fields: Fields = USUAL):
        self.name, self.fields = path.stem, fields
        self.shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        self.samples = [sample for shard in self.shards for sample in _scan(shard)]
        if not self.samples:
            raise DataError(f"no pictures in {path}; a shard holds KEY.jpg (or .png, …) beside KEY.txt")
        first = self._record(self.samples[0])
        self._caption = _field(first, fields.caption, CAPTION_FIELDS)
        self._label = _field(first, fields.label, LABEL_FIELDS)
        self.has_captions = self._caption is not None
        self.caption_help = "its samples have no KEY.txt, and in KEY.json none of " + ", ".join(
            CAPTION_FIELDS
        )
        self.labels = None
        if self._label:
            records = [self._record(sample, captions=False) for sample in self.samples]
            values = [self._get(r, self._label, s) for r, s in zip(records, self.samples, strict=True)]
            self.labels = to_labels(values, str(path))

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        sample = self.samples[i]
        name = f"{sample.key} in {sample.shard}"
        picture = next(part for part in sample.parts if f".{part}" in SUFFIXES)
        pixels = read_picture(_bytes(sample, picture), name, image_size, smooth)
        caption = None
        if self._caption:
            caption = as_caption(self._get(self._record(sample), self._caption, sample), name)
        return Item(pixels, caption, None if self.labels is None else self.labels[i], name)

    def identity(self) -> str:
        """See `Collection`."""
        return digest(f"{shard.name} {shard.stat().st_size}" for shard in self.shards)

    def _record(self, sample: _Sample, captions: bool = True) -> dict[str, Any]:
        """KEY.json, with KEY.txt as its "text" and KEY.cls as its "label"."""
        found: dict[str, Any] = {}
        try:
            if "json" in sample.parts:
                found.update(json.loads(_bytes(sample, "json")))
            if "txt" in sample.parts and captions:
                found["text"] = _bytes(sample, "txt").decode().strip()
            if "cls" in sample.parts:
                found["label"] = int(_bytes(sample, "cls"))
        except (ValueError, TypeError) as error:
            raise DataError(f"the record of {sample.key} in {sample.shard} is damaged ({error})") from None
        return found

    def _get(self, record: dict[str, Any], name: str, sample: _Sample) -> Any:
        if record.get(name) is None:
            raise DataError(
                f"{sample.key} in {sample.shard} has no {name!r}, though the first sample has; "
                "add it, or leave that sample out"
            )
        return record[name]


def _field(record: dict[str, Any], wanted: str, usual: tuple[str, ...]) -> str | None:
    if wanted and wanted not in record:
        raise DataError(f"the first sample has no field {wanted!r}; it has {', '.join(record) or 'none'}")
    return wanted or next((name for name in usual if name in record), None)


def _scan(shard: Path) -> list[_Sample]:
    """The samples of a shard that have a picture, in their order."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                key, _, suffix = file.partition(".")
                suffix = suffix.lower()
                if member.isfile() and key and (f".{suffix}" in SUFFIXES or suffix in RECORDS):
                    sample = samples.setdefault(f"{folder}/{key}".lstrip("/"), _Sample(key, shard))
                    sample.parts[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read the shard {shard} as an uncompressed tar ({error})") from None
    size = shard.stat().st_size
    for sample in samples.values():
        if any(offset + length > size for offset, length in sample.parts.values()):
            raise DataError(f"the shard {shard} is cut short inside {sample.key}; copy it again")
    return [s for s in samples.values() if any(f".{part}" in SUFFIXES for part in s.parts)]


def _bytes(sample: _Sample, part: str) -> bytes:
    offset, size = sample.parts[part]
    with sample.shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
