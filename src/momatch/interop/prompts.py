"""Prompts to what a network is asked with, by a pipeline's own `encode_prompt`.

Names are those of the network's arguments in diffusers: encoder_hidden_states, encoder_attention_mask,
text_embeds, time_ids, pooled_projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from momatch.interop.pipelines import quiet
from momatch.utils.errors import UsageError

Prompted = dict[str, Tensor]


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


def _family(pipeline: Any) -> Callable[[Any, list[str], bool, int], Prompted]:
    name = type(pipeline).__name__
    if name not in _FAMILIES:
        raise UsageError(
            f"prompts cannot be encoded by a {name}; the pipelines known here are {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[name]


@torch.no_grad()
def _stable_diffusion(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    asked, unasked = pipeline.encode_prompt(prompts, _device(pipeline), 1, null)
    return {"encoder_hidden_states": (unasked if null else asked).cpu()}


@torch.no_grad()
def _stable_diffusion_xl(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    asked, unasked, pooled, unpooled = pipeline.encode_prompt(
        prompts, device=_device(pipeline), do_classifier_free_guidance=null
    )
    # original size, top left corner of the crop, target size: what the pipeline says unless told otherwise
    ids = torch.tensor([image_size, image_size, 0, 0, image_size, image_size], dtype=torch.float32)
    return {
        "encoder_hidden_states": (unasked if null else asked).cpu(),
        "text_embeds": (unpooled if null else pooled).cpu(),
        "time_ids": ids.expand(len(prompts), 6).contiguous(),
    }


@torch.no_grad()
def _stable_diffusion_3(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    asked, unasked, pooled, unpooled = pipeline.encode_prompt(
        prompts, prompts, prompts, device=_device(pipeline), do_classifier_free_guidance=null
    )
    return {
        "encoder_hidden_states": (unasked if null else asked).cpu(),
        "pooled_projections": (unpooled if null else pooled).cpu(),
    }


@torch.no_grad()
def _pixart(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    asked, mask, unasked, unmask = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=null, device=_device(pipeline)
    )
    return {
        "encoder_hidden_states": (unasked if null else asked).cpu(),
        "encoder_attention_mask": (unmask if null else mask).cpu(),
    }


@torch.no_grad()
def _flux(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    asked, pooled, _ = pipeline.encode_prompt(prompts, None, device=_device(pipeline))
    return {"encoder_hidden_states": asked.cpu(), "pooled_projections": pooled.cpu()}


def _device(pipeline: Any) -> torch.device:
    encoder = pipeline.text_encoder or pipeline.text_encoder_2
    return next(encoder.parameters()).device


_FAMILIES: dict[str, Callable[[Any, list[str], bool, int], Prompted]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "LatentConsistencyModelPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "FluxPipeline": _flux,
}
