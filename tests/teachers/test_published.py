"""The configs of published models, read as their pipelines' folders are, with the weights on no device.

What their config.json and scheduler_config.json say is written down here as far as it differs from the
defaults of diffusers' classes. Parameters, shapes and shifts are compared with what is known of the models.
MOMATCH_WRITE=1 writes the table of docs/teachers.md.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import momatch
from momatch.interop import diffusers_model

sys.path.insert(0, str(Path(__file__).parent))
from test_family_stages import table  # noqa: E402

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}
SD_BLOCKS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD3 = {
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
}


@dataclass(frozen=True)
class Published:
    """A model, and what is known of it.

    Attributes:
        network, config, scheduler, noise, pipeline: what its folder says.
        billions: of numbers in its weights, as its card says.
        shape: of a sample.
        shift: of its flow; with a dynamic one e^μ.
        prediction: of its network.
        size: that has to be told.
        conditions: some of those it takes; −1 is a length that may vary.
        parameters: their number, where it is known from elsewhere.
    """

    network: str
    config: dict[str, Any]
    scheduler: str
    noise: dict[str, Any]
    pipeline: str
    billions: float
    shape: tuple[int, ...]
    conditions: dict[str, tuple[int, ...]]
    shift: float | None = None
    prediction: str = "flow"
    size: Any = None
    parameters: int | None = None


MODELS = {
    "Stable Diffusion 1.5": Published(
        "UNet2DConditionModel",
        {**SD_BLOCKS, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        "PNDMScheduler",
        {**SCALED, "skip_prk_steps": True, "steps_offset": 1},
        "StableDiffusionPipeline",
        0.86,
        (4, 64, 64),
        {"encoder_hidden_states": (-1, 768)},
        prediction="eps",
        parameters=859_520_964,
    ),
    "Stable Diffusion 2.1": Published(
        "UNet2DConditionModel",
        {
            **SD_BLOCKS,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "use_linear_projection": True,
        },
        "DDIMScheduler",
        {**SCALED, "prediction_type": "v_prediction", "steps_offset": 1},
        "StableDiffusionPipeline",
        0.87,
        (4, 96, 96),
        {"encoder_hidden_states": (-1, 1024)},
        prediction="v",
        parameters=865_910_724,
    ),
    "Stable Diffusion XL": Published(
        "UNet2DConditionModel",
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
            "sample_size": 128,
        },
        "EulerDiscreteScheduler",
        {**SCALED, "steps_offset": 1, "timestep_spacing": "leading"},
        "StableDiffusionXLPipeline",
        2.6,
        (4, 128, 128),
        {"encoder_hidden_states": (-1, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        prediction="eps",
        parameters=2_567_463_684,
    ),
    "Stable Diffusion 3.5 medium": Published(
        "SD3Transformer2DModel",
        {
            **SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
        },
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
        "StableDiffusion3Pipeline",
        2.5,
        (16, 128, 128),
        {"encoder_hidden_states": (-1, 4096), "pooled_projections": (2048,)},
        3.0,
    ),
    "Stable Diffusion 3.5 large": Published(
        "SD3Transformer2DModel",
        {
            **SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
        "StableDiffusion3Pipeline",
        8.1,
        (16, 128, 128),
        {"encoder_hidden_states": (-1, 4096), "pooled_projections": (2048,)},
        3.0,
        parameters=8_056_627_520,
    ),
    "Flux.1 [dev]": Published(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        "FlowMatchEulerDiscreteScheduler",
        {**DYNAMIC, "max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0},
        "FluxPipeline",
        12,
        (16, 128, 128),
        {"encoder_hidden_states": (-1, 4096), "pooled_projections": (768,), "guidance": ()},
        math.exp(1.15),
        size=128,
        parameters=11_901_408_320,
    ),
    "Flux.2 [dev]": Published(
        "Flux2Transformer2DModel",
        {},
        "FlowMatchEulerDiscreteScheduler",
        {**DYNAMIC, "max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0},
        "Flux2Pipeline",
        32,
        (128, 64, 64),
        {"encoder_hidden_states": (-1, 15360), "guidance": ()},
        size=64,
    ),
    "PixArt-Σ": Published(
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
        "DPMSolverMultistepScheduler",
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        "PixArtSigmaPipeline",
        0.6,
        (4, 128, 128),
        {"encoder_hidden_states": (-1, 4096), "encoder_attention_mask": (-1,)},
        prediction="eps",
        parameters=610_856_096,
    ),
    "Qwen-Image": Published(
        "QwenImageTransformer2DModel",
        {},
        "FlowMatchEulerDiscreteScheduler",
        {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        "QwenImagePipeline",
        20,
        (16, 128, 128),
        {"encoder_hidden_states": (-1, 3584), "encoder_attention_mask": (-1,)},
        math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)),
        size=128,
        parameters=20_430_401_088,
    ),
    "Sana 1.6B": Published(
        "SanaTransformer2DModel",
        {},
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "SanaPipeline",
        1.6,
        (32, 32, 32),
        {"encoder_hidden_states": (-1, 2304), "encoder_attention_mask": (-1,)},
        3.0,
        parameters=1_604_462_752,
    ),
    "Wan 2.1 1.3B": Published(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "WanPipeline",
        1.4,
        (16, 21, 60, 104),
        {"encoder_hidden_states": (-1, 4096)},
        3.0,
        size=(21, 60, 104),
        parameters=1_418_996_800,
    ),
    "Z-Image": Published(
        "ZImageTransformer2DModel",
        {},
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 6.0},
        "ZImagePipeline",
        6,
        (16, 128, 128),
        {"encoder_hidden_states": (-1, 2560), "encoder_attention_mask": (-1,)},
        6.0,
        size=128,
        parameters=6_154_908_736,
    ),
}


def written(known: Published, folder: Path) -> Path:
    """The configs of a pipeline's folder, without a weight."""
    part = "unet" if known.network.startswith("UNet") else "transformer"
    contents = {
        "model_index.json": {"_class_name": known.pipeline},
        f"{part}/config.json": {"_class_name": known.network, **known.config},
        "scheduler/scheduler_config.json": {"_class_name": known.scheduler, **known.noise},
        "vae/config.json": {"_class_name": "AutoencoderKL"},
    }
    for name, entries in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(entries))
    return folder


def on_no_device(part: Path, class_name: str) -> Any:
    """The network of a config, its weights on torch's meta device."""
    kind = getattr(diffusers, class_name)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(part)).eval()


def schedule_of(known: Published, model: momatch.Model) -> str:
    """Compared with what is known, in words."""
    schedule, t = model.schedule, torch.tensor([0.1, 0.5, 0.9])
    if schedule.name == "tabulated":  # λ at a timestep is log(ᾱ / (1 − ᾱ)) of diffusers' own table
        betas = {key: value for key, value in known.noise.items() if key.startswith("beta")}
        alphas = torch.cumprod(1 - diffusers.DDPMScheduler(**betas).betas.double(), 0)
        for timestep in (100, 500, 1000):
            expected = alphas[timestep - 1].logit().item()
            assert schedule(torch.tensor([timestep / 1000])).item() == pytest.approx(expected, abs=1e-3)
        return f"{len(alphas):,} betas"
    shift = schedule.options["shift"]
    sigma = shift * t / (1 + (shift - 1) * t)  # of the flow x + (1 − σ) …: λ = 2 log((1 − σ) / σ)
    # Up to 0.02, as t runs between the ends of λ, not to the infinities of the flow.
    assert torch.allclose(schedule(t), 2 * ((1 - sigma) / sigma).log(), atol=0.02)
    assert known.shift is None or shift == pytest.approx(known.shift, rel=1e-6)
    return f"flow, shift {shift:.3g}"


def test_the_configs_of_published_models_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_model, "_network", on_no_device)
    monkeypatch.setattr("momatch.interop.load._finite", lambda model, source: model)
    rows = []
    for name, known in MODELS.items():
        model = momatch.load_teacher(written(known, tmp_path / name), size=known.size)
        network = model.denoiser.network
        parameters = sum(p.numel() for p in network.parameters())
        numbers = sum(tensor.numel() for tensor in network.state_dict().values())
        assert parameters == (known.parameters or parameters), name
        assert numbers == pytest.approx(known.billions * 1e9, rel=0.03), name
        assert model.sample_shape == known.shape and model.cond_shapes == known.conditions, name
        assert model.denoiser.prediction == known.prediction and model.provenance.latent, name
        said = {"eps": "ε", "v": "v", "flow": "velocity"}[known.prediction]
        rows.append(
            [
                name,
                f"`{known.network}`",
                f"{numbers / 1e9:.2f} B",
                f"({', '.join(map(str, model.sample_shape))})",
                f"{schedule_of(known, model)}, predicts {said}",
                f"{2 * numbers / 2**30:.1f} GiB",
                f"{28 * parameters / 2**30:,.0f} GiB",
            ]
        )
    header = ["model", "class", "numbers", "a sample", "noise", "weights, bfloat16", "all weights trained"]
    table("published", header, rows)
