"""Qwen-Image."""

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
    pack,
    padded,
    unpack,
)
from momatch.utils.errors import UsageError

LENGTH = 512  # tokens that QwenImagePipeline reads of a prompt; it pads to the longest of a batch
EMPTY = " "  # what its users guide away from


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """On 2×2 patches of one frame."""
    text, mask = needed(cond, TEXT, MASK)
    if model.config.use_additional_t_cond or model.config.guidance_embeds:
        raise UsageError(
            "this QwenImageTransformer2DModel takes layers or a guidance, which momatch does not know"
        )
    height, width = z.shape[2] // 2, z.shape[3] // 2
    packed = model(
        pack(z),
        text,
        mask,
        time,
        img_shapes=[[(1, height, width)]] * len(z),
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By Qwen2.5-VL, inside the pipeline's template."""
    asked = [EMPTY] * len(prompts) if null else prompts
    text, mask = pipeline.encode_prompt(asked, device=device(pipeline), max_sequence_length=LENGTH)
    rows = list(text) if mask is None else [row[kept.bool()] for row, kept in zip(text, mask, strict=True)]
    return padded(rows, LENGTH)


FAMILY = Family(
    "QwenImageTransformer2DModel",
    call,
    masked_text("joint_attention_dim"),
    prompts={"QwenImagePipeline": encode},
    arguments={TEXT: "prompt_embeds", MASK: "prompt_embeds_mask"},
    sides=lambda config: (128, 128),  # of QwenImagePipeline
    channels=lambda config: (config["in_channels"], 4 * (config.get("out_channels") or 16)),
    packed=4,
    patch=lambda config: (2, 2),
    time_unit=UNIT,
)
