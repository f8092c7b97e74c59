"""From a network's shape to the network, and between shapes and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from momatch.networks.configs import CustomConfig, DiffusersConfig, MLPConfig, UNetConfig, UViTConfig
from momatch.networks.custom import build_custom
from momatch.networks.diffusers import DiffusersNetwork
from momatch.networks.mlp import MLP
from momatch.networks.unet import UNet
from momatch.networks.uvit import UViT

NetworkConfig = UNetConfig | UViTConfig | MLPConfig | DiffusersConfig | CustomConfig

_FAMILIES: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "unet": (UNetConfig, UNet),
    "uvit": (UViTConfig, UViT),
    "mlp": (MLPConfig, MLP),
    "diffusers": (DiffusersConfig, DiffusersNetwork),
    "custom": (CustomConfig, build_custom),
}


def build(config: NetworkConfig) -> nn.Module:
    """A freshly initialised network of the given shape (from torch's global generator: seed it first)."""
    for config_type, make in _FAMILIES.values():
        if isinstance(config, config_type):
            return make(config)
    raise TypeError(f"no network belongs to {type(config).__name__}; known are {', '.join(_FAMILIES)}")


def divisor(config: UNetConfig | UViTConfig) -> int:
    """By what the sides of a picture must be divisible."""
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


def from_json(fields: dict[str, Any]) -> NetworkConfig:
    """The inverse of `to_json`.

    Raises:
        ValueError: if the family or a field is unknown.
    """
    rest = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    family = rest.pop("family", None)
    shape = config_type(family)
    try:
        return shape(**rest)
    except TypeError as error:
        raise ValueError(f"network of family {family!r}: {error}") from None
