"""Configs as people write them: a file of YAML, TOML or JSON, whole or on top of a recipe."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from momatch.config.files import from_json
from momatch.config.recipes import recipe
from momatch.config.schema import KINDS, Kind, RunConfig, to_json
from momatch.utils.errors import ConfigError
from momatch.utils.text import first_line

ENTRY = re.compile(r"^        (\w+): (.*)$")  # of a docstring's "Attributes:"
WIDTH = 100


def read_given(path: Path, kind: Kind | None = None) -> RunConfig:
    """Read a config; a run's own config.json and config.yaml are ones, too.

    Its keys are those of config.json. `recipe` names what the others are laid upon; without it they are laid
    upon the defaults.

    Args:
        path: a .yaml, .yml, .toml or .json.
        kind: of the run, where the file names neither a `kind` nor a recipe.

    Raises:
        ConfigError: if it cannot be read, or a key or value is wrong; naming it.
    """
    given = _contents(path)
    name = given.pop("recipe", None)
    if name is not None:
        base: RunConfig | None = recipe(name)
    else:
        named = given.get("kind")
        if named is not None and named not in list(KINDS):  # which may be of any type
            raise ConfigError(f"{path}: kind is {named!r}; give {' or '.join(KINDS)}, or a recipe")
        found = KINDS[named] if named is not None else kind
        base = found() if found else None
    if base is None:
        raise ConfigError(f"{path} says neither recipe nor kind; give one of them, such as recipe: digits-8")
    whole = to_json(base)
    if given.get("kind", whole["kind"]) != whole["kind"]:
        raise ConfigError(f"{path}: kind is {given['kind']!r}, but recipe {name} is for {whole['kind']}")
    try:
        return from_json(_laid_upon(whole, given), type(base))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _contents(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except Exception as error:  # each reader has errors of its own
        raise ConfigError(f"cannot read the config {path}: {first_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path} is not the config of a run: it holds no settings by name")
    return found


def _laid_upon(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The base with what is given; settings of another method or network replace those of the base."""
    found = dict(base)
    for key, value in given.items():
        old = found.get(key)
        if key in ("method", "network") and isinstance(value, dict) and isinstance(old, dict):
            word = "name" if key == "method" else "family"
            found[key] = {**old, **value} if value.get(word, old.get(word)) == old.get(word) else value
        elif isinstance(old, dict) and isinstance(value, dict):
            found[key] = _laid_upon(old, value)
        else:
            found[key] = value
    return found


def as_yaml(config: RunConfig) -> str:
    """A config as YAML, each setting with what it is; `read_given` reads it back."""
    import yaml

    lines = ["# Settings of a run: momatch COMMAND --config THIS --out DIR; options after it override them."]

    def write(values: dict[str, Any], settings: Any, depth: int) -> None:
        said = _said(type(settings)) if is_dataclass(settings) else {}
        for key, value in values.items():
            pad = "  " * depth
            if said.get(key) and not isinstance(value, dict):
                lines.append(f"{pad}# {said[key]}")
            if isinstance(value, dict) and value:
                lines.append(f"{pad}{key}:" + (f"  # {said[key]}" if said.get(key) else ""))
                write(value, getattr(settings, key, None), depth + 1)
            else:
                plain = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
                lines.append(f"{pad}{key}: {plain.removesuffix('...' + chr(10)).strip()}")

    write(to_json(config), config, 0)
    return "\n".join(lines) + "\n"


def _said(kind: type) -> dict[str, str]:
    """What a class of settings says of each: the first sentence of its attribute's description."""
    found: dict[str, str] = {}
    known = {each.name for each in fields(kind)}
    for base in reversed(kind.__mro__):
        name = ""
        for line in (base.__doc__ or "").splitlines():
            match = ENTRY.match(line)
            if match and match[1] in known:
                name = match[1]
                found[name] = match[2]
            elif name and line.startswith("            "):
                found[name] += f" {line.strip()}"
            else:
                name = ""
    return {
        name: inspect.cleandoc(text).partition("; ")[0].partition(". ")[0] for name, text in found.items()
    }
