"""Configs as files: a run's config.json, read back strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from momatch.config import ConfigError, DistillConfig, RunConfig, TeacherConfig, to_json

Config = TypeVar("Config", bound=RunConfig)


def from_json(fields: dict[str, Any], config_type: type[Config]) -> Config:
    """The inverse of `to_json`; strict about unknown keys and types.

    Raises:
        ConfigError: naming the first offending key.
    """
    from pydantic import TypeAdapter, ValidationError

    rest = {key: value for key, value in fields.items() if key not in ("kind", "inputs")}
    _refuse_unknown(rest, to_json(config_type()), "")
    try:
        return TypeAdapter(config_type).validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
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
