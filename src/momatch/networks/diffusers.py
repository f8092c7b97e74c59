"""Networks of the diffusers library, called our way: (z, time, cond) → tensor.

Entries of cond carry the names of diffusers' own arguments, but for `label`, which is its `class_labels`:

| class                    | entries of cond                                                             |
|--------------------------|-----------------------------------------------------------------------------|
| `UNet2DModel`            | label, if it has classes                                                    |
| `UNet2DConditionModel`   | encoder_hidden_states; SDXL: text_embeds and time_ids too                   |
| `DiTTransformer2DModel`  | label                                                                       |
| `PixArtTransformer2DModel` | encoder_hidden_states, encoder_attention_mask                             |
| `SD3Transformer2DModel`  | encoder_hidden_states, pooled_projections                                   |
| `FluxTransformer2DModel` | encoder_hidden_states, pooled_projections; guidance, if it embeds one (3.5) |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from momatch.diffusion.interface import Cond
from momatch.networks.configs import DiffusersConfig
from momatch.utils.errors import UsageError

FLUX_GUIDANCE = 3.5  # what FluxPipeline asks for unless told otherwise
VAE_FACTOR = 8  # pixels of a PixArt picture to one of its latents


def library() -> Any:
    """The diffusers package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise UsageError(
            "this needs the diffusers package, which is not installed; pip install 'momatch[diffusers]'"
        ) from None
    return diffusers


class DiffusersNetwork(nn.Module):
    """One of diffusers' networks, as `model`.

    Args:
        config: which, and of what shape.
        model: the network itself, if it is there already; freshly initialised if None.
    """

    def __init__(self, config: DiffusersConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        if model is None:
            model = getattr(library(), config.class_name).from_config(config.config)
        assert isinstance(model, nn.Module)
        self.model = model
        for module in model.modules():
            # DiT's training mode replaces labels by the null label; here the training loop decides on that.
            if type(module).__name__ == "LabelEmbedding":
                module.__dict__["dropout_prob"] = 0.0

    def forward(self, z: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, H, W), at the network's own scale.
            time: (B,), the network's own.
            cond: its conditions.

        Returns:
            (B, C, H, W); a learned variance beside the prediction is dropped.

        Raises:
            UsageError: if an entry of cond is missing.
        """
        try:
            output = _CALLS[self.config.class_name](self.model, z, time, cond or {})
        except _Missing as missing:
            raise UsageError(f"this {self.config.class_name} must be given {missing} in cond") from None
        output = output[:, : z.shape[1]] if output.shape[1] == 2 * z.shape[1] else output
        return -output if self.config.negated else output


class _Missing(Exception):
    """An entry of cond that the network cannot do without."""


def _needed(cond: Cond, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in cond]
    if missing:
        raise _Missing(" and ".join(missing))
    return [cond[name] for name in names]


def _unet(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    label = None if model.config.num_class_embeds is None else _needed(cond, "label")[0]
    return model(z, time, class_labels=label, return_dict=False)[0]


def _conditional_unet(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    (text,) = _needed(cond, "encoder_hidden_states")
    label = None if model.config.num_class_embeds is None else _needed(cond, "label")[0]
    added = None
    if model.config.addition_embed_type == "text_time":
        pooled, time_ids = _needed(cond, "text_embeds", "time_ids")
        added = {"text_embeds": pooled, "time_ids": time_ids}
    return model(
        z,
        time,
        text,
        class_labels=label,
        encoder_attention_mask=cond.get("encoder_attention_mask"),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _dit(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return model(z, time, class_labels=_needed(cond, "label")[0], return_dict=False)[0]


def _pixart(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Of the two sizes it may want to hear, either follows from z."""
    text, mask = _needed(cond, "encoder_hidden_states", "encoder_attention_mask")
    height, width = z.shape[2:]
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes["resolution"] = VAE_FACTOR * z.new_tensor([[height, width]]).expand(len(z), 2)
        sizes["aspect_ratio"] = z.new_full((len(z), 1), height / width)
    return model(z, text, time, added_cond_kwargs=sizes, encoder_attention_mask=mask, return_dict=False)[0]


def _sd3(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    text, pooled = _needed(cond, "encoder_hidden_states", "pooled_projections")
    return model(z, text, pooled, time, return_dict=False)[0]


def _flux(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """On 2×2 patches; the ids are rows and columns of the patches, and zeros for the text."""
    text, pooled = _needed(cond, "encoder_hidden_states", "pooled_projections")
    height, width = z.shape[2] // 2, z.shape[3] // 2
    rows, columns = torch.meshgrid(
        torch.arange(height, device=z.device), torch.arange(width, device=z.device), indexing="ij"
    )
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(z)
    guidance = cond.get("guidance", torch.full_like(time, FLUX_GUIDANCE))
    packed = model(
        pack(z),
        text,
        pooled,
        time,
        image_ids,
        z.new_zeros(text.shape[1], 3),
        guidance=guidance if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def pack(z: Tensor) -> Tensor:
    """(B, C, 2h, 2w) → (B, h·w, 4C): Flux's tokens, patches of 2×2."""
    return nn.functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h·w, 4C) → (B, C, 2h, 2w), the inverse of `pack`."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


_CALLS: dict[str, Callable[[Any, Tensor, Tensor, Cond], Tensor]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
FAMILIES = tuple(_CALLS)
