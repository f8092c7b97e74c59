"""Flux.2: its latents are 2×2 patches of the autoencoder's, normalised, one token each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, UNIT, Asked, Config, Family, Prompted, device, needed

GUIDANCE = 4.0  # what Flux2Pipeline asks for unless told otherwise


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Ids are (frame, row, column, place in the text)."""
    (text,) = needed(cond, TEXT)
    one = torch.arange(1, device=z.device)
    rows, columns, places = (torch.arange(n, device=z.device) for n in (*z.shape[2:], text.shape[1]))
    packed = model(
        z.flatten(2).transpose(1, 2),
        text,
        time,
        torch.cartesian_prod(one, rows, columns, one),
        torch.cartesian_prod(one, one, one, places),
        cond.get("guidance", torch.full_like(time, GUIDANCE)) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return packed.transpose(1, 2).unflatten(2, z.shape[2:])


def asked(config: Config) -> Asked:
    """Tokens of three layers of its language model; a guidance with a default, if it embeds one."""
    text = {TEXT: (-1, config["joint_attention_dim"])}
    if config.get("guidance_embeds"):
        return Asked({**text, "guidance": ()}, {"guidance": GUIDANCE})
    return Asked(text)


def mu(tokens: int, steps: int) -> float:
    """compute_empirical_mu of Flux2Pipeline: linear in the steps between its lines for 10 and for 200."""
    at_200 = 0.00016927 * tokens + 0.45666666
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By the pipeline's language model; it knows no other null condition than the empty prompt."""
    return {TEXT: pipeline.encode_prompt(prompts, device=device(pipeline))[0].cpu()}


FAMILY = Family(
    "Flux2Transformer2DModel",
    call,
    asked,
    prompts={"Flux2Pipeline": encode, "Flux2KleinPipeline": encode},
    arguments={TEXT: "prompt_embeds", "guidance": "guidance_scale"},
    sides=lambda config: (64, 64),  # 1024 pixels, of Flux2Pipeline
    patch=lambda config: (1, 1),
    mu=mu,
    time_unit=UNIT,
)
