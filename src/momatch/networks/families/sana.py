"""Sana: linear attention on latents of a deep autoencoder (32×32 pixels each)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import (
    MASK,
    TEXT,
    Asked,
    Config,
    Family,
    Prompted,
    default,
    device,
    needed,
)

GUIDANCE = 4.5  # what SanaSprintPipeline asks for unless told otherwise


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call; guidance is multiplied by what the config says."""
    text, mask = needed(cond, TEXT, MASK)
    config, guidance = model.config, None
    if config.guidance_embeds:
        guidance = cond.get("guidance", torch.full_like(time, GUIDANCE)) * config.guidance_embeds_scale
    time = time * config.timestep_scale
    options = {"encoder_attention_mask": mask, "guidance": guidance}
    return model(z, encoder_hidden_states=text, timestep=time, **options, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Gemma's tokens and which of them count; a guidance with a default, if it embeds one."""
    text = {TEXT: (-1, config["caption_channels"]), MASK: (-1,)}
    if config.get("guidance_embeds"):
        return Asked({**text, "guidance": ()}, {"guidance": GUIDANCE})
    return Asked(text)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By Gemma, after the instruction that the pipeline gives it unless told otherwise."""
    found, mask, unasked, unmask = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=null,
        device=device(pipeline),
        complex_human_instruction=default(pipeline, "complex_human_instruction"),
    )
    return {TEXT: (unasked if null else found).cpu(), MASK: (unmask if null else mask).cpu()}


FAMILY = Family(
    "SanaTransformer2DModel",
    call,
    asked,
    prompts={"SanaPipeline": encode},
    arguments={TEXT: "prompt_embeds", MASK: "prompt_attention_mask"},
)
