"""CogVideoX: latents of videos, which it takes frames first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from momatch.diffusion.interface import Cond
from momatch.networks.families.family import TEXT, Asked, Config, Family, Prompted, Sides, device, needed


def call(model: Any, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Rotary positions, where it has any, follow from z."""
    (text,) = needed(cond, TEXT)
    positions = _rotary(model, z) if model.config.use_rotary_positional_embeddings else None
    return model(z.transpose(1, 2), text, time, image_rotary_emb=positions, return_dict=False)[0].transpose(
        1, 2
    )


def _rotary(model: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """As CogVideoXPipeline makes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    config, frames = model.config, z.shape[2]
    grid = z.shape[3] // config.patch_size, z.shape[4] // config.patch_size
    base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if config.patch_size_t is None:  # 1.0
        region = get_resize_crop_region_for_grid(grid, base[1], base[0])
        options: Config = {"crops_coords": region, "temporal_size": frames}
    else:  # 1.5
        frames = -(-frames // config.patch_size_t)
        options = {"crops_coords": None, "temporal_size": frames, "grid_type": "slice", "max_size": base}
    found: Any = get_3d_rotary_pos_embed(
        config.attention_head_dim, grid_size=grid, device=z.device, **options
    )
    return found


def sides(config: Config) -> Sides:
    """Latents of the number of frames that it was made for."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    frames += -frames % (config.get("patch_size_t") or 1)
    return frames, config["sample_height"], config["sample_width"]


def encode(pipeline: Any, prompts: list[str], null: bool, image_size: int) -> Prompted:
    """By T5."""
    options = {"do_classifier_free_guidance": null, "device": device(pipeline)}
    return {TEXT: pipeline.encode_prompt(prompts, **options)[int(null)].cpu()}


FAMILY = Family(
    "CogVideoXTransformer3DModel",
    call,
    lambda config: Asked({TEXT: (config["max_text_seq_length"], config["text_embed_dim"])}),
    prompts={"CogVideoXPipeline": encode},
    sides=sides,
    dims=3,
    patch=lambda config: (config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]),
)
