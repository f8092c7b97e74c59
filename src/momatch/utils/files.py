"""Writing a file whole or not at all, and telling contents apart."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from momatch.utils.errors import UsageError
from momatch.utils.settings import shown
from momatch.utils.text import first_line


def as_path(value: object, what: str) -> Path:
    """A path from Python, where the value may be anything.

    Raises:
        UsageError: if it is none.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise UsageError(f"{what} is {shown(value)}; give a path or a name, in quotation marks")
    return Path(value)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), force the file to disk, then rename it to `path`.

    Raises:
        OSError: if any of it fails; `path` is then as it was, and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            write(temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"cannot write {path}: {error}") from None
        mask = os.umask(0)  # safetensors makes files that nobody else may read
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class Chunked(Protocol):
    """What is like a tensor, but comes a chunk of rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the chunks."""
        ...

    def chunks(self) -> Iterator[Tensor]:
        """All of it, in order."""
        ...


def fingerprint(tensors: Mapping[str, Tensor | Chunked]) -> str:
    """16 hexadecimal digits that change if a name, shape or value does."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in [tensor] if isinstance(tensor, Tensor) else tensor.chunks():
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FINGERPRINT = "fingerprint"  # in the header of a file of tensors


class DamagedFileError(UsageError):
    """A file of tensors that is not as it was written.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str):
        self.reason = reason
        super().__init__(f"{path} is damaged ({reason}); copy it again, or make it again")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write tensors as one safetensors file, whole or not at all, with their fingerprint in its header.

    Raises:
        OSError: if it cannot be written; an older file of that name is untouched.
    """
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header = {**metadata, FINGERPRINT: fingerprint(dense)}
    write_atomically(path, lambda temporary: save_file(dense, temporary, metadata=header))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the metadata of its header.

    A file of another program, or of an earlier version, has no fingerprint, and none is asked for.

    Raises:
        DamagedFileError: if it cannot be read, or does not hold what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path, first_line(error)) from None
    if metadata.get(FINGERPRINT, "") not in ("", fingerprint(tensors)):
        raise DamagedFileError(path, "its contents are not what was written")
    return tensors, metadata


def shipped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ships with the package.

    Raises:
        UsageError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from None


def shipped_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an .npz that ships with the package.

    Raises:
        UsageError: if it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}, a file of momatch itself, cannot be read ({error}); install momatch again")
