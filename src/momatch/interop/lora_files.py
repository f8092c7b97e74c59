"""LoRA adapters as files: a student's, for diffusers and peft to load, and those that come with a teacher."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from momatch.diffusion.denoiser import Denoiser
from momatch.interop.pipelines import quiet
from momatch.models.model import Model, ModelError
from momatch.networks.configs import DiffusersConfig
from momatch.networks.lora import AdaptedNetwork
from momatch.utils.errors import Notice
from momatch.utils.files import write_atomically
from momatch.utils.text import first_line

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


def with_adapter(network: Any, directory: Path) -> Any:
    """One of diffusers' networks with a LoRA adapter merged into its weights.

    Args:
        network: that the adapter was made for.
        directory: it holds pytorch_lora_weights.safetensors, as diffusers' training scripts and
            `save_lora_weights` write it, or peft's adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: if there is no such file, or it does not fit the network.
    """
    kind = type(network).__name__
    try:
        if (directory / "adapter_config.json").is_file():
            from peft import PeftModel

            return PeftModel.from_pretrained(network, str(directory)).merge_and_unload()
        if not (directory / DIFFUSERS_WEIGHTS).is_file():
            raise ModelError(
                f"{directory} holds no adapter; give a folder with {DIFFUSERS_WEIGHTS}, or with peft's "
                f"adapter_config.json and {PEFT_WEIGHTS}"
            )
        weights = load_file(directory / DIFFUSERS_WEIGHTS)
        others = sorted({key.split(".")[0] for key in weights if key.startswith("text_encoder")})
        if others:
            warnings.warn(
                f"the adapter in {directory} changes {', '.join(others)} too, which is left out: prompts are "
                "encoded without it",
                Notice,
                stacklevel=2,
            )
        part = "unet" if "UNet" in kind else "transformer"
        prefix = part if any(key.startswith(f"{part}.") for key in weights) else None
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        with quiet():
            network.load_lora_adapter(weights, prefix=prefix)
            network.fuse_lora()
            network.unload_lora()
    except ModelError:
        raise
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as e:
        raise ModelError(
            f"the adapter in {directory} does not fit the {kind} ({first_line(e)}); give the one that was "
            "trained on this network"
        ) from None
    if all(bool((p == before[name]).all()) for name, p in network.named_parameters() if name in before):
        raise ModelError(f"the adapter in {directory} changes nothing in the {kind}; give the one of it")
    return network
