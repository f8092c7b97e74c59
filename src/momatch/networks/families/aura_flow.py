"""AuraFlow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, UNIT, Family, Prompted, device, needed, text_of_width


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """One call."""
    (text,) = needed(cond, TEXT)
    return model(z, encoder_hidden_states=text, timestep=time, return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5; padding is zero, and the network looks at it."""
    found, _, unasked, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=null, device=device(pipeline)
    )
    return {TEXT: (unasked if null else found).cpu()}


FAMILY = Family(
    "AuraFlowTransformer2DModel",
    call,
    text_of_width("joint_attention_dim"),
    prompts={"AuraFlowPipeline": encode},
    time_unit=UNIT,
)
