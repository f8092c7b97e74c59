"""Pictures beside files of the same name: KEY.png with KEY.txt, KEY.json or KEY.cls; in folders and tars."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momatch.data.collections import Collection, Item, digest
from momatch.data.folders import STRAY, Classes, Tree, check_no_class_vanishes, classes_of, listed
from momatch.data.image_io import SUFFIXES, DataError, read_picture
from momatch.data.reading import USUAL, Reading
from momatch.data.records import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    all_fields,
    as_caption,
    as_number,
    column,
    empty_note,
    read_text,
    to_labels,
    usual_field,
)
from momatch.data.rows import spread

TEXTS = ("txt", "caption")  # the whole file is the caption
RECORDS = (*TEXTS, "json", "cls")
PROBED = 1000  # samples whose records are looked at for fields; reading all takes minutes of a million


@dataclass
class Sample:
    """A picture and what lies beside it.

    Attributes:
        key: its name without an ending.
        folder: the parts of its folder, from the root.
        source: that root, or the shard that it is in.
        where: what to call it in an error.
        parts: ending → where that file's contents are.
    """

    key: str
    folder: tuple[str, ...]
    source: Path
    where: str
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> str:
        """The ending of its first picture; "" if it has none."""
        return next((part for part in self.parts if f".{part}" in SUFFIXES), "")


class Samples(Collection):
    """What a folder and tars have in common: records of samples, their fields, classes by folder."""

    samples: Sequence[Sample]
    reading: Reading
    notes: list[str]
    _caption: str | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        sample = self.samples[i]
        pixels = read_picture(
            self._picture(sample), sample.where, image_size, smooth, self.reading.max_megapixels
        )
        caption = None
        if self._caption:
            caption = as_caption(self._get(self._record(sample), self._caption, sample), sample.where)
        return Item(pixels, caption, None if self.labels is None else self.labels[i], sample.where)

    @abstractmethod
    def _bytes(self, sample: Sample, part: str) -> bytes:
        """The contents of one of its files."""

    def _name(self, sample: Sample, part: str) -> str:
        """What to call one of its files in an error."""
        return f"{sample.key}.{part} in {sample.source}"

    def _picture(self, sample: Sample) -> Path | bytes:
        return self._bytes(sample, sample.picture)

    def _record(self, sample: Sample, texts: bool = True) -> dict[str, Any]:
        """KEY.json, with KEY.txt as its "text" (or that there is one) and KEY.cls as its "label"."""
        found: dict[str, Any] = {}
        for kind in RECORDS:
            if kind not in sample.parts:
                continue
            name = self._name(sample, kind)
            contents = self._bytes(sample, kind) if texts or kind not in TEXTS else b""
            if kind in TEXTS:
                found["text"] = read_text(contents, name).strip()
            elif kind == "cls":
                found["label"] = as_number(read_text(contents, name).strip())
            else:
                found = {**_fields(contents, sample), **found}
        return found

    def _probed(self) -> list[Sample]:
        """Samples that show which fields there are: the first, others, one with each kind of file."""
        some = [self.samples[int(i)] for i in spread(len(self.samples), PROBED)]
        firsts = [next((s for s in self.samples if kind in s.parts), None) for kind in RECORDS]
        return [*some, *filter(None, firsts)]

    def _lacking(self, caption: str) -> list[Sample]:
        """The samples without a caption."""
        return [s for s in self.samples if self._record(s, texts=False).get(caption) is None]

    def _field(self, records: list[dict[str, Any]], wanted: str, usual: tuple[str, ...]) -> str | None:
        """`wanted`, or the first of the usual names that any record has."""
        if not wanted:
            return usual_field(records, usual)
        if wanted not in all_fields(records):
            have = ", ".join(records[0]) or "none"
            raise DataError(f"no sample has a field {wanted!r}; the first has {have}; name another")
        return wanted

    def _get(self, record: dict[str, Any], name: str, sample: Sample) -> Any:
        if record.get(name) is None:
            if self.reading.empty_captions:
                return ""
            others = "others have" if sample is self.samples[0] else "the first sample has"
            raise DataError(
                f"{sample.where} has no {name!r}, though {others}; add it, or leave that sample out "
                "(--empty-captions lets it have the empty one)"
            )
        return record[name]

    def _take_labels(self, name: str) -> None:
        """Labels of the records; a sample without one is left out, unless it lacks a caption, too."""
        records = [self._record(sample, texts=False) for sample in self.samples]
        rows = [(sample.where, record) for sample, record in zip(self.samples, records, strict=True)]
        for sample, record in zip(self.samples, records, strict=True):
            if self._caption:
                self._get(record, self._caption, sample)
        values = column(rows, name, (), may_lack=0.5)
        assert values is not None
        known = as_number if self._texts_are_numbers() else None
        labels = to_labels(values, str(self.samples[0].source), known)
        kept = [i for i, number in enumerate(labels.numbers) if number is not None]
        lacking = next((i for i, number in enumerate(labels.numbers) if number is None), None)
        if lacking is not None:
            without = len(rows) - len(kept)
            self.notes += [f"not read: {without:,} without a label, such as {rows[lacking][0]}"]
        self.samples = [self.samples[i] for i in kept]
        self.labels = [number for number in labels.numbers if number is not None]
        self.class_names = labels.names

    def _texts_are_numbers(self) -> bool:
        """Whether a label "7" is 7: of files that know texts alone, or of labels that are some of more."""
        return bool(self.reading.num_classes) or all("cls" in sample.parts for sample in self.samples)

    def _folders(self) -> Classes:
        """The classes that the folders make."""
        files = [f"{sample.key}.{sample.picture}" for sample in self.samples]
        folders = [sample.folder for sample in self.samples]
        return classes_of(folders, files, self.samples[0].source, self.reading.num_classes)

    def _take_folders(self, classes: Classes) -> None:
        """Labels by folder; pictures beside the class folders are left out."""
        self.left_out[STRAY] += len(self.samples) - len(classes.members)
        self.left_out = +self.left_out
        self.samples = [self.samples[i] for i in classes.members]
        self.labels, self.class_names = classes.labels_of_members(), classes.names


class Folder(Samples):
    """A folder of pictures, the classes in subfolders (or none), captions in files beside them (or none)."""

    def __init__(self, tree: Tree, reading: Reading = USUAL):
        self.name, self.path, self.reading, self.tree = tree.root.stem, tree.root, reading, tree
        pictures = tree.pictures()
        if not pictures:
            there = tree.without(())
            found = f" (it holds {listed(there)})" if there else ""
            raise DataError(
                f"no pictures in {self.path}{found}; put {', '.join(sorted(SUFFIXES))} files there"
            )
        check_no_class_vanishes(tree, pictures)
        beside: dict[Path, dict[str, Path]] = {}
        for file in tree.having(f".{kind}" for kind in RECORDS):
            kinds = beside.setdefault(file.with_suffix(""), {})
            kinds.setdefault(file.suffix[1:].lower(), file)
            if "caption" in kinds:
                kinds.pop("txt", None)  # one caption is enough
        self.samples = [
            Sample(
                file.stem,
                file.parent.relative_to(self.path).parts,
                self.path,
                str(file),
                {file.suffix[1:].lower(): file, **beside.get(file.with_suffix(""), {})},
            )
            for file in pictures
        ]
        self.left_out, self.notes = Counter(), []
        self.caption_help = (
            "this kind of source has none: use a folder with KEY.txt beside each KEY.png, or with "
            "metadata.jsonl"
        )
        label = self._find_fields()
        if label:
            self._take_labels(label)
        else:
            classes = self._folders()
            self._take_folders(classes)
            self.notes += [classes.note] if classes.note else []
        parts = [part for sample in self.samples for part in sample.parts.items()]
        self.sidecars = [file for kind, file in parts if kind in RECORDS]
        self.left_out += tree.without([*pictures, *self.sidecars])

    @property
    def files(self) -> list[Path]:
        """The pictures."""
        return [sample.parts[sample.picture] for sample in self.samples]

    def identity(self) -> str:
        """See `Collection`; captions and labels beside the pictures count too."""
        lines = [f"{file.relative_to(self.path)} {self.tree.size(file)}" for file in self.files]
        beside = [read_text(self.tree.read(file), str(file)) for file in self.sidecars]
        return digest([*lines, *self.class_names, *beside])

    def _find_fields(self) -> str | None:
        """Find captions, and the name of the label; files that hold neither are no parts of the samples."""
        probed = self._probed()
        records = [self._record(sample, texts=False) for sample in probed]
        caption = self._field(records, self.reading.caption_field, CAPTION_FIELDS)
        label = self._field(records, self.reading.label_field, LABEL_FIELDS)
        objects = [_fields(self._bytes(s, "json"), s) for s in probed if "json" in s.parts]
        given = {"json": {key for found in objects for key in found}, "cls": {"label"}}
        given |= dict.fromkeys(TEXTS, {"text"})
        self._keep_parts({kind for kind in RECORDS if given[kind] & {caption, label}})
        if caption and (lacking := self._lacking(caption)):
            if self.reading.empty_captions:
                self.notes += [empty_note(len(lacking))]
            else:
                self._refuse_captions(lacking)
                caption = None
                self._keep_parts({kind for kind in RECORDS if given[kind] & {label}})
        self._caption, self.has_captions = caption, caption is not None
        return label

    def _keep_parts(self, kinds: set[str]) -> None:
        for sample in self.samples:
            sample.parts = {k: v for k, v in sample.parts.items() if k in kinds or k not in RECORDS}

    def _refuse_captions(self, lacking: Sequence[Sample]) -> None:
        """Say that some have a caption, which is not read."""
        first = lacking[0]
        self.caption_help = (
            f"{first.where} has no {first.key}.txt beside it, though others have; write it, or allow it by "
            "--empty-captions"
        )
        self.notes += [
            f"{len(self.samples) - len(lacking):,} have a caption in a file beside them, which is not read, "
            f"since {first.where} has none (--empty-captions gives those the empty one)"
        ]

    def _bytes(self, sample: Sample, part: str) -> bytes:
        return self.tree.read(sample.parts[part])

    def _name(self, sample: Sample, part: str) -> str:
        return str(sample.parts[part])

    def _picture(self, sample: Sample) -> Path | bytes:
        return self.tree.contents(sample.parts[sample.picture])


def _fields(contents: bytes, sample: Sample) -> dict[str, Any]:
    """What a KEY.json says; one that is no object says nothing of captions and labels."""
    try:
        found = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the record of {sample.where} is damaged ({error}); repair or remove it") from None
    return found if isinstance(found, dict) else {}
