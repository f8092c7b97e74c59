"""From a network's shape to the network, and between shapes and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from momatch.networks.configs import (
    CustomConfig,
    DiffusersConfig,
    MLPConfig,
    TokenTransformerConfig,
    UNetConfig,
    UViTConfig,
)
from momatch.networks.custom import build_custom
from momatch.networks.diffusers import DiffusersNetwork
from momatch.networks.mlp import MLP
from momatch.networks.tokens import TokenTransformer
from momatch.networks.unet import UNet
from momatch.networks.uvit import UViT
from momatch.utils.errors import ConfigError
from momatch.utils.settings import require, sentence, shown

# Those that `momatch train-teacher` trains.
TrainableConfig = UNetConfig | UViTConfig | MLPConfig | TokenTransformerConfig
_OWN = UNetConfig, UViTConfig, MLPConfig, TokenTransformerConfig
NetworkConfig = UNetConfig | UViTConfig | MLPConfig | TokenTransformerConfig | DiffusersConfig | CustomConfig

_FAMILIES: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "unet": (UNetConfig, UNet),
    "uvit": (UViTConfig, UViT),
    "mlp": (MLPConfig, MLP),
    "tokens": (TokenTransformerConfig, TokenTransformer),
    "diffusers": (DiffusersConfig, DiffusersNetwork),
    "custom": (CustomConfig, build_custom),
}
MOST, MOST_BLOCKS, MOST_LEVELS = 2**20, 1000, 64  # of a file's own network: what is above is no network's


def build(config: NetworkConfig) -> nn.Module:
    """A freshly initialised network of the given shape (from torch's global generator: seed it first)."""
    for config_type, make in _FAMILIES.values():
        if isinstance(config, config_type):
            return make(config)
    raise TypeError(f"no network belongs to {type(config).__name__}; known are {', '.join(_FAMILIES)}")


def divisor(config: TrainableConfig) -> int:
    """By what the sides of a picture must be divisible."""
    if isinstance(config, MLPConfig | TokenTransformerConfig):
        return 1
    if isinstance(config, UViTConfig):
        return config.patch_size * 2 ** len(config.channels)
    return 2 ** (len(config.channels) - 1)


def dropout(config: NetworkConfig) -> float | None:
    """The rate of dropout that a network of this shape has in training; None if it cannot have any."""
    if isinstance(config, DiffusersConfig):
        return config.config.get("dropout")
    return getattr(config, "dropout", None)


def with_dropout(config: NetworkConfig, rate: float) -> NetworkConfig:
    """The same shape with another rate of dropout; it must be one that has a rate."""
    if isinstance(config, DiffusersConfig):
        return replace(config, config={**config.config, "dropout": rate})
    return replace(config, dropout=rate)  # type: ignore (the caller has asked `dropout`)


def step_counts(config: NetworkConfig) -> tuple[int, ...]:
    """The numbers of steps that a network of this shape is told apart; () if it is told none."""
    return getattr(config, "step_counts", ())


def with_step_counts(config: NetworkConfig, counts: tuple[int, ...]) -> NetworkConfig | None:
    """The same shape, told the number of steps; None if it has no place for that."""
    known = isinstance(config, UNetConfig | UViTConfig | MLPConfig | TokenTransformerConfig)
    return replace(config, step_counts=counts) if known else None


def noise_dim(config: NetworkConfig) -> int:
    """Numbers of noise that a network of this shape is given at each position, beside z."""
    return getattr(config, "noise_dim", 0)


def to_json(config: NetworkConfig) -> dict[str, Any]:
    """{"family": …, and the shape's fields}."""
    family = next(name for name, (config_type, _) in _FAMILIES.items() if isinstance(config, config_type))
    return {"family": family, **asdict(config)}


def config_type(family: Any) -> type:
    """The type of shape of a family.

    Raises:
        ValueError: if the family is unknown.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown network family {family!r}; known are {', '.join(_FAMILIES)}")
    return _FAMILIES[family][0]


def from_json(given: dict[str, Any]) -> NetworkConfig:
    """The inverse of `to_json`.

    Raises:
        ValueError: if the family or a field is unknown.
    """
    rest = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    family = rest.pop("family", None)
    shape = config_type(family)
    known = [field.name for field in fields(shape)]
    for key in rest:
        if key not in known:
            raise ValueError(f"unknown config key 'network.{key}'; known here are {', '.join(known)}")
    if config_type(family) in _OWN:
        _check_sizes(rest)
    return shape(**rest)


def _check_sizes(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        numbers = value if isinstance(value, tuple) else [value]
        most = MOST_BLOCKS if key in ("depth", "blocks_per_level") else MOST
        if len(numbers) > MOST_LEVELS or any(_is_above(number, most) for number in numbers):
            raise ValueError(f"network.{key} is {shown(value)}, larger than any network's")


def _is_above(number: Any, most: int) -> bool:
    return isinstance(number, int | float) and not abs(number) <= most


def check_fit(config: NetworkConfig, weights: Mapping[str, Tensor], sample: tuple[int, ...]) -> None:
    """Refuse weights or samples that are not those of this shape, before memory is taken for a network of it.

    Networks of other people's code cannot be asked without being built.

    Raises:
        ValueError: naming what differs.
    """
    if not isinstance(config, _OWN):
        return
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    for name in sorted({*wanted, *weights}):
        found = weights[name].shape if name in weights else None
        if found != wanted.get(name):
            raise ValueError(f"its weights are not those of its network: {name} is {found}")
    if isinstance(config, UNetConfig | UViTConfig):
        sides = divisor(config)
        if len(sample) != 3 or sample[0] != config.image_channels or any(s % sides for s in sample[1:]):
            raise ValueError(f"its network makes no samples of shape {sample}")
    if isinstance(config, TokenTransformerConfig) and sample != (config.length,):
        raise ValueError(f"its network makes no samples of shape {sample}")
    if isinstance(config, MLPConfig) and math.prod(sample) != config.dim:
        raise ValueError(f"its network makes no samples of shape {sample}")


def checked(config: TrainableConfig) -> TrainableConfig:
    """The shape itself, if its fields have the right types and a network can be built of it.

    The shapes are plain dataclasses, since exported folders carry their source; so they are checked here,
    when they become part of a config.

    Raises:
        ConfigError: naming the field as network.FIELD, its value and what is allowed.
    """
    kind = type(config)
    try:
        TypeAdapter(kind).validate_json(json.dumps(asdict(config)), strict=True)
    except ValidationError as error:
        raise ConfigError(sentence(error, kind, "network")) from None
    for key, value in asdict(config).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"network.{key}", value, "give a finite number")
    for key in ("image_channels", "num_classes", "text_dim"):
        value = getattr(config, key, int(key == "image_channels"))
        require(value >= (key == "image_channels"), f"network.{key}", value, "it must not be negative")
    told = config.step_counts
    require(not told, "network.step_counts", told, "leave it out: it is for students (--steps 1,2,4,8)")
    if isinstance(config, MLPConfig):
        for key in ("dim", "width", "depth"):
            value = getattr(config, key)
            require(value >= 1, f"network.{key}", value, "use 1 or more")
        dim = config.embedding_dim
        require(dim >= 2 and dim % 2 == 0, "network.embedding_dim", dim, "use an even number, 2 or more")
    elif isinstance(config, TokenTransformerConfig):
        _check_transformer(config)
        _check_common(config)
        given = config.noise_dim
        require(
            not given, "network.noise_dim", given, "leave it out: it is for students (--method.noise-dim)"
        )
    else:
        _check_shape(config)
    return config


def _check_shape(network: UNetConfig | UViTConfig) -> None:
    widths = network.channels
    fits = all(w > 0 and w % 8 == 0 for w in widths)
    require(fits, "network.channels", widths, "use multiples of 8")
    _check_common(network)
    blocks = network.blocks_per_level
    require(blocks >= 1, "network.blocks_per_level", blocks, "use 1 or more")
    if isinstance(network, UViTConfig):
        _check_transformer(network)
        require(network.patch_size >= 1, "network.patch_size", network.patch_size, "use 1 or more")
        return
    require(bool(widths), "network.channels", widths, "name one width at least")
    levels = network.attention_levels
    fits = all(0 <= level < len(widths) for level in levels)
    require(fits, "network.attention_levels", levels, f"use levels 0 to {len(widths) - 1}")
    fits = all(widths[level] < 64 or widths[level] % 32 == 0 for level in levels)
    require(fits, "network.channels", widths, "levels with attention need multiples of 32")


def _check_common(network: UNetConfig | UViTConfig | TokenTransformerConfig) -> None:
    dim = network.embedding_dim
    require(dim >= 2 and dim % 2 == 0, "network.embedding_dim", dim, "use an even number, 2 or more")
    require(0 <= network.dropout < 1, "network.dropout", network.dropout, "it must lie in [0, 1)")


def _check_transformer(network: UViTConfig | TokenTransformerConfig) -> None:
    width = network.width
    fits = width > 0 and width % (64 if width > 64 else 4) == 0
    require(fits, "network.width", width, "use a multiple of 4, of 64 if above 64")
    require(network.depth >= 1, "network.depth", network.depth, "use 1 or more")
