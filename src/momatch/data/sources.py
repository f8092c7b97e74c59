"""From a name or a path to a `Split`: the built-in digits, a folder of pictures, or an .npz."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from momatch.data.digits import load_digits
from momatch.data.images import ImageSet, Split, random_split, stratified_split
from momatch.data.rows import Pixels
from momatch.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HELDOUT_FRACTION = 0.1
MIN_PICTURES = 100


class DataError(UsageError):
    """Data that cannot be used; the message names the path and what to do."""


def load_data(source: str, image_size: int = 0) -> Split:
    """Load pictures and hold some out.

    Args:
        source: "digits"; or a folder of equally sized pictures, the classes in subfolders (or none); or an
            .npz with `images` (N, H, W[, C]) uint8 and, for a conditional model, `labels` (N,) integers. Of a
            folder or .npz a tenth of every class is held out, always the same.
        image_size: pictures of a folder are cut to their central square and reduced to this side; 0 takes
            them as they are.

    Raises:
        DataError: if the path is missing or empty, or the pictures do not fit together.
    """
    if source == "digits":
        if image_size not in (0, 8):
            raise DataError(f"image_size is {image_size}, but the built-in digits are 8×8; leave it out")
        return load_digits()
    path = Path(source)
    if not path.exists():
        raise DataError(f"no data at {source!r}; give 'digits', a folder of pictures, or an .npz file")
    images, labels = _read_npz(path) if path.suffix == ".npz" else _read_folder(path, image_size)
    if len(images) < MIN_PICTURES:
        raise DataError(f"{source} holds {len(images)} pictures; {MIN_PICTURES} or more are needed")
    if image_size and images.shape[2:] != (image_size, image_size):
        raise DataError(
            f"image_size is {image_size}, but {source} has pictures of {images.shape[2]}×{images.shape[3]}; "
            "only a folder's pictures are resized"
        )
    if images.shape[1] not in (1, 3) or not images[0].numel():
        raise DataError(
            f"{source} has pictures of {images.shape[1]} channels and {images.shape[2]}×{images.shape[3]} "
            "pixels; give grey (1) or RGB (3) pictures"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(images):
        raise DataError(
            f"{source} has labels from {int(labels.min())} to {int(labels.max())} on {len(images)} pictures; "
            "labels count from 0, one for each class"
        )
    pictures = ImageSet(images, labels, int(labels.max()) + 1, path.stem)
    split = stratified_split(pictures, HELDOUT_FRACTION, seed=0)
    if len(split.heldout) < HELDOUT_FRACTION * len(images) / 2:  # classes too small to give a tenth each
        split = random_split(pictures, HELDOUT_FRACTION, seed=0)
    return split


def _read_npz(path: Path) -> tuple[Pixels, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.zeros(len(images), dtype=np.int64)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, BadZipFile) as error:
        raise DataError(f"cannot read {path} as an .npz with an array 'images': {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"'images' in {path} is {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, C)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"'labels' in {path} is {labels.dtype} {labels.shape}; give one integer for each picture"
        )
    return _to_rows(images), torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path, image_size: int) -> tuple[Pixels, Tensor]:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of pictures nor an .npz file")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"no pictures in {path}; put {', '.join(sorted(SUFFIXES))} files there")
    classes = sorted({file.parent for file in files})
    arrays = []
    for file in files:
        try:
            with pil.open(file) as image:
                arrays.append(_pixels(_reduced(image, image_size), file))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"cannot read the picture {file} ({error}); repair or remove it") from None
        if arrays[-1].shape != arrays[0].shape:
            raise DataError(
                f"{file} has shape {arrays[-1].shape}, {files[0]} has {arrays[0].shape}; "
                "convert all pictures to one size, and all to grey or all to RGB"
            )
    labels = torch.tensor([classes.index(file.parent) for file in files])
    return _to_rows(np.stack(arrays)), labels


def _reduced(image: Image, size: int) -> Image:
    """The central square at size × size, averaged; the picture as it is for size 0."""
    from PIL import Image as pil

    if not size:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.resize((size, size), pil.Resampling.BOX, box=box)


def _pixels(image: Image, file: Path) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3). Transparency is laid on white; 16 bits are scaled to 8."""
    from PIL import Image as pil

    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{file} has pixels of mode {image.mode!r}, whose range is unknown; save it in 8 bits"
        )
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return np.asarray(pil.alpha_composite(pil.new("RGBA", image.size, "white"), picture).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _to_rows(images: np.ndarray) -> Pixels:
    """uint8 (N, H, W[, C]) → rows (N, C, H, W)."""
    levels = torch.from_numpy(images)
    return Pixels(levels[:, None] if levels.ndim == 3 else levels.permute(0, 3, 1, 2).contiguous())
