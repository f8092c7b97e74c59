"""DDPM's U-Net, with labels or without."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import Asked, Config, Family, needed
from momatch.utils.errors import UsageError


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    label = None if model.config.num_class_embeds is None else needed(cond, "label")[0]
    return model(z, time, class_labels=label, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Labels, the last of which, or another, may mean nothing."""
    if config.get("time_embedding_type") == "learned":
        raise UsageError(
            "this UNet2DModel has time_embedding_type = learned: it knows whole timesteps alone, and "
            "momatch asks between them"
        )
    rows, null = config.get("num_class_embeds"), config.get("null_label")
    if config.get("class_embed_type") is not None:
        raise UsageError(f"class_embed_type {config['class_embed_type']!r} is unknown; momatch knows labels")
    if null is None:
        return Asked(num_classes=rows or 0)
    if not rows or not 0 <= null < rows:
        raise UsageError(f"null_label is {null}, but this network has {rows or 0} labels, from 0")
    return Asked(nulls={"label": null}, num_classes=rows - 1 if null == rows - 1 else rows)


FAMILY = Family("UNet2DModel", call, asked, arguments={}, sized=True, null_label=True)
