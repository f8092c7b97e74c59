"""The U-Net of text to video (ModelScope, Zeroscope)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, Config, Family, Sides, needed, text_of_width
from momatch.networks.families.unet_2d_condition import stable_diffusion

FRAMES = 16  # of TextToVideoSDPipeline


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    return model(z, time, needed(cond, TEXT)[0], return_dict=False)[0]


def sides(config: Config) -> Sides | None:
    """The pipeline's number of frames, and the side that the config says."""
    side = config.get("sample_size")
    return None if side is None else (FRAMES, side, side)


FAMILY = Family(
    "UNet3DConditionModel",
    call,
    text_of_width("cross_attention_dim"),
    prompts={"TextToVideoSDPipeline": stable_diffusion},
    sides=sides,
    dims=3,
    patch=lambda config: (1, 1, 1),
)
