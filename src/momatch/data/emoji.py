"""The built-in captioned pictures: 1,911 emoji, 32×32 RGB on white, with names; encoded captions beside them.

Source: Noto Emoji (Apache License 2.0), names by emoji-data (MIT); see assets/emoji/NOTICE.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from momatch.data.image_io import DataError
from momatch.data.images import ImageSet, Split, random_split
from momatch.data.paraphrases import Wordings
from momatch.data.rows import Pixels
from momatch.utils import files

FOLDER = Path(__file__).parent.parent / "assets" / "emoji"
SIZES = (16, 32)
TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"  # as diffusers' networks call them
MAX_TOKENS, TOKEN_DIM = 16, 128
HELDOUT_FRACTION = 0.1
TEXT_ENCODER = "minilm-l6-128"  # what `momatch.interop.text_encoders` calls the encoder of these captions


def load_emoji(image_size: int = 0) -> Split:
    """1,720 training and 191 held-out pictures, (N, 3, S, S) in [−1, 1], with encoded captions.

    Conditions are encoder_hidden_states (N, 16, 128) and encoder_attention_mask (N, 16).

    Args:
        image_size: S, 16 or 32 (0 means 32); 16 is the mean of 2×2 pixels.

    Raises:
        DataError: if it is another size.
    """
    size = image_size or SIZES[-1]
    if size not in SIZES:
        raise DataError(f"image_size is {size}, but the built-in emoji come as 16×16 or 32×32")
    levels, names, _ = pictures()
    images = torch.from_numpy(levels).permute(0, 3, 1, 2)
    if size == 16:
        images = torch.nn.functional.avg_pool2d(images.float(), 2).round().byte()
    packed = files.shipped_tensors(FOLDER / "captions.safetensors")
    scale = float(packed["scale"])

    def rows(name: str) -> dict[str, Wordings]:
        tokens, counts = packed[name], packed[f"{name}_counts"].long()
        return {
            TOKENS: Wordings(tokens, counts, scale, MAX_TOKENS, "tokens"),
            MASK: Wordings(tokens, counts, scale, MAX_TOKENS, "mask"),
        }

    emoji = ImageSet(
        Pixels(images.contiguous()),
        torch.zeros(len(names), dtype=torch.int64),
        1,
        f"emoji{size}",
        "emoji-matcher",
        conditions=rows("captions"),
        null_condition={name: row[0] for name, row in rows("null").items()},
        captions=names,
        origin={"text_encoder": TEXT_ENCODER},
    )
    return random_split(emoji, HELDOUT_FRACTION, seed=0)


def pictures() -> tuple[np.ndarray, list[str], list[str]]:
    """Pixels (N, 32, 32, 3) uint8, names and subcategories."""
    arrays = files.shipped_arrays(FOLDER / "pictures.npz")
    return arrays["images"], arrays["names"].tolist(), arrays["subcategories"].tolist()


def wordings(name: str, subcategory: str) -> list[str]:
    """Three ways to say what a picture shows, the plain name first.

    The second has an article or another order, the third the kind of thing.
    """
    kind = subcategory.replace("-", " ")
    if name.endswith(" flag"):
        return [name, f"flag of {name.removesuffix(' flag')}", f"{name}, {kind}"]
    first, joint, second = name.partition(" and ")
    other = f"{second} and {first}" if joint else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return [name, other, f"{name}, {kind}"]
