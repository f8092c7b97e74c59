"""Networks that somebody else's code makes, by the name of a function: "package.module:function"."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from momatch.networks.configs import CustomConfig
from momatch.utils.errors import UsageError


def named(name: str, kind: str = "NAME") -> Any:
    """What is there by the name "package.module:NAME"; None if the module has no such thing.

    Raises:
        UsageError: if there is no such module.
    """
    module_name, _, inner = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"cannot import {module_name!r} of {name!r} ({error}); name a module on PYTHONPATH, "
            f"as package.module:{kind}"
        ) from None
    return getattr(module, inner, None)


def call(builder: str) -> Any:
    """What the function returns, which must say that this is a Model.

    The name may come from a file that somebody sent: no function is called that was not made for this.

    Raises:
        UsageError: if the name does not lead to such a function.
    """
    module_name, _, function_name = builder.partition(":")
    function = named(builder, "function")
    if not callable(function):
        raise UsageError(f"module {module_name!r} has no function {function_name!r}, as {builder!r} says")
    if not _says_model(function):
        raise UsageError(
            f"{builder} does not say that it returns a model, so it is not called; write "
            f"def {function_name}() -> momatch.Model"
        )
    return function()


def _says_model(function: Any) -> bool:
    said = getattr(function, "__annotations__", {}).get("return")
    name = said if isinstance(said, str) else getattr(said, "__name__", "")
    return name.rpartition(".")[2] in ("Model", "Student")


def build_custom(config: CustomConfig) -> nn.Module:
    """The network of the model that the builder returns."""
    return call(config.builder).denoiser.network
