"""Flux.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import (
    POOLED,
    TEXT,
    UNIT,
    Asked,
    Config,
    Family,
    Prompted,
    device,
    image_ids,
    needed,
    pack,
    unpack,
)

GUIDANCE = 3.5  # what FluxPipeline asks for unless told otherwise


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """On 2×2 patches; the ids are rows and columns of the patches, and zeros for the text."""
    text, pooled = needed(cond, TEXT, POOLED)
    height, width = z.shape[2] // 2, z.shape[3] // 2
    ids = image_ids(z, height, width), z.new_zeros(text.shape[1], 3)
    guidance = cond.get("guidance", torch.full_like(time, GUIDANCE)) if model.config.guidance_embeds else None
    return unpack(
        model(pack(z), text, pooled, time, *ids, guidance=guidance, return_dict=False)[0], height, width
    )


def asked(config: Config) -> Asked:
    """T5's tokens, CLIP's pooled embedding; a guidance with a default, if it embeds one."""
    text = {TEXT: (-1, config["joint_attention_dim"]), POOLED: (config["pooled_projection_dim"],)}
    if config.get("guidance_embeds"):
        return Asked({**text, "guidance": ()}, {"guidance": GUIDANCE})
    return Asked(text)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5 and CLIP; it knows no other null condition than the empty prompt."""
    found, pooled, _ = pipeline.encode_prompt(prompts, None, device=device(pipeline))
    return {TEXT: found.cpu(), POOLED: pooled.cpu()}


FAMILY = Family(
    "FluxTransformer2DModel",
    call,
    asked,
    prompts={"FluxPipeline": encode},
    arguments={TEXT: "prompt_embeds", POOLED: "pooled_prompt_embeds", "guidance": "guidance_scale"},
    sides=lambda config: (128, 128),  # of FluxPipeline
    packed=4,
    patch=lambda config: (2, 2),
    time_unit=UNIT,
)
