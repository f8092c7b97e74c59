"""The U-Net of sequences: sound, trajectories."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import Asked, Family


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    return model(z, time, return_dict=False)[0]


FAMILY = Family(
    "UNet1DModel",
    call,
    lambda config: Asked(),
    arguments={},
    sides=lambda config: (config["sample_size"],),
    dims=1,
    patch=lambda config: (1,),
    sized=True,
)
