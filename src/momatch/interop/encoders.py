"""What is made of pictures and captions before a network sees them: by a pipeline or a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momatch.data.collections import Item
from momatch.data.image_io import with_channels
from momatch.data.prepared import IMAGES, LATENTS
from momatch.data.rows import to_unit
from momatch.interop import pipelines
from momatch.interop.autoencoder import Autoencoder
from momatch.interop.prompts import encode_prompts, null_condition
from momatch.interop.text_encoders import WHOLE, SentenceEncoder
from momatch.utils import devices
from momatch.utils.errors import UsageError
from momatch.utils.seeding import generator


class Encoders:
    """The encoders of a diffusers pipeline; nothing heavy is loaded before `load`.

    Attributes:
        image_size: side of the pictures, the pipeline's own if 0 was given.
        channels: of the pictures, 1 or 3.
        has_text: whether the pipeline has a text encoder.
        fingerprint: tells autoencoder and text encoders from others.

    Raises:
        UsageError: if the folder holds no pipeline, or the size does not fit.
    """

    def __init__(
        self,
        pipeline: str,
        image_size: int = 0,
        posterior: str = "sample",
        seed: int = 0,
        device: str = devices.AUTO,
    ):
        found = pipelines.components(pipeline)
        self.pipeline, self.posterior, self.seed = pipeline, posterior, seed
        self._device = devices.resolve(device)
        self.has_text = any(found.get(name) for name in pipelines.TEXT_ENCODERS)
        self.autoencoder_name = next((name for name in pipelines.AUTOENCODERS if found.get(name)), None)
        part = self.autoencoder_name
        config = pipelines.component_config(pipeline, part) if part else {}
        denoiser = pipelines.denoiser_config(pipeline)
        self.channels = int(config.get("in_channels", 3)) if part else int(denoiser.get("in_channels", 3))
        if self.channels not in (1, 3):
            raise UsageError(
                f"{pipeline} works on pictures of {self.channels} channels; 1 or 3 are known here"
            )
        self.image_size = _image_size(pipeline, image_size, _factor(config) if part else 1, denoiser)
        self.fingerprint = pipelines.encoders_fingerprint(pipeline)
        self._loaded: Any = None
        self._autoencoder: Autoencoder | None = None

    def load(self) -> None:
        """Load what there is."""
        if not self.has_text and self.autoencoder_name is None:
            return
        self._loaded = pipelines.load_encoders(self.pipeline, str(self._device))
        if self.autoencoder_name:
            self._autoencoder = Autoencoder(getattr(self._loaded, self.autoencoder_name))

    def pictures(self, items: Sequence[Item], rows: Sequence[int]) -> dict[str, Tensor]:
        """Latents {"latents": (B, c, h, w) float32}, or {"images": (B, C, H, W) uint8} without autoencoder.

        Args:
            items: the pictures, of `image_size`.
            rows: their places in the whole; a draw depends on the seed and the place alone.
        """
        levels = _levels(items, self.channels)
        if self._autoencoder is None:
            return {IMAGES: levels}

        def noise(shape: tuple[int, ...]) -> Tensor:
            draws = [generator(self.seed, "posterior", row) for row in rows]
            return torch.stack([torch.randn(shape[1:], generator=draw) for draw in draws])

        drawn = noise if self.posterior == "sample" else None
        return {LATENTS: self._autoencoder.encode(to_unit(levels), drawn)}

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the network is asked with: (B, …) each, by diffusers' names."""
        return encode_prompts(self._loaded, captions, self.image_size)

    def null_condition(self) -> dict[str, Tensor]:
        """The same when nothing is asked for: (…) each."""
        return null_condition(self._loaded, self.image_size)


class SentenceEncoders:
    """A text encoder alone, for a pixel-space model of one's own: pictures stay pixels, in colour.

    Attributes and methods: as of `Encoders`.

    Raises:
        UsageError: if no size is given, or the encoder is not installed.
    """

    channels, has_text = 3, True

    def __init__(self, image_size: int, name: str = WHOLE):
        if not image_size:
            raise UsageError("with --text-encoder, give the side of the pictures: --image-size 32")
        self.image_size = image_size
        self.fingerprint = name
        self._encoder = SentenceEncoder(name)

    def load(self) -> None:
        """Nothing: it is small, and there already."""

    def pictures(self, items: Sequence[Item], rows: Sequence[int]) -> dict[str, Tensor]:
        """{"images": (B, 3, H, W) uint8}."""
        return {IMAGES: _levels(items, self.channels)}

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """encoder_hidden_states (B, L, D), encoder_attention_mask (B, L)."""
        return self._encoder.encode(captions)

    def null_condition(self) -> dict[str, Tensor]:
        """The encoding of ""."""
        return {name: rows[0] for name, rows in self._encoder.encode([""]).items()}


def _levels(items: Sequence[Item], channels: int) -> Tensor:
    return torch.from_numpy(np.stack([with_channels(item.pixels, channels) for item in items]))


def _factor(config: dict[str, Any]) -> int:
    """How many pixels of a side become one latent."""
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
    return 2 ** (len(widths) - 1)


def _image_size(pipeline: str, wanted: int, factor: int, denoiser: dict[str, Any]) -> int:
    own = denoiser.get("sample_size") or 0
    own = int(own[0] if isinstance(own, list) else own)
    if not wanted and not own:
        raise UsageError(f"{Path(pipeline).name} does not say how large its pictures are; give --image-size")
    size = wanted or own * factor
    if size % factor:
        raise UsageError(
            f"image_size is {size}, but the autoencoder of {pipeline} makes one latent of {factor}×{factor} "
            f"pixels; use {max(1, round(size / factor)) * factor}"
        )
    return size
