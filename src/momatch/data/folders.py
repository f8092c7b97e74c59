"""What lies in a folder, and the classes that its subfolders make; whatever is left out is counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from momatch.data.image_io import SUFFIXES, DataError
from momatch.utils.text import count_of

# Pictures that are not read; a class of them alone would vanish.
OTHER_PICTURES = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".exr", ".tga"}
OF_SYSTEMS = {"__MACOSX", "@eaDir", "lost+found"}  # made by archivers and disks, with pictures of their own
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
NUMBERED = re.compile(r"(?:img)?(\d{5,})\.\w+")
HIDDEN, BROKEN, LOOP, UNREADABLE = (
    "hidden file",
    "broken link",
    "link to a folder above it",
    "unreadable folder",
)
WITHOUT_ENDING = "file without an ending"
STRAY = "picture beside the class folders"


@dataclass
class Tree:
    """The files under a folder, links followed.

    Attributes:
        root: the folder.
        files: those that can be seen, sorted.
        hidden: those that cannot; records may name them all the same.
        left_out: what else is passed over, by kind, and how many of each.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def having(self, suffixes: Iterable[str]) -> list[Path]:
        """The files of these endings, in any case."""
        wanted = set(suffixes)
        return [file for file in self.files if file.suffix.lower() in wanted]

    def pictures(self) -> list[Path]:
        """Those that can be read."""
        return self.having(SUFFIXES)

    def contents(self, file: Path) -> Path | bytes:
        """What a picture is read from: the file itself, or the bytes of one in an archive."""
        return file

    def read(self, file: Path) -> bytes:
        """All of a file.

        Raises:
            DataError: if it cannot be read.
        """
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {file} ({error.strerror}); repair or remove it") from None

    def size(self, file: Path) -> int:
        """Bytes of a file."""
        return file.stat().st_size

    def has(self, file: Path) -> bool:
        """Whether there is such a file."""
        try:
            return file.is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    def named(self, name: str) -> list[Path]:
        """The files of this name, in whatever subfolder."""
        return [file for file in self.files if file.name == name]

    def without(self, used: Iterable[Path]) -> Counter[str]:
        """What is left out if only `used` is read: kind → how many."""
        taken = {os.path.abspath(file) for file in used}
        rest = [(file, file.suffix.lower() or WITHOUT_ENDING) for file in self.files]
        rest += [(file, HIDDEN) for file in self.hidden]
        return self.left_out + Counter(kind for file, kind in rest if os.path.abspath(file) not in taken)


def walk(root: Path) -> Tree:
    """Look through a folder.

    Raises:
        DataError: if it cannot be opened.
    """
    tree = Tree(root)
    try:
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"cannot open the folder {root} ({error.strerror}); give another") from None
    _visit(root, (), False, tree)
    tree.files.sort()
    return tree


def _visit(folder: Path, above: tuple[str, ...], hidden: bool, tree: Tree) -> None:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        tree.left_out[UNREADABLE] += 1
        return
    here = (*above, os.path.realpath(folder))
    for entry in entries:
        path, unseen = folder / entry.name, hidden or entry.name[0] == "." or entry.name in OF_SYSTEMS
        if path.is_dir():
            if entry.is_symlink() and os.path.realpath(path) in here:
                tree.left_out[LOOP] += 1
            else:
                _visit(path, here, unseen, tree)
        elif unseen:
            tree.hidden.append(path)
        elif entry.is_symlink() and not path.exists():
            tree.left_out[BROKEN] += 1
        else:
            tree.files.append(path)


@dataclass(frozen=True)
class Classes:
    """Classes by the folder that each picture is in.

    Attributes:
        labels: of each picture, 0 where there are no classes; None for a picture beside the class folders,
            which is of none.
        names: the classes in the order of their labels; empty if there are none.
        note: what was made of folders such as train and val; "" if there are none.
    """

    labels: list[int | None]
    names: list[str]
    note: str = ""

    @property
    def members(self) -> list[int]:
        """The places of the pictures that are read."""
        return [i for i, label in enumerate(self.labels) if label is not None]

    def labels_of_members(self) -> list[int]:
        """The labels of those."""
        return [label for label in self.labels if label is not None]


def classes_of(
    folders: Sequence[tuple[str, ...]], files: Sequence[str], root: Path, num_classes: int = 0
) -> Classes:
    """Classes from the parts of each picture's folder, relative to the root: ("cat",), ("train", "cat").

    Folders named after parts of a data set (train, val, test) are no classes: they are read as one set. A
    folder that holds all classes is no part of their names, and folders that hold the thousands of numbered
    files, as EDM and StyleGAN lay them out, are no classes.

    Args:
        folders: of each picture.
        files: the names of the pictures.
        root: whose folders they are, for errors.
        num_classes: that there are, where folders are some of more; 0 if they are all. Folders that are
            numbers are then their labels.

    Raises:
        DataError: if as many pictures or more lie beside the class folders as in them.
    """
    tops = {parts[0] for parts in folders if parts}
    split = bool(tops) and {top.lower() for top in tops} <= SPLITS
    inner = [parts[1:] if split else parts for parts in folders]
    note = f"{', '.join(sorted(tops))} are read as one set" if split and len(tops) > 1 else ""
    placed = [(parts, file) for parts, file in zip(inner, files, strict=True) if parts]
    if len(set(inner)) > 1 and all(_is_thousand(parts, file) for parts, file in placed):
        numbered = "folders hold the thousands of numbered files and are no classes"
        return Classes([0] * len(inner), [], "; ".join(filter(None, (note, numbered))))
    above = len(os.path.commonprefix([*map(list, set(inner))])) if len(set(inner)) > 1 else 0
    names = ["/".join(parts[above:]) for parts in inner]
    order = class_order(name for name in names if name)
    if not order:
        return Classes([0] * len(names), [], note)
    strays = names.count("")
    if 2 * strays >= len(names):
        raise DataError(
            f"{root} holds {count_of(strays, 'picture')} beside folders with {len(names) - strays:,}; put "
            "them into a folder of their class, or take them or the folders away"
        )
    if num_classes and all(name.isascii() and name.isdigit() for name in order):
        return Classes([int(name) if name else None for name in names], [], note)
    number = {name: i for i, name in enumerate(order)}
    return Classes([number.get(name) for name in names], order, note)


def _is_thousand(folder: tuple[str, ...], file: str) -> bool:
    """Whether a folder is only the thousand of a file's number: 00001/img00001234.png, 01000/01234.png."""
    match = NUMBERED.fullmatch(file)
    if (
        match is None
        or not folder
        or not (folder[-1].isascii() and folder[-1].isdigit() and len(folder[-1]) > 4)
    ):
        return False
    thousand = int(match[1]) // 1000
    return int(folder[-1]) in (thousand, 1000 * thousand)


def class_order(names: Iterable[str]) -> list[str]:
    """Each name once: whole numbers by their value, other names by the alphabet."""
    found = set(names)
    if all(name.isascii() and name.isdigit() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def check_no_class_vanishes(tree: Tree, pictures: Sequence[Path]) -> None:
    """Refuse class folders that hold pictures in a format that is not read, and no others.

    Raises:
        DataError: naming the folder and what it holds.
    """
    unread = tree.having(OTHER_PICTURES)
    folders = {file.parent for file in pictures} if unread else {tree.root}
    if folders == {tree.root}:
        return  # no classes, so none can vanish
    seen = {part for folder in folders for part in (folder, *folder.parents)}
    others = Counter((file.parent, file.suffix.lower()) for file in unread if file.parent not in seen)
    for (folder, suffix), count in sorted(others.items()):
        raise DataError(
            f"the folder {folder} holds {count} {suffix} and no picture that can be read; convert them to "
            "PNG, or take the folder away"
        )


def listed(left_out: Counter[str]) -> str:
    """'12 .tif, 1 hidden file': what is left out, most first."""
    plural = {UNREADABLE: "unreadable folders", LOOP: "links to folders above them"}
    plural |= {WITHOUT_ENDING: "files without an ending", STRAY: "pictures beside the class folders"}
    words = []
    for kind, count in sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0])):
        if kind.startswith(".") or count == 1:
            words.append(f"{count:,} {kind}")
        else:
            words.append(f"{count:,} {plural[kind]}" if kind in plural else count_of(count, kind))
    return ", ".join(words)
