"""Hunyuan-DiT: text of two encoders, of fixed lengths, and rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, Asked, Config, Family, Prompted, device, needed

CLIP_MASK, T5, T5_MASK = "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"
VAE_FACTOR, BASE = 8, 512  # pixels to a latent; side that positions are stretched to
ORIGINAL = (1024, 1024)  # size that HunyuanDiTPipeline tells it unless told otherwise


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Positions and sizes follow from z; the style is 0, as the pipeline's."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch, sides = model.config.patch_size, z.shape[2:]
    grid = sides[0] // patch, sides[1] // patch
    region = get_resize_crop_region_for_grid(grid, BASE // VAE_FACTOR // patch)
    width = model.inner_dim // model.num_heads
    positions = get_2d_rotary_pos_embed(width, region, grid, device=z.device, output_type="pt")
    sizes = z.new_tensor([*ORIGINAL, *(VAE_FACTOR * side for side in sides), 0, 0])
    told = {"image_meta_size": sizes.repeat(len(z), 1), "style": time.new_zeros(len(z)).long()}
    given = needed(cond, TEXT, CLIP_MASK, T5, T5_MASK)
    return model(z, time.to(z), *given, **told, image_rotary_emb=positions, return_dict=False)[0]


def asked(config: Config) -> Asked:
    """Tokens of both encoders and which of them count."""
    clip, t5 = config["text_len"], config["text_len_t5"]
    widths = config["cross_attention_dim"], config["cross_attention_dim_t5"]
    return Asked({TEXT: (clip, widths[0]), CLIP_MASK: (clip,), T5: (t5, widths[1]), T5_MASK: (t5,)})


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By CLIP and T5."""
    found: Prompted = {}
    for index, names in enumerate([(TEXT, CLIP_MASK), (T5, T5_MASK)]):
        text, untext, mask, unmask = pipeline.encode_prompt(
            prompts, device(pipeline), do_classifier_free_guidance=null, text_encoder_index=index
        )
        found |= zip(names, (untext.cpu(), unmask.cpu()) if null else (text.cpu(), mask.cpu()), strict=True)
    return found


NAMES = {TEXT: "prompt_embeds", CLIP_MASK: "prompt_attention_mask"}
NAMES |= {T5: "prompt_embeds_2", T5_MASK: "prompt_attention_mask_2"}
FAMILY = Family("HunyuanDiT2DModel", call, asked, prompts={"HunyuanDiTPipeline": encode}, arguments=NAMES)
