"""A .zip of pictures, read as it is: its members are the files of a `Tree`; nothing is unpacked to disk."""

from __future__ import annotations

import stat
import zlib
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from momatch.data.folders import OF_SYSTEMS, Tree
from momatch.data.image_io import DataError

OUTSIDE, LINK, AGAIN = "name outside the archive", "link in an archive", "file of the same name"
MOST_BYTES = 2**30  # that one member may unpack to; a picture of 179 million pixels has half as many
ENCRYPTED = 0x1
DAMAGES = (BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error)


class ZipTree(Tree):
    """The files of a .zip, under names as if it were a folder: data.zip/cat/0.png.

    Args:
        path: the archive; it stays open.

    Raises:
        DataError: if it cannot be read, or its members are encrypted.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._archive = ZipFile(path)
        except DAMAGES as error:
            raise DataError(f"cannot read {path} as a zip ({error}); copy it again") from None
        self._members: dict[Path, ZipInfo] = {}
        for info in self._archive.infolist():
            self._take(info)
        hidden = set(self.hidden)
        self.files = sorted(file for file in self._members if file not in hidden)

    def contents(self, file: Path) -> Path | bytes:
        """See `Tree`."""
        return self.read(file) if file in self._members else super().contents(file)

    def read(self, file: Path) -> bytes:
        """See `Tree`."""
        info = self._members.get(file)
        if info is None:
            return super().read(file)
        if info.file_size > MOST_BYTES:
            raise DataError(
                f"{file} unpacks to {info.file_size / 2**20:,.0f} MiB, more than a picture has; take it out"
            )
        try:
            return self._archive.read(info)  # at most as much as its entry says
        except DAMAGES as error:
            raise DataError(f"cannot unpack {file} ({error}); copy the archive again") from None

    def size(self, file: Path) -> int:
        """See `Tree`."""
        return self._members[file].file_size if file in self._members else super().size(file)

    def has(self, file: Path) -> bool:
        """See `Tree`."""
        return file in self._members or super().has(file)

    def _take(self, info: ZipInfo) -> None:
        name = PurePosixPath(info.filename.replace("\\", "/"))  # some programs of Windows write that
        if info.is_dir() or not name.parts:
            return
        file = self.root.joinpath(name)
        if name.is_absolute() or ".." in name.parts:
            self.left_out[OUTSIDE] += 1
        elif stat.S_ISLNK(info.external_attr >> 16):
            self.left_out[LINK] += 1
        elif info.flag_bits & ENCRYPTED:
            raise DataError(f"{file} is encrypted; unpack the archive with its password, and give the folder")
        elif file in self._members:
            self.left_out[AGAIN] += 1
        else:
            self._members[file] = info
            if any(part[0] == "." or part in OF_SYSTEMS for part in name.parts):
                self.hidden.append(file)
