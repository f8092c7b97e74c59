"""Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import MASK, TEXT, Asked, Config, Family, Prompted, device, needed
from momatch.utils.errors import UsageError


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    (text,) = needed(cond, TEXT)
    label = None if model.config.num_class_embeds is None else needed(cond, "label")[0]
    added = None
    if model.config.addition_embed_type == "text_time":
        pooled, time_ids = needed(cond, "text_embeds", "time_ids")
        added = {"text_embeds": pooled, "time_ids": time_ids}
    options = {"class_labels": label, "encoder_attention_mask": cond.get(MASK), "added_cond_kwargs": added}
    return model(z, time, text, **options, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Text; of XL its pooled embedding and the sizes too."""
    known = {"addition_embed_type": "text_time", "class_embed_type": None, "encoder_hid_dim": None}
    for key, value in known.items():
        if config.get(key) not in (None, value):
            raise UsageError(
                f"this UNet2DConditionModel has {key} {config[key]!r}, which momatch does not know"
            )
    width = config["cross_attention_dim"]
    shapes: dict[str, tuple[int, ...]] = {TEXT: (-1, width if isinstance(width, int) else width[0])}
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes = {**shapes, "text_embeds": (pooled,), "time_ids": (6,)}
    return Asked(shapes, num_classes=config.get("num_class_embeds") or 0)


def stable_diffusion(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """CLIP's tokens."""
    found, unasked = pipeline.encode_prompt(prompts, device(pipeline), 1, null)[:2]
    return {TEXT: (unasked if null else found).cpu()}


def stable_diffusion_xl(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """Both CLIPs' tokens, the pooled embedding, and the sizes that the pipeline says by itself."""
    found, unasked, pooled, unpooled = pipeline.encode_prompt(
        prompts, device=device(pipeline), do_classifier_free_guidance=null
    )
    # original size, top left corner of the crop, target size
    ids = torch.tensor([image_size, image_size, 0, 0, image_size, image_size], dtype=torch.float32)
    return {
        TEXT: (unasked if null else found).cpu(),
        "text_embeds": (unpooled if null else pooled).cpu(),
        "time_ids": ids.expand(len(prompts), 6).contiguous(),
    }


FAMILY = Family(
    "UNet2DConditionModel",
    call,
    asked,
    prompts={
        "StableDiffusionPipeline": stable_diffusion,
        "LatentConsistencyModelPipeline": stable_diffusion,
        "StableDiffusionXLPipeline": stable_diffusion_xl,
    },
    arguments={TEXT: "prompt_embeds", "text_embeds": "pooled_prompt_embeds"},
    sized=True,
)
