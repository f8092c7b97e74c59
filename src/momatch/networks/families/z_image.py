"""Z-Image: lists of samples and texts, and a clock that runs backwards, from noise at 0 to the image at 1."""

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
    masked_text,
    needed,
    padded,
)

LENGTH = 512  # tokens that ZImagePipeline reads of a prompt


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """On samples of one frame; each text is cut to the tokens that count."""
    text, mask = needed(cond, TEXT, MASK)
    frames = list(z[:, :, None].unbind())
    texts = [row[kept.bool()] for row, kept in zip(text, mask, strict=True)]
    patch = {"patch_size": model.config.all_patch_size[0], "f_patch_size": model.config.all_f_patch_size[0]}
    return torch.stack(model(frames, 1 - time, texts, **patch, return_dict=False)[0]).squeeze(2)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By Qwen3, as a user's message."""
    texts, _ = pipeline.encode_prompt(
        [""] * len(prompts) if null else list(prompts),
        device=device(pipeline),
        do_classifier_free_guidance=False,
    )
    return padded(texts, LENGTH)


FAMILY = Family(
    "ZImageTransformer2DModel",
    call,
    masked_text("cap_feat_dim"),
    prompts={"ZImagePipeline": encode},
    sides=lambda config: (128, 128),  # 1024 pixels, of ZImagePipeline
    patch=lambda config: (config["all_patch_size"][0],) * 2,
    time_unit=UNIT,
    negated=True,
)
