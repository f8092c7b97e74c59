"""Wan 2.1: latents of videos, (C, T, H, W)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, Family, Prompted, default, device, needed, text_of_width


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    (text,) = needed(cond, TEXT)
    return model(z, time, text, return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5."""
    found, unasked = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=null,
        max_sequence_length=default(pipeline, "max_sequence_length"),
        device=device(pipeline),
    )
    return {TEXT: (unasked if null else found).cpu()}


FAMILY = Family(
    "WanTransformer3DModel",
    call,
    text_of_width("text_dim"),
    prompts={"WanPipeline": encode},
    sides=lambda config: (21, 60, 104),  # 81 frames of 480×832 pixels, of WanPipeline
    dims=3,
    patch=lambda config: config["patch_size"],
)
