"""What a model is asked for when its samples are looked at or measured: the same at every look."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from momatch.data.images import ImageSet
from momatch.data.rows import spread, take
from momatch.diffusion.interface import Cond
from momatch.models.model import Model


def fixed_cond(model: Model, data: ImageSet, num_samples: int, num_classes: int | None = None) -> Cond | None:
    """A request for `num_samples` samples; None for an unconditional model.

    Labels alone are asked for in turn. What else a model takes comes from samples of `data`, evenly spread,
    each with its own label; after the last it starts again with the first. Conditions kept in shards stay
    there: they are `Rows`, read as they are sliced.

    Args:
        model: what is asked.
        data: where conditions come from; it must fit the model.
        num_samples: how many.
        num_classes: how many labels are taken in turn; all that the model knows if None.
    """
    if not model.cond_shapes:
        if not model.num_classes:
            return None
        return {"label": torch.arange(num_samples) % max(num_classes or model.num_classes, 1)}
    index = fixed_rows(data, num_samples)
    asked = {
        name: take(data.conditions[name], index) for name in model.cond_shapes if name in data.conditions
    }
    if model.num_classes:
        asked["label"] = data.labels[index]
    return cast(Cond, asked)


def fixed_rows(data: ImageSet, num_samples: int) -> Tensor:
    """Whose conditions `fixed_cond` asks for: (num_samples,) int64."""
    return spread(len(data), num_samples).repeat(-(-num_samples // len(data)))[:num_samples]
