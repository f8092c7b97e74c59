"""A student's LoRA adapter as files that diffusers and peft load on top of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from momatch.diffusion.denoiser import Denoiser
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig
from momatch.networks.lora import AdaptedNetwork
from momatch.utils.files import write_atomically

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PIPELINE_FAMILIES = ("UNet2DConditionModel",)


def merged(model: Model) -> Model:
    """The same model with its adapter merged into plain weights of its own; itself if it has none."""
    network = model.denoiser.network
    if not isinstance(network, AdaptedNetwork):
        return model
    old = model.denoiser
    denoiser = Denoiser(network.merged(), old.prediction, old.null_values, old.time, old.sigma_data, old.clip)
    return replace(model, denoiser=denoiser.train(old.training))


def save_adapter(model: Model, directory: str | Path) -> None:
    """Write a student's adapter, in the layout that belongs to its network; nothing if it has none.

    Networks of diffusers' text-to-image pipelines: pytorch_lora_weights.safetensors, for
    `pipeline.load_lora_weights(directory)`. Others: adapter_config.json and adapter_model.safetensors, for
    `peft.PeftModel.from_pretrained(network, directory)`. Either is meant to be used at full strength, 1:
    alpha / rank is in the weights already.
    """
    network = model.denoiser.network
    if not isinstance(network, AdaptedNetwork):
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    factors = network.factors()
    if isinstance(model.network, DiffusersConfig) and model.network.class_name in PIPELINE_FAMILIES:
        # Not through diffusers' convert_state_dict_to_diffusers: it renames the attention layers alone, and
        # the loader then drops them from a file that holds others too (0.42; a warning, no error).
        name, tensors = DIFFUSERS_WEIGHTS, {f"unet.{key}": value for key, value in factors.items()}
    else:
        name, tensors = PEFT_WEIGHTS, {f"base_model.model.{key}": value for key, value in factors.items()}
        network.settings().save_pretrained(directory)
    dense = {key: value.cpu().contiguous() for key, value in tensors.items()}
    write_atomically(directory / name, lambda path: save_file(dense, path, metadata={"format": "pt"}))
