"""One picture: from a file's bytes to pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from momatch.utils.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(UsageError):
    """Data that cannot be used; the message names the path and what to do."""


def read_picture(source: Path | bytes, name: str, image_size: int = 0, smooth: bool = False) -> np.ndarray:
    """Read a picture.

    Args:
        source: the file, or its contents.
        name: what to call it in an error.
        image_size: side to which the central square is reduced, or enlarged; 0 takes the picture as it is.
        smooth: enlarge by bicubic interpolation instead of repeating pixels.

    Returns:
        uint8 (H, W) or (H, W, 3).

    Raises:
        DataError: if it is no picture, or its range is unknown.
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            return to_pixels(central_square(image, image_size, smooth), name)
    except (UnidentifiedImageError, OSError) as error:
        reason = error if isinstance(source, Path) else "no picture, or cut short"
        raise DataError(f"cannot read the picture {name} ({reason}); repair or remove it") from None


def central_square(image: Image, size: int, smooth: bool = False) -> Image:
    """The central square at size × size, averaged; the picture as it is for size 0."""
    from PIL import Image as pil

    if not size:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    filter = pil.Resampling.BICUBIC if smooth and side < size else pil.Resampling.BOX
    return image.resize((size, size), filter, box=box)


def to_pixels(image: Image, name: str) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3). Transparency is laid on white; 16 bits are scaled to 8.

    Raises:
        DataError: if the range of the pixels is unknown.
    """
    from PIL import Image as pil

    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} has pixels of mode {image.mode!r}, whose range is unknown; save it in 8 bits"
        )
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return np.asarray(pil.alpha_composite(pil.new("RGBA", image.size, "white"), picture).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) → (channels, H, W), grey (1) or RGB (3)."""
    from PIL import Image as pil

    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(pil.fromarray(pixels).convert("L"))
    elif channels == 3 and pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=2)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
