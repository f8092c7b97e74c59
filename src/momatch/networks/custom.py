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
    """What the function returns.

    Raises:
        UsageError: if the name does not lead to a function.
    """
    module_name, _, function_name = builder.partition(":")
    function = named(builder, "function")
    if not callable(function):
        raise UsageError(f"module {module_name!r} has no function {function_name!r}, as {builder!r} says")
    return function()


def build_custom(config: CustomConfig) -> nn.Module:
    """The network of the model that the builder returns."""
    return call(config.builder).denoiser.network
