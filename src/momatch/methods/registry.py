"""The algorithms by name: those of this folder, and of anybody's module as "package.module:ConfigClass"."""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from momatch import methods
from momatch.methods.base import MethodConfig
from momatch.utils.errors import ConfigError
from momatch.utils.settings import from_json
from momatch.utils.text import first_line


def names() -> list[str]:
    """The names of all algorithms in this folder."""
    return sorted(_known())


def config_type(name: str) -> type[MethodConfig]:
    """The settings of the algorithm of that name.

    Raises:
        ConfigError: if there is none.
    """
    if ":" in name:
        return _foreign(name)
    known = _known()
    if name not in known:
        raise ConfigError(
            f"method is {name!r}; use {', '.join(sorted(known))}, or your own as package.module:ConfigClass"
        )
    return known[name]


def read(value: Any) -> MethodConfig:
    """Settings from what they may be given as: themselves, an algorithm's name, or {"name": …, …}.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    if isinstance(value, MethodConfig):
        return value
    if isinstance(value, str):
        return config_type(value)()
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"method is {value!r}; give a name, such as alternating, or its settings")
    kind = config_type(value["name"])
    given = {key: each for key, each in value.items() if key != "name"}
    return from_json(kind, json.dumps(given), "method")


def to_json(config: MethodConfig) -> dict[str, Any]:
    """{"name": …, and the settings}; the inverse of `read`."""
    kind = type(config)
    own = kind.__module__.startswith(f"{methods.__name__}.")
    return {"name": kind.name if own else f"{kind.__module__}:{kind.__qualname__}", **asdict(config)}


def _known() -> dict[str, type[MethodConfig]]:
    found = {}
    for info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{info.name}")
        for kind in vars(module).values():
            if (
                isinstance(kind, type)
                and issubclass(kind, MethodConfig)
                and kind.__module__ == module.__name__
            ):
                found[kind.name] = kind
    found.pop("", None)  # those that distil nothing
    return found


def _foreign(name: str) -> type[MethodConfig]:
    module_name, _, class_name = name.partition(":")
    try:
        found: Any = attrgetter(class_name)(importlib.import_module(module_name))
    except AttributeError:
        found = None
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"method is {name!r}, but {module_name} cannot be imported ({first_line(error)}); name a module "
            "on PYTHONPATH"
        ) from None
    config = isinstance(found, type) and issubclass(found, MethodConfig)
    if found is None or not config or found.build is MethodConfig.build:
        raise ConfigError(f"method is {name!r}, which is no MethodConfig; see momatch.methods.base")
    return found
