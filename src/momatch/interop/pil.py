"""Samples as images of Pillow, as pipelines of diffusers give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from momatch.interop.autoencoder import decoder_of, to_pictures
from momatch.models.model import Model
from momatch.utils.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def to_pil(samples: Tensor, model: Model | None = None) -> list[Image]:
    """Samples as a list of Pillow images, grey or RGB.

    Args:
        samples: (N, C, H, W): pixels in [−1, 1], or latents.
        model: that made them; its pipeline's autoencoder decodes latents, where it can be found. Of latents
            without it the first channels are shown.

    Raises:
        UsageError: if they are no images: vectors, trajectories, tokens, videos.
    """
    from PIL import Image

    if samples.ndim != 4:
        raise UsageError(f"samples of shape {tuple(samples.shape)} are no images; give (N, C, H, W)")
    pictures = to_pictures(samples, None if model is None else decoder_of(model))
    levels = ((pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each.squeeze(-1).numpy()) for each in levels]
