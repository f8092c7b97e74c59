"""Chroma: Flux.1 without pooled text, and with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import (
    MASK,
    TEXT,
    UNIT,
    Family,
    Prompted,
    device,
    image_ids,
    masked_text,
    needed,
    pack,
    unpack,
)


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """On 2×2 patches, all of which count. As ChromaPipeline's the mask is a float, a bias of 1 or 0."""
    text, mask = needed(cond, TEXT, MASK)
    height, width = z.shape[2] // 2, z.shape[3] // 2
    whole = torch.cat([mask.to(z), mask.new_ones(len(z), height * width).to(z)], dim=1)
    packed = model(
        pack(z),
        text,
        time,
        image_ids(z, height, width),
        z.new_zeros(text.shape[1], 3),
        whole,
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5."""
    found, _, mask, unasked, _, unmask = pipeline.encode_prompt(
        prompts, device=device(pipeline), do_classifier_free_guidance=null
    )
    return {TEXT: (unasked if null else found).cpu(), MASK: (unmask if null else mask).cpu()}


FAMILY = Family(
    "ChromaTransformer2DModel",
    call,
    masked_text("joint_attention_dim"),
    prompts={"ChromaPipeline": encode},
    arguments={TEXT: "prompt_embeds", MASK: "prompt_attention_mask"},
    sides=lambda config: (128, 128),  # of ChromaPipeline
    packed=4,
    patch=lambda config: (2, 2),
    time_unit=UNIT,
)
