"""Configs as files: a run's config.json, read back strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from momatch.config.schema import KINDS, RunConfig
from momatch.utils import settings
from momatch.utils.errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)


def from_json(fields: dict[str, Any], config_type: type[Config]) -> Config:
    """The inverse of `to_json`; strict about unknown keys and types. Earlier versions' are read too.

    Raises:
        ConfigError: naming the first offending key.
    """
    rest = {key: value for key, value in upgraded(fields).items() if key not in ("kind", "inputs")}
    return settings.from_json(config_type, json.dumps(rest))


def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier version in today's keys: some of them have become the method's own."""
    if isinstance(fields.get("method"), dict):
        return fields
    found = dict(fields)
    moved = {key: found.pop(key) for key in ("update", "teacher_term", "instant") if key in found}
    method = found.get("method", "alternating" if moved else None)
    if not isinstance(method, str):
        return found
    instant = moved.pop("instant", {})
    if not isinstance(instant, dict):
        raise ConfigError(f"config key 'instant' has value {instant!r}; give its settings")
    return {**found, "method": {"name": method, **(instant if method == "instant" else moved)}}


def read(path: Path) -> RunConfig:
    """Read a run's config.json, of whichever kind it is.

    Raises:
        ConfigError: if it is missing, not JSON, or not the config of a run.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(fields, dict) or fields.get("kind") not in list(KINDS):  # which may be of any type
        raise ConfigError(f"{path} is not the config of a run: its 'kind' is none of {', '.join(KINDS)}")
    return from_json(fields, KINDS[fields["kind"]])


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
