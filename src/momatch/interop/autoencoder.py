"""Latents and pictures: the autoencoder of a diffusers pipeline, and what a model's samples look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momatch.interop.pipelines import AUTOENCODERS, import_diffusers
from momatch.models.model import Model
from momatch.utils.errors import UsageError
from momatch.utils.text import first_line

Decoder = Callable[[Tensor], Tensor]
DECODED_AT_A_TIME = 8


class Autoencoder:
    """A pipeline's VAE, with latents at the scale that the pipeline's network was trained on.

    latents = (what the encoder says − shift) · scaling_factor; where the VAE knows a mean and standard
    deviation of each channel, (what the encoder says − mean) / std · scaling_factor.

    Attributes:
        vae: one of diffusers' autoencoders.
    """

    def __init__(self, vae: Any):
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        self.scaling = float(config.get("scaling_factor") or 1.0)
        self.shift: float | Tensor = float(config.get("shift_factor") or 0.0)
        self.spread: float | Tensor = 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.shift = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1)
            self.spread = torch.tensor(config["latents_std"]).view(1, -1, 1, 1)

    @property
    def image_channels(self) -> int:
        """Of the pictures that it encodes."""
        return int(self.vae.config.get("in_channels", 3))

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None) -> Tensor:
        """Pictures to latents.

        Args:
            images: (B, C, H, W) in [−1, 1].
            noise: shape → ε, for a sample of the encoder's distribution; None takes its mean.

        Returns:
            (B, c, h, w) float32, on the CPU.
        """
        parameter = next(self.vae.parameters())
        said = self.vae.encode(images.to(parameter.device, parameter.dtype), return_dict=False)[0]
        if not isinstance(said, Tensor):  # a distribution; some autoencoders have none
            sampled = 0.0 if noise is None else said.std * noise(tuple(said.mean.shape)).to(said.std)
            said = said.mean + sampled
        return (said.float().cpu() - self.shift) / self.spread * self.scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to pictures (B, C, H, W), float32, clipped to [−1, 1], where latents are."""
        parameter, found = next(self.vae.parameters()), []
        for part in latents.split(DECODED_AT_A_TIME):
            inner = (part.float().cpu() / self.scaling * self.spread + self.shift).to(parameter)
            found.append(self.vae.decode(inner, return_dict=False)[0].float().clamp(-1, 1))
        return torch.cat(found).to(latents.device)


def load_autoencoder(pipeline: str | Path) -> Autoencoder | None:
    """The autoencoder of a pipeline's folder (or, by its name, of one in diffusers' cache); None without one.

    Raises:
        UsageError: if there is one that cannot be read, or diffusers is not installed.
    """
    folder = next(
        (Path(pipeline, c) for c in AUTOENCODERS if Path(pipeline, c, "config.json").is_file()), None
    )
    if folder is None:
        return None if Path(pipeline).exists() else _from_cache(str(pipeline))
    diffusers = import_diffusers()
    try:
        kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
        return Autoencoder(kind.from_pretrained(folder))
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise UsageError(f"cannot read the autoencoder in {folder} ({first_line(error)})") from None


def decoder_of(model: Model) -> Decoder | None:
    """Latents → pictures for a latent model whose pipeline is there; None for all other models."""
    pipeline = model.provenance.pipeline
    if not pipeline:
        return None
    autoencoder = load_autoencoder(str(pipeline))
    if autoencoder is None:
        return None
    autoencoder.vae.to(model.device)
    return autoencoder.decode


def to_pictures(samples: Tensor, decoder: Decoder | None = None) -> Tensor:
    """Samples as pictures (B, 1 or 3, H, W): decoded, as they are, or the first channels of latents."""
    if decoder is not None:
        return decoder(samples)
    channels = samples.shape[1]
    return samples[:, :3] if channels > 3 else samples if channels in (1, 3) else samples[:, :1]


def _from_cache(name: str) -> Autoencoder | None:
    diffusers = import_diffusers()
    for component in AUTOENCODERS:
        try:
            config = diffusers.AutoencoderKL.load_config(name, subfolder=component, local_files_only=True)
            kind = getattr(diffusers, config["_class_name"])
            return Autoencoder(kind.from_pretrained(name, subfolder=component, local_files_only=True))
        except (OSError, ValueError, LookupError, AttributeError):
            continue
    return None
