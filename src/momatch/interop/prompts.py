"""Prompts to what a network is asked with, by a pipeline's own `encode_prompt`.

Names are those of the network's arguments in diffusers: encoder_hidden_states, encoder_attention_mask,
text_embeds, time_ids, pooled_projections. How a pipeline is asked is said by the record of its network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from momatch.interop.pipelines import quiet
from momatch.networks.families import FAMILIES
from momatch.networks.families.family import Encode, Prompted
from momatch.utils.errors import UsageError


def encode_prompts(pipeline: Any, prompts: Sequence[str], image_size: int = 0) -> Prompted:
    """What the pipeline's network is asked with for each prompt.

    Args:
        pipeline: one of diffusers' pipelines, with its text encoders; see `pipelines.load_encoders`.
        prompts: B texts.
        image_size: side of the pictures in pixels, for the networks that are told it (Stable Diffusion XL).

    Returns:
        A tensor (B, …) for each condition, on the CPU.

    Raises:
        UsageError: if this kind of pipeline is not known here.
    """
    with quiet():  # or every caption that is too long becomes a warning
        return _family(pipeline)(pipeline, list(prompts), False, image_size)


def null_condition(pipeline: Any, image_size: int = 0) -> Prompted:
    """What the network is asked with when nothing is asked for: a tensor (…) for each condition.

    It is what the pipeline itself guides away from, which is not always the empty prompt: Stable Diffusion
    XL guides away from zeros. Pipelines of guidance-distilled networks (Flux) know only the empty prompt.

    Raises:
        UsageError: if this kind of pipeline is not known here.
    """
    return {k: rows[0] for k, rows in _family(pipeline)(pipeline, [""], True, image_size).items()}


def _family(pipeline: Any) -> Encode:
    name = type(pipeline).__name__
    known = {kind: encode for family in FAMILIES.values() for kind, encode in family.prompts.items()}
    if name not in known:
        raise UsageError(
            f"prompts cannot be encoded by a {name}; the pipelines known here are {', '.join(sorted(known))}"
        )
    return torch.no_grad()(known[name])
