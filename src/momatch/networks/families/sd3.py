"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import POOLED, TEXT, Asked, Config, Family, Prompted, device, needed


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    text, pooled = needed(cond, TEXT, POOLED)
    return model(z, text, pooled, time, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Tokens of both CLIPs and T5, and the pooled embedding."""
    return Asked({TEXT: (-1, config["joint_attention_dim"]), POOLED: (config["pooled_projection_dim"],)})


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By both CLIPs and T5, if it is there."""
    found, unasked, pooled, unpooled = pipeline.encode_prompt(
        prompts, prompts, prompts, device=device(pipeline), do_classifier_free_guidance=null
    )
    return {TEXT: (unasked if null else found).cpu(), POOLED: (unpooled if null else pooled).cpu()}


FAMILY = Family(
    "SD3Transformer2DModel",
    call,
    asked,
    prompts={"StableDiffusion3Pipeline": encode},
    arguments={TEXT: "prompt_embeds", POOLED: "pooled_prompt_embeds"},
)
