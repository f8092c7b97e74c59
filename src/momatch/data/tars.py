"""Tar shards in the manner of webdataset: KEY.jpg beside KEY.txt, KEY.json or KEY.cls.

The headers are read once; pictures and captions are then read from where they lie, in any order.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from momatch.data.collections import digest
from momatch.data.folders import HIDDEN, OF_SYSTEMS, SPLITS, WITHOUT_ENDING
from momatch.data.image_io import SUFFIXES, DataError
from momatch.data.reading import USUAL, Reading
from momatch.data.records import CAPTION_FIELDS, LABEL_FIELDS, all_fields, empty_note, no_label_note
from momatch.data.samples import RECORDS, Sample, Samples

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by their first two bytes
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # {000..012} and {a,b}
WORD = re.compile(r"[A-Za-z]+")
OTHER_PART = "other part of a sample"


class Tars(Samples):
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
        records = [self._record(sample, texts=False) for sample in self._probed()]
        self._caption = self._field(records, reading.caption_field, CAPTION_FIELDS)
        self.has_captions = self._caption is not None
        self.caption_help = "its samples have no KEY.txt, and in KEY.json none of " + ", ".join(
            CAPTION_FIELDS
        )
        if self._caption and reading.empty_captions and (lacking := self._lacking(self._caption)):
            self.notes = [empty_note(len(lacking))]
        label = self._field(records, reading.label_field, LABEL_FIELDS)
        if label:
            self._take_labels(label)
        else:
            self._classes_by_folder()
            if not self.class_names and (note := no_label_note(all_fields(records))):
                self.notes += [note]
        self._note_splits()

    def identity(self) -> str:
        """See `Collection`."""
        lines = [f"{shard.name} {shard.stat().st_size}" for shard in self.shards]
        return digest([*lines, *self.class_names])

    def _classes_by_folder(self) -> None:
        if self._folders_are_shards():
            self.notes += ["every shard holds one folder of its own, so folders are no classes"]
            return
        classes = self._folders()
        self.notes += [classes.note] if classes.note else []
        if len(set(classes.labels_of_members())) > 1:
            self._take_folders(classes)

    def _folders_are_shards(self) -> bool:
        """Whether the folders are as many as the shards, one in each: another name of the shard."""
        found: dict[Path, set[tuple[str, ...]]] = {}
        for sample in self.samples:
            found.setdefault(sample.source, set()).add(sample.folder)
        alone = all(len(folders) == 1 for folders in found.values())
        return len(found) > 1 and alone and len(set().union(*found.values())) == len(found)

    def _note_splits(self) -> None:
        """Say so where shards of several parts of a data set are read as one."""
        parts = [{word.lower() for word in WORD.findall(shard.name)} & SPLITS for shard in self.shards]
        found = sorted(set().union(*parts))
        if all(parts) and len(found) > 1:
            self.notes += [f"the shards of {', '.join(found)} are read as one set"]

    def _scan(self, number: int, shard: Path) -> list[Sample]:
        samples, left_out = _scan(shard, _uncompressed(shard, Path(self._unpacked.name, f"{number}.tar")))
        self.left_out += left_out
        return samples

    def _bytes(self, sample: Sample, part: str) -> bytes:
        contents, offset, size = sample.parts[part]
        with contents.open("rb") as file:
            file.seek(offset)
            return file.read(size)


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


def _scan(shard: Path, contents: Path) -> tuple[list[Sample], Counter[str]]:
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
        if any(offset + length > size for _, offset, length in sample.parts.values()):
            raise DataError(f"the shard {shard} is cut short inside {sample.key}; copy it again")
    whole = [sample for sample in samples.values() if sample.picture]
    for sample in samples.values():
        if not sample.picture:
            left_out.update(f".{part}" for part in sample.parts)
    left_out[OTHER_PART] += sum(f".{part}" in SUFFIXES for s in whole for part in s.parts) - len(whole)
    return whole, +left_out


def _samples(
    files: list[tuple[str, str, tarfile.TarInfo]], shard: Path, contents: Path, left_out: Counter[str]
) -> dict[str, Sample]:
    """Files by key. A key ends at the first dot; or at the last, if there is no picture of that key."""
    plain = {
        (folder, name.partition(".")[0])
        for folder, name, _ in files
        if f".{name.partition('.')[2].lower()}" in SUFFIXES
    }
    samples: dict[str, Sample] = {}
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
            sample = samples.setdefault(f"{folder}/{key}", Sample(key, parts, shard, f"{key} in {shard}"))
            left_out["file of the same name"] += suffix in sample.parts
            sample.parts[suffix] = (contents, member.offset_data, member.size)
    return samples
