"""From a name or a path to a `Split`: the built-in digits, a folder of pictures, or an .npz."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from momatch.data.digits import load_digits
from momatch.data.images import ImageSet, Split, stratified_split
from momatch.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HELDOUT_FRACTION = 0.1


class DataError(UsageError):
    """Data that cannot be used; the message names the path and what to do."""


def load_data(source: str) -> Split:
    """Load pictures and hold some out.

    Args:
        source: "digits"; or a folder of equally sized pictures, the classes in subfolders (or none); or an
            .npz with `images` (N, H, W[, C]) uint8 and, for a conditional model, `labels` (N,) integers. Of a
            folder or .npz a tenth of every class is held out, always the same.

    Raises:
        DataError: if the path is missing or empty, or the pictures do not fit together.
    """
    if source == "digits":
        return load_digits()
    path = Path(source)
    if not path.exists():
        raise DataError(f"no data at {source!r}; give 'digits', a folder of pictures, or an .npz file")
    images, labels = _read_npz(path) if path.suffix == ".npz" else _read_folder(path)
    if len(images) < 20:
        raise DataError(f"{source} holds {len(images)} pictures; 20 or more are needed")
    if labels.min() < 0:
        raise DataError(f"{source} has the label {int(labels.min())}; labels count from 0")
    return stratified_split(
        ImageSet(images, labels, int(labels.max()) + 1, path.stem), HELDOUT_FRACTION, seed=0
    )


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.zeros(len(images), dtype=np.int64)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"cannot read {path} as an .npz with an array 'images': {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"'images' in {path} is {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, C)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"'labels' in {path} is {labels.dtype} {labels.shape}; give one integer for each picture"
        )
    return _to_tensor(images), torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image, UnidentifiedImageError

    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of pictures nor an .npz file")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"no pictures in {path}; put {', '.join(sorted(SUFFIXES))} files there")
    classes = sorted({file.parent for file in files})
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"cannot read the picture {file} ({error}); repair or remove it") from None
        if arrays[-1].shape != arrays[0].shape:
            raise DataError(
                f"{file} has shape {arrays[-1].shape}, {files[0]} has {arrays[0].shape}; "
                "make all pictures alike"
            )
    labels = torch.tensor([classes.index(file.parent) for file in files])
    return _to_tensor(np.stack(arrays)), labels


def _to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W[, C]) → float32 (N, C, H, W) in [−1, 1]."""
    tensor = torch.from_numpy(images).float() / 127.5 - 1
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
