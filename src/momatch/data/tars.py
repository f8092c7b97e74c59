"""Tar shards in the manner of webdataset: KEY.jpg beside KEY.txt, KEY.json or KEY.cls.

The headers are read once; pictures and captions are then read from where they lie, in any order.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momatch.data.collections import USUAL, Collection, Item, Reading, digest
from momatch.data.folders import HIDDEN, OF_SYSTEMS, SPLITS, WITHOUT_ENDING, classes_of
from momatch.data.image_io import SUFFIXES, DataError, read_picture
from momatch.data.records import CAPTION_FIELDS, LABEL_FIELDS, as_caption, as_number, column, to_labels
from momatch.data.rows import spread

RECORDS = ("txt", "json", "cls")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by their first two bytes
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # {000..012} and {a,b}
WORD = re.compile(r"[A-Za-z]+")
PROBED = 1000  # samples whose records are looked at for fields; reading all takes minutes of a million
OTHER_PART = "other part of a sample"


@dataclass
class _Sample:
    """A picture's key, its folder in the shard, and where each of its files lies: suffix → (offset, size).

    `shard` is what it is called, `contents` the uncompressed file.
    """

    key: str
    folder: tuple[str, ...]
    shard: Path
    contents: Path
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def picture(self) -> str | None:
        """The suffix of its first picture."""
        return next((part for part in self.parts if f".{part}" in SUFFIXES), None)


class Tars(Collection):
    """Pictures in one or more tars; compressed ones are unpacked into a temporary folder first.

    Args:
        shards: the tars, in order.
        name: how tables and reports call them.
        reading: which entries of KEY.json are caption and label.
        left_out: what lies beside the shards and is not read.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        name: str,
        reading: Reading = USUAL,
        left_out: Counter[str] | None = None,
    ):
        self.name, self.reading, self.shards = name, reading, list(shards)
        self.left_out, self.notes = Counter(left_out or {}), []
        self._unpacked = tempfile.TemporaryDirectory(prefix="momatch-")
        self.samples = [sample for i, shard in enumerate(self.shards) for sample in self._scan(i, shard)]
        if not self.samples:
            raise DataError(
                f"no pictures in {self.shards[0]}; a shard holds KEY.jpg (or .png, …) beside KEY.txt"
            )
        records = self._probe()
        self._caption = self._field(records, reading.caption, CAPTION_FIELDS)
        self.has_captions = self._caption is not None
        self.caption_help = "its samples have no KEY.txt, and in KEY.json none of " + ", ".join(
            CAPTION_FIELDS
        )
        label = self._field(records, reading.label, LABEL_FIELDS)
        if label:
            self._take_labels(label)
        else:
            self._classes_by_folder()
        self._note_splits()

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        sample = self.samples[i]
        name = f"{sample.key} in {sample.shard}"
        assert sample.picture is not None
        pixels = read_picture(
            _bytes(sample, sample.picture), name, image_size, smooth, self.reading.max_megapixels
        )
        caption = None
        if self._caption:
            caption = as_caption(self._get(self._record(sample), self._caption, sample), name)
        return Item(pixels, caption, None if self.labels is None else self.labels[i], name)

    def identity(self) -> str:
        """See `Collection`."""
        lines = [f"{shard.name} {shard.stat().st_size}" for shard in self.shards]
        return digest([*lines, *self.class_names])

    def _probe(self) -> list[dict[str, Any]]:
        """Records that show which fields there are: of the first sample, of others, of each kind of file."""
        some = [self.samples[int(i)] for i in spread(len(self.samples), PROBED)]
        firsts = [next((s for s in self.samples if kind in s.parts), None) for kind in RECORDS]
        return [self._record(sample, texts=False) for sample in (*some, *filter(None, firsts))]

    def _take_labels(self, name: str) -> None:
        """Labels of the records; a sample without one is left out, unless it lacks a caption, too."""
        records = [self._record(sample, texts=False) for sample in self.samples]
        rows = [
            (f"{sample.key} in {sample.shard}", record)
            for sample, record in zip(self.samples, records, strict=True)
        ]
        for sample, record in zip(self.samples, records, strict=True):
            if self._caption and record.get(self._caption) is None:
                self._get(record, self._caption, sample)
        values = column(rows, name, (), optional=True)
        assert values is not None
        labels = to_labels(values, str(self.shards[0]), as_number if self._texts_are_numbers() else None)
        kept = [i for i, number in enumerate(labels.numbers) if number is not None]
        lacking = next((i for i, number in enumerate(labels.numbers) if number is None), None)
        if lacking is not None:
            self.notes = [f"not read: {len(rows) - len(kept):,} without a label, such as {rows[lacking][0]}"]
        self.samples = [self.samples[i] for i in kept]
        self.labels = [number for number in labels.numbers if number is not None]
        self.class_names = labels.names

    def _texts_are_numbers(self) -> bool:
        """Whether a label "7" is 7: of files that know texts alone, or of labels that are some of more."""
        return bool(self.reading.num_classes) or all("cls" in sample.parts for sample in self.samples)

    def _classes_by_folder(self) -> None:
        if self._folders_are_shards():
            self.notes = ["every shard holds one folder of its own, so folders are no classes"]
            return
        files = [f"{sample.key}.{sample.picture}" for sample in self.samples]
        classes = classes_of([sample.folder for sample in self.samples], files, self.reading.num_classes)
        self.notes = [classes.note] if classes.note else []
        if len(set(classes.labels)) > 1:
            self.labels, self.class_names = classes.labels, classes.names

    def _folders_are_shards(self) -> bool:
        """Whether the folders are as many as the shards, one in each: another name of the shard."""
        found: dict[Path, set[tuple[str, ...]]] = {}
        for sample in self.samples:
            found.setdefault(sample.shard, set()).add(sample.folder)
        alone = all(len(folders) == 1 for folders in found.values())
        return len(found) > 1 and alone and len(set().union(*found.values())) == len(found)

    def _note_splits(self) -> None:
        """Say so where shards of several parts of a data set are read as one."""
        parts = [{word.lower() for word in WORD.findall(shard.name)} & SPLITS for shard in self.shards]
        found = sorted(set().union(*parts))
        if all(parts) and len(found) > 1:
            self.notes = [*self.notes, f"the shards of {', '.join(found)} are read as one set"]

    def _scan(self, number: int, shard: Path) -> list[_Sample]:
        samples, left_out = _scan(shard, _uncompressed(shard, Path(self._unpacked.name, f"{number}.tar")))
        self.left_out += left_out
        return samples

    def _record(self, sample: _Sample, texts: bool = True) -> dict[str, Any]:
        """KEY.json, with KEY.txt as its "text" (or that there is one) and KEY.cls as its "label"."""
        found: dict[str, Any] = {}
        try:
            if "json" in sample.parts:
                found.update(json.loads(_bytes(sample, "json")))
            if "txt" in sample.parts:
                found["text"] = _bytes(sample, "txt").decode("utf-8-sig").strip() if texts else ""
            if "cls" in sample.parts:
                found["label"] = as_number(_bytes(sample, "cls").decode().strip())
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"the record of {sample.key} in {sample.shard} is damaged ({error})") from None
        return found

    def _field(self, records: list[dict[str, Any]], wanted: str, usual: tuple[str, ...]) -> str | None:
        """`wanted`, or the first of the usual names that any record has."""
        name = next((n for n in ((wanted,) if wanted else usual) if any(n in r for r in records)), None)
        if wanted and name is None:
            have = ", ".join(records[0]) or "none"
            raise DataError(f"no sample has a field {wanted!r}; the first has {have}; name another")
        return name

    def _get(self, record: dict[str, Any], name: str, sample: _Sample) -> Any:
        if record.get(name) is None:
            others = "others have" if sample is self.samples[0] else "the first sample has"
            raise DataError(
                f"{sample.key} in {sample.shard} has no {name!r}, though {others}; "
                "add it, or leave that sample out"
            )
        return record[name]


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern stands for: {000..012}, {a,b}, * and ?; none if it is no pattern.

    Raises:
        DataError: if one of a range is missing.
    """
    names = _braces(pattern)
    found: list[Path] = []
    for name in names:
        some = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name]
        if len(names) > 1 and not all(Path(one).is_file() for one in some):
            raise DataError(f"there is no {name}, one of {pattern}; add it, or leave it out of the pattern")
        found += [Path(one) for one in some if one.lower().endswith(TARS) and Path(one).is_file()]
    return found


def _braces(pattern: str) -> list[str]:
    match = RANGE.search(pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        parts = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        width = len(match[1]) if match[1].startswith("0") else 0
        parts = [f"{i:0{width}d}" for i in range(first, min(last, first + 10**6) + 1)]
    return [
        name for part in parts for name in _braces(pattern[: match.start()] + part + pattern[match.end() :])
    ]


def _uncompressed(shard: Path, to: Path) -> Path:
    """The shard itself, or what is in it if it is compressed."""
    try:
        with shard.open("rb") as file:
            opener = COMPRESSED.get(file.read(2))
        if opener is None:
            return shard
        with opener(shard, "rb") as packed, to.open("wb") as file:
            shutil.copyfileobj(packed, file)
        return to
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read the shard {shard} ({error}); copy it again") from None


def _scan(shard: Path, contents: Path) -> tuple[list[_Sample], Counter[str]]:
    """The samples of a shard that have a picture, in their order, and what is left out."""
    left_out: Counter[str] = Counter()
    files: list[tuple[str, str, tarfile.TarInfo]] = []
    try:
        with tarfile.open(contents, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if member.isdir():
                    continue
                if any(part[:1] == "." or part in OF_SYSTEMS for part in (*folder.split("/"), name)):
                    left_out[HIDDEN] += 1
                elif not member.isfile():
                    left_out["link in a tar"] += 1
                else:
                    files.append((folder, name, member))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read the shard {shard} as a tar ({error}); copy it again") from None
    samples = _samples(files, shard, contents, left_out)
    size = contents.stat().st_size
    for sample in samples.values():
        if any(offset + length > size for offset, length in sample.parts.values()):
            raise DataError(f"the shard {shard} is cut short inside {sample.key}; copy it again")
    whole = [sample for sample in samples.values() if sample.picture]
    for sample in samples.values():
        if not sample.picture:
            left_out.update(f".{part}" for part in sample.parts)
    left_out[OTHER_PART] += sum(f".{part}" in SUFFIXES for s in whole for part in s.parts) - len(whole)
    return whole, +left_out


def _samples(
    files: list[tuple[str, str, tarfile.TarInfo]], shard: Path, contents: Path, left_out: Counter[str]
) -> dict[str, _Sample]:
    """Files by key. A key ends at the first dot; or at the last, if there is no picture of that key."""
    plain = {
        (folder, name.partition(".")[0])
        for folder, name, _ in files
        if f".{name.partition('.')[2].lower()}" in SUFFIXES
    }
    samples: dict[str, _Sample] = {}
    for folder, name, member in files:
        head, _, rest = name.partition(".")
        key, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        if "." in rest and (folder, head) in plain:
            left_out[OTHER_PART] += 1  # KEY.mask.png beside KEY.png
        elif not key or (f".{suffix}" not in SUFFIXES and suffix not in RECORDS):
            left_out[f".{suffix}" if key else WITHOUT_ENDING] += 1
        else:
            parts = tuple(part for part in folder.split("/") if part)
            sample = samples.setdefault(f"{folder}/{key}", _Sample(key, parts, shard, contents))
            left_out["file of the same name"] += suffix in sample.parts
            sample.parts[suffix] = (member.offset_data, member.size)
    return samples


def _bytes(sample: _Sample, part: str) -> bytes:
    offset, size = sample.parts[part]
    with sample.contents.open("rb") as file:
        file.seek(offset)
        return file.read(size)
