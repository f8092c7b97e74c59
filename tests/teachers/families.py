"""A tiny network of every family, and diffusers' own pipeline around it as the oracle."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import folders
import torch

from momatch.networks.families import FAMILIES
from momatch.networks.families.family import pack, unpack

N, TOKENS, WIDTH = 2, 5, 16
LEVELS = 8  # calls of a pipeline; σ = 1, 7/8, …, which float32 holds, and timesteps 125 apart
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
Z_HEADS = dict(n_heads=2, n_kv_heads=2, axes_dims=[4, 2, 2], axes_lens=[64, 16, 16])
BLOCKS_3D = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
ROPE = (4, 2, 2)


class Stopped(Exception):
    """A pipeline has made as many steps as were wanted."""


def same(z: torch.Tensor) -> torch.Tensor:
    return z


def flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def ddim(**options):
    return diffusers.DDIMScheduler(clip_sample=False, **options)


@dataclass(frozen=True)
class Case:
    """A family at a size that takes milliseconds.

    Attributes:
        make: the network.
        scheduler: that it is said to be trained with.
        pipeline: of diffusers, by the name of its class; "" where it has none that takes a condition.
        size: sides of a sample.
        layout, back: z to what the pipeline's scheduler sees, and back.
        pixels: to a latent, along height and width.
        call: what the pipeline is called with besides.
        parts: what the pipeline is made of besides.
        reasons: stages that this family cannot pass, and why.
    """

    make: Callable[[], Any]
    scheduler: Callable[..., Any] = flow
    pipeline: str = ""
    size: tuple[int, ...] = (8, 8)
    layout: Callable[[torch.Tensor], torch.Tensor] = same
    back: Callable[[torch.Tensor], torch.Tensor] = same
    pixels: int = 8
    call: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def sana(**options):
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, **HEADS, num_layers=1, num_cross_attention_heads=2, sample_size=8,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, **options,
    )  # fmt: skip


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, multiple_of=8,
        num_attention_heads=2, num_kv_heads=1, axes_dim_rope=ROPE, axes_lens=(32, 16, 16), cap_feat_dim=WIDTH,
    )  # fmt: skip


def aura_flow():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, **HEADS,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip


def qwen_image():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, **HEADS, joint_attention_dim=WIDTH, axes_dims_rope=ROPE
    )


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, cap_feat_dim=WIDTH, **Z_HEADS
    )


def flux2():
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
        timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def chroma():
    return diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE, approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1,
    )  # fmt: skip


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2, mlp_ratio=2.0,
        cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, text_len=TOKENS,
        text_len_t5=TOKENS,
    )  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def cog_video_x(**options):
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=1, sample_width=4, sample_height=4, sample_frames=9,
        max_text_seq_length=TOKENS, **options,
    )  # fmt: skip


def unet_3d():
    return diffusers.UNet3DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), cross_attention_dim=WIDTH,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), **BLOCKS_3D,
    )  # fmt: skip


def unet_1d():
    return diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, time_embedding_type="positional", act_fn="silu",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"), up_block_types=("UpResnetBlock1D",),
        block_out_channels=(8, 16), mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock",
        use_timestep_embedding=True, norm_num_groups=4, downsample_each_block=False,
    )  # fmt: skip


def packed(height: int = 8, width: int = 8) -> dict[str, Any]:
    return {"layout": pack, "back": lambda tokens: unpack(tokens, height // 2, width // 2)}


def frames_first(z):
    return z.transpose(1, 2)


NO_GUIDANCE = {"guidance_scale": 1.0}
ENCODERS = {"text_encoder": None, "tokenizer": None, "vae": None}
FLUX_PARTS = {**ENCODERS, "text_encoder_2": None, "tokenizer_2": None}
SD3_PARTS = {**FLUX_PARTS, "text_encoder_3": None, "tokenizer_3": None}
CHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
UNET_3D = {
    "layout": lambda z: z.transpose(1, 2).flatten(0, 1),
    "back": lambda frames: frames.unflatten(0, (N, -1)).transpose(1, 2),
}
CASES: dict[str, Case] = {
    "UNet2DModel": Case(folders.unet, ddim),
    "UNet2DConditionModel": Case(
        folders.text_unet, ddim, "StableDiffusionPipeline", parts={**ENCODERS, **CHECKED}, call=NO_GUIDANCE
    ),
    "DiTTransformer2DModel": Case(
        folders.dit,
        ddim,
        "DiTPipeline",
        call=NO_GUIDANCE,
        parts={"vae": None},
        reasons={"opened without momatch": "as in the column before; the rest is its autoencoder's"},
    ),
    "PixArtTransformer2DModel": Case(
        folders.pixart,
        ddim,
        "PixArtSigmaPipeline",
        parts=ENCODERS,
        call={**NO_GUIDANCE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "SD3Transformer2DModel": Case(
        folders.sd3, flow, "StableDiffusion3Pipeline", parts=SD3_PARTS, call=NO_GUIDANCE
    ),
    "FluxTransformer2DModel": Case(
        folders.flux, flow, "FluxPipeline", (8, 4), parts=FLUX_PARTS, **packed(8, 4)
    ),
    "SanaTransformer2DModel": Case(
        sana,
        flow,
        "SanaPipeline",
        pixels=32,
        parts=ENCODERS,
        call={**NO_GUIDANCE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "Lumina2Transformer2DModel": Case(
        lumina2, flow, "Lumina2Pipeline", (8, 4), parts=ENCODERS, call=NO_GUIDANCE
    ),
    "AuraFlowTransformer2DModel": Case(aura_flow, flow, "AuraFlowPipeline", parts=ENCODERS, call=NO_GUIDANCE),
    "QwenImageTransformer2DModel": Case(
        qwen_image, flow, "QwenImagePipeline", (8, 4), parts=ENCODERS, **packed(8, 4)
    ),
    "ZImageTransformer2DModel": Case(
        z_image, flow, "ZImagePipeline", (8, 4), parts=ENCODERS, call={"guidance_scale": 0.0}
    ),
    "Flux2Transformer2DModel": Case(
        flux2,
        flow,
        "Flux2Pipeline",
        size=(4, 2),
        pixels=16,
        parts=ENCODERS,
        layout=lambda z: z.flatten(2).transpose(1, 2),
        back=lambda tokens: tokens.transpose(1, 2).unflatten(2, (4, 2)),
    ),
    "ChromaTransformer2DModel": Case(
        chroma, flow, "ChromaPipeline", (8, 4), parts=ENCODERS, call=NO_GUIDANCE, **packed(8, 4)
    ),
    "HunyuanDiT2DModel": Case(
        hunyuan_dit,
        ddim,
        "HunyuanDiTPipeline",
        (8, 4),
        parts={**ENCODERS, "text_encoder_2": None, "tokenizer_2": None, **CHECKED},
        call={**NO_GUIDANCE, "use_resolution_binning": False},
    ),
    "WanTransformer3DModel": Case(wan, flow, "WanPipeline", size=(3, 4, 6), parts=ENCODERS, call=NO_GUIDANCE),
    "CogVideoXTransformer3DModel": Case(
        cog_video_x,
        lambda: diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),  # fmt: skip
        "CogVideoXPipeline",
        size=(3, 4, 4),
        layout=frames_first,
        back=frames_first,
        parts=ENCODERS,
        call=NO_GUIDANCE,
    ),
    "UNet3DConditionModel": Case(
        unet_3d, ddim, "TextToVideoSDPipeline", size=(2, 8, 8), parts=ENCODERS, call=NO_GUIDANCE, **UNET_3D
    ),
    "UNet1DModel": Case(unet_1d, ddim, size=(16,)),
}


def condition(model, seed: int = 1) -> dict[str, torch.Tensor] | None:
    """Something for each entry of cond, float64: masks cut the second text short."""
    generator = torch.Generator().manual_seed(seed)
    cond: dict[str, torch.Tensor] = {}
    for name, shape in model.cond_shapes.items():
        sides = [TOKENS if side == -1 else side for side in shape]
        cond[name] = torch.randn(N, *sides, generator=generator, dtype=torch.float64)
        if "mask" in name:
            cond[name] = torch.ones(N, *sides, dtype=torch.int64)
            cond[name][1, 3:] = 0
        if name == "guidance":
            cond[name] = torch.full((N,), 3.0, dtype=torch.float64)
    if model.num_classes:
        cond["label"] = torch.arange(N) + 1
    return cond or None


def asked(case: Case, class_name: str, cond, shape, dtype) -> dict[str, Any]:
    """What the pipeline is called with: conditions by its own names, sizes in pixels."""
    found = dict(case.call)
    for name, argument in FAMILIES[class_name].arguments.items():
        value = cond.get(name) if cond else None
        if value is None:
            continue
        if name == "guidance":
            found[argument] = float(value[0])
        elif name == "label":
            found[argument] = value.tolist()
        else:
            found[argument] = value.to(dtype) if value.is_floating_point() else value
    if class_name == "ZImageTransformer2DModel":
        mask = cond["encoder_attention_mask"].bool()
        found["prompt_embeds"] = [row[kept] for row, kept in zip(found["prompt_embeds"], mask, strict=True)]
    if class_name == "AuraFlowTransformer2DModel":  # its pipeline asks for a mask and leaves it alone
        found["prompt_attention_mask"] = torch.ones(N, TOKENS)
    if class_name == "ChromaTransformer2DModel":
        found["prompt_attention_mask"] = found["prompt_attention_mask"].to(dtype)
    if class_name != "DiTTransformer2DModel":
        found |= {"height": case.pixels * shape[-2], "width": case.pixels * shape[-1]}
        found["output_type"] = "latent"
    if len(shape) == 4:
        found["num_frames"] = shape[1] if class_name == "UNet3DConditionModel" else 4 * (shape[1] - 1) + 1
    return found


def around(case: Case, network, scheduler):
    """The pipeline of diffusers with that network in it."""
    part = "unet" if "UNet" in type(network).__name__ else "transformer"
    kind = getattr(diffusers, case.pipeline)
    return kind(**{part: network}, scheduler=scheduler, **case.parts)


def save(case: Case, folder):
    """The folder that its pipeline saves; of a network that has none, that of a network and its noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = case.make()
    if not case.pipeline:
        return folders.save(folder, network, case.scheduler(), pipeline=False)
    around(case, folders.awake(network), case.scheduler()).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Step:
    """What a pipeline gave its scheduler, and what it got."""

    output: torch.Tensor
    time: float
    sample: torch.Tensor
    after: torch.Tensor


def steps_of(pipe, case: Case, options: dict[str, Any], count: int, noises: list[torch.Tensor]) -> list[Step]:
    """Run a pipeline for `count` steps, drawing these noises (B, …), each in z's layout, in turn."""
    left, found = iter(noises), []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    def first(shape, *args, dtype=None, **kwargs):
        z = next(left).to(dtype or torch.float32)
        return (frames_first(z) if case.pipeline == "CogVideoXPipeline" else z).reshape(shape)

    def later(shape, *args, dtype=None, **kwargs):
        if (z := next(left, None)) is None:  # DDPMScheduler draws once more, and multiplies by 0
            return torch.zeros(shape)
        return case.layout(z).to(dtype or torch.float32).reshape(shape)

    def recorded(output, t, sample, *args, **kwargs):
        after = step(output, t, sample, *args, **kwargs)
        given = after[0] if isinstance(after, tuple) else after.prev_sample
        found.append(Step(output.detach(), float(t), sample.detach(), given.detach()))
        if len(found) == count:
            raise Stopped
        return after

    recorded.__signature__ = inspect.signature(step)  # pipelines look at it
    modules = [
        (importlib.import_module(type(pipe).__module__), first),
        (importlib.import_module(type(scheduler).__module__), later),
    ]
    before = [(module, module.randn_tensor) for module, _ in modules if hasattr(module, "randn_tensor")]
    scheduler.step = recorded
    try:
        for module, draw in modules:
            if hasattr(module, "randn_tensor"):
                module.randn_tensor = draw
        pipe.set_progress_bar_config(disable=True)
        pipe(**options, num_inference_steps=count)
    except Stopped:
        pass
    finally:
        del scheduler.step
        for module, draw in before:
            module.randn_tensor = draw
    assert len(found) == count
    return found
