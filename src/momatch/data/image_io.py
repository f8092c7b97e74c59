"""One picture: from a file's bytes to pixels."""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from momatch.utils.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # chunks that decide what a PNG shows
POINTER = b"version https://git-lfs"
WHITE_IS_ZERO = (262, 0)  # a TIFF's tag of what its levels mean, and its value
LIMIT = Lock()  # Pillow's limit of pixels is one for the process
CAMERA_NOTES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where a file may say it
GREY_STEPS = {"L;2": 85, "L;4": 17}  # levels between neighbours of a grey PNG of 2 and 4 bits, by raw mode


class DataError(UsageError):
    """Data that cannot be used; the message names the path and what to do."""


def read_picture(
    source: Path | bytes, name: str, image_size: int = 0, smooth: bool = False, max_megapixels: int = 0
) -> np.ndarray:
    """Read a picture, turned as its EXIF entry says.

    Args:
        source: the file, or its contents.
        name: what to call it in an error.
        image_size: side to which the central square is reduced, or enlarged; 0 takes the picture as it is.
        smooth: enlarge by bicubic interpolation instead of repeating pixels.
        max_megapixels: million pixels that are read at most; 0 is Pillow's limit, about 179.

    Returns:
        uint8 (H, W) or (H, W, 3).

    Raises:
        DataError: if it is no picture, too large, or its range is unknown.
    """
    from PIL.Image import DecompressionBombError

    try:
        try:
            return _read(source, name, image_size, smooth, max_megapixels)
        except (ValueError, SyntaxError) as error:  # SyntaxError: what Pillow calls a broken chunk
            contents = source.read_bytes() if isinstance(source, Path) else source
            if isinstance(error, DataError) or not contents.startswith(PNG):
                raise
            # Long texts (a workflow, say) and long colour profiles; neither changes what is read.
            return _read(_pixel_chunks(contents), name, image_size, smooth, max_megapixels)
    except DataError:
        raise
    except DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        pixels = f"{int(found[0]) / 1e6:,.0f} million" if found else "too many"
        raise DataError(
            f"{name} has {pixels} pixels, more than are read unasked; scale it down, or allow as many by "
            "--max-megapixels (in Python Reading(max_megapixels=…))"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        if is_pointer(source):
            raise DataError(f"{name} is a pointer of Git LFS, not the picture; run git lfs pull") from None
        reason = error if isinstance(source, Path) else "no picture, or cut short"
        raise DataError(
            f"cannot read the picture {name} ({reason}); repair or remove it, or allow for some such by "
            "--skip-unreadable N"
        ) from None


def is_pointer(source: Path | bytes) -> bool:
    """Whether this is what Git keeps in place of a large file that was not fetched."""
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                source = file.read(len(POINTER))
        except OSError:
            return False
    return source.startswith(POINTER)


def to_picture(image: Image, name: str, image_size: int = 0, smooth: bool = False) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of an opened image; for the arguments see `read_picture`.

    Transparency is laid on white and levels are spread to 8 bits before anything is averaged.

    Raises:
        DataError: if the range of the pixels is unknown.
    """
    picture = _opaque(_upright(image), name)
    return np.asarray(central_square(_from_black(picture, image), image_size, smooth))


def central_square(image: Image, size: int, smooth: bool = False) -> Image:
    """The central square of a grey or RGB image at size × size, averaged; the image as it is for size 0."""
    from PIL import Image as pil

    if not size:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    filter = pil.Resampling.BICUBIC if smooth and side < size else pil.Resampling.BOX
    return image.resize((size, size), filter, box=box)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) → (channels, H, W), grey (1) or RGB (3)."""
    from PIL import Image as pil

    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(pil.fromarray(pixels).convert("L"))
    elif channels == 3 and pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=2)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """RGBA uint8 (…, 4) → RGB uint8 (…, 3), laid on white."""
    alpha = pixels[..., 3:].astype(np.uint16)
    laid = pixels[..., :3] * alpha + 255 * (255 - alpha)
    return ((laid + 127) // 255).astype(np.uint8)


def _read(source: Path | bytes, name: str, image_size: int, smooth: bool, max_megapixels: int) -> np.ndarray:
    with _opened(source, max_megapixels) as image:
        _scale_key(image)
        return to_picture(image, name, image_size, smooth)


def _opened(source: Path | bytes, max_megapixels: int) -> Image:
    from PIL import Image as pil

    stream = source if isinstance(source, Path) else BytesIO(source)
    if not max_megapixels:
        return pil.open(stream)
    with LIMIT:
        usual = pil.MAX_IMAGE_PIXELS
        pil.MAX_IMAGE_PIXELS = max_megapixels * 500_000  # Pillow refuses twice as many, and warns before
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pil.DecompressionBombWarning)
                return pil.open(stream)
        finally:
            pil.MAX_IMAGE_PIXELS = usual


def _scale_key(image: Image) -> None:
    """Bring the colour key of a grey PNG of 2 or 4 bits to the levels that Pillow makes of its pixels."""
    tiles, key = getattr(image, "tile", None), image.info.get("transparency")
    if image.format == "PNG" and tiles and isinstance(key, int) and isinstance(tiles[0][3], str):
        image.info["transparency"] = key * GREY_STEPS.get(tiles[0][3], 1)


def _from_black(picture: Image, image: Image) -> Image:
    """Inverted, if it is a TIFF of 16 bits whose 0 is white; Pillow inverts those of 8 bits alone."""
    if (
        image.mode.startswith("I;16")
        and getattr(image, "tag_v2", {}).get(WHITE_IS_ZERO[0]) == WHITE_IS_ZERO[1]
    ):
        from PIL import ImageOps

        return ImageOps.invert(picture)
    return picture


def _upright(image: Image) -> Image:
    """Turned as cameras note it; as it is if the note is damaged."""
    image.load()
    if not any(name in image.info for name in CAMERA_NOTES):
        return image  # exif_transpose would copy it
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a damaged note; the pixels are whole
        return image


def _opaque(image: Image, name: str) -> Image:
    """The same in mode "L" or "RGB", laid on white where it is transparent; 16 bits are scaled to 8."""
    from PIL import Image as pil

    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        grey = (levels.astype(np.float64) / 257).round().astype(np.uint8)
        return pil.fromarray(np.where(levels == key, 255, grey).astype(np.uint8) if key is not None else grey)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} has pixels of mode {image.mode!r}, whose range is unknown; save it in 8 bits"
        )
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or key is not None:
        picture = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", image.size, "white"), picture).convert("RGB")
    wanted = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _pixel_chunks(contents: bytes) -> bytes:
    """A PNG without texts, profiles and other remarks."""
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(contents):
        end = place + 12 + int.from_bytes(contents[place : place + 4], "big")
        if contents[place + 4 : place + 8] in PNG_PIXELS:
            kept.append(contents[place:end])
        place = end
    return b"".join(kept)
