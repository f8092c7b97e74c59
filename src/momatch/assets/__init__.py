"""Models and pictures that ship with the package, and how they were made."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from momatch.errors import UsageError


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ships with the package.

    Raises:
        UsageError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from None


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
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
