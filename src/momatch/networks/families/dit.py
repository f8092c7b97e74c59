"""DiT (Peebles and Xie 2023), conditioned on a class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import Asked, Config, Family, needed


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    return model(z, time, class_labels=needed(cond, "label")[0], return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Labels; the one behind the last means nothing."""
    classes = config["num_embeds_ada_norm"]
    return Asked(nulls={"label": classes}, num_classes=classes)


FAMILY = Family("DiTTransformer2DModel", call, asked, arguments={"label": "class_labels"})
