"""PixArt-α and PixArt-Σ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import MASK, TEXT, Asked, Config, Family, Prompted, device, needed

VAE_FACTOR = 8  # pixels of a picture to one of its latents


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Of the two sizes that it may want to hear, either follows from z."""
    text, mask = needed(cond, TEXT, MASK)
    height, width = z.shape[2:]
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes["resolution"] = VAE_FACTOR * z.new_tensor([[height, width]]).expand(len(z), 2)
        sizes["aspect_ratio"] = z.new_full((len(z), 1), height / width)
    return model(z, text, time, added_cond_kwargs=sizes, encoder_attention_mask=mask, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """T5's tokens and which of them count."""
    width = config.get("caption_channels") or config["cross_attention_dim"]
    return Asked({TEXT: (-1, width), MASK: (-1,)})


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5."""
    found, mask, unasked, unmask = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=null, device=device(pipeline)
    )
    return {TEXT: (unasked if null else found).cpu(), MASK: (unmask if null else mask).cpu()}


FAMILY = Family(
    "PixArtTransformer2DModel",
    call,
    asked,
    prompts={"PixArtAlphaPipeline": encode, "PixArtSigmaPipeline": encode},
    arguments={TEXT: "prompt_embeds", MASK: "prompt_attention_mask"},
)
