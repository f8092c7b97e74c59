"""diffusers' network classes, one file each; a new file here is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from momatch.networks.families.family import Family

NO_FAMILY = ("family", "template")


def _found() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NO_FAMILY)
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.class_name: family for family in families}


FAMILIES: Mapping[str, Family] = _found()
