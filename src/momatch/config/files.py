"""Configs as files: a run's config.json, read back strictly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from momatch.config.schema import DistillConfig, RunConfig, TeacherConfig, to_json
from momatch.networks import registry
from momatch.utils.errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)
Typed = TypeVar("Typed")


def from_json(fields: dict[str, Any], config_type: type[Config]) -> Config:
    """The inverse of `to_json`; strict about unknown keys and types.

    Raises:
        ConfigError: naming the first offending key.
    """
    rest = {key: value for key, value in fields.items() if key not in ("kind", "inputs")}
    known = to_json(config_type())
    network = rest.get("network")
    if isinstance(network, dict) and "network" in known:
        try:
            shape = registry.config_type(network.get("family"))
        except ValueError as error:
            raise ConfigError(f"config key 'network.family': {error}") from None
        known["network"] = registry.to_json(shape())
    _refuse_unknown(rest, known, "")
    if not isinstance(network, dict):
        return _typed(rest, config_type, "")
    inner = _typed({k: v for k, v in network.items() if k != "family"}, shape, "network.")
    outer = _typed({k: v for k, v in rest.items() if k != "network"}, config_type, "")
    return replace(outer, network=inner)


def _typed(fields: dict[str, Any], wanted: type[Typed], prefix: str) -> Typed:
    """The dataclass `wanted` from JSON types, strictly."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(wanted).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"config key {key!r} has value {first['input']!r}: {first['msg'].lower()}"
        ) from None


def read(path: Path) -> RunConfig:
    """Read a run's config.json, of whichever kind it is.

    Raises:
        ConfigError: if it is missing, not JSON, or not the config of a run.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    kinds: dict[str, type[TeacherConfig] | type[DistillConfig]] = {
        "train-teacher": TeacherConfig,
        "distill": DistillConfig,
    }
    if not isinstance(fields, dict) or fields.get("kind") not in kinds:
        raise ConfigError(f"{path} is not the config of a run: its 'kind' is none of {', '.join(kinds)}")
    return from_json(fields, kinds[fields["kind"]])


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two JSON configs differ, dotted, each as "key: old there, new here"."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def _refuse_unknown(fields: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"unknown config key {prefix + key!r}; known here are {', '.join(known)}")
        if isinstance(value, dict) and isinstance(known[key], dict):
            _refuse_unknown(value, known[key], f"{prefix}{key}.")
