"""Tiny teachers as diffusers itself saves them."""

from __future__ import annotations

import json

import diffusers
import torch

BLOCKS = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
HEADS = dict(num_attention_heads=2, attention_head_dim=4, num_layers=1)
TEXT = (5, 16)


def unet(**options):
    return diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **{**BLOCKS, **options},
    )


def text_unet(**options):
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=TEXT[1],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **{**BLOCKS, **options},
    )


def sdxl():
    return text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4
    )


def pixart(**options):
    return diffusers.PixArtTransformer2DModel(
        **{
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "cross_attention_dim": 8,
            "caption_channels": TEXT[1],
            "norm_num_groups": 4,
            **options,
        }
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=TEXT[1],
        caption_projection_dim=8,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    )


def flux(guidance_embeds=True):
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT[1],
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


def text(n, generator):
    return torch.randn(n, *TEXT, generator=generator)


def awake(network):
    """The network, every weight made to matter: no output layer stays zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(generator=generator).mul_(0.1)
    return network


def save(folder, network, scheduler, pipeline=True, vae=None):
    """A pipeline's folder, or a bare model's; returns it. Every weight is made to matter."""
    awake(network)
    part = "unet" if "UNet" in type(network).__name__ else "transformer"
    network.save_pretrained(folder / part if pipeline else folder)
    scheduler.save_pretrained(folder / "scheduler")
    if pipeline:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    if vae:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder
