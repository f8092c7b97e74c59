"""Lumina-Image 2.0: its clock runs backwards, from noise at 0 to the image at 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import (
    MASK,
    TEXT,
    UNIT,
    Family,
    Prompted,
    device,
    masked_text,
    needed,
)


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call; tokens that do not count are cut out, so the mask must be whole numbers."""
    text, mask = needed(cond, TEXT, MASK)
    return model(z.contiguous(), 1 - time, text, mask.long(), return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By Gemma, after the pipeline's system prompt."""
    found, mask, unasked, unmask = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=null, device=device(pipeline)
    )
    return {TEXT: (unasked if null else found).cpu(), MASK: (unmask if null else mask).cpu()}


FAMILY = Family(
    "Lumina2Transformer2DModel",
    call,
    masked_text("cap_feat_dim"),
    prompts={"Lumina2Pipeline": encode},
    arguments={TEXT: "prompt_embeds", MASK: "prompt_attention_mask"},
    tokens=lambda config, shape: shape[0],  # Lumina2Pipeline counts channels, where others count tokens
    time_unit=UNIT,
    negated=True,
)
