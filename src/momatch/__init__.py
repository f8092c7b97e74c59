"""momatch: moment matching distillation of diffusion and flow models (not the kernel MMD).

    import momatch

    teacher = momatch.load_teacher("digits")
    data = momatch.load_data("digits")
    student = momatch.distill(teacher, data, momatch.recipe("digits-8"), "runs/mine")
    images = student.sample(64, seed=7)

Names are imported when first used, so `import momatch` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Denoiser": "momatch.denoiser",
    "DistillConfig": "momatch.config",
    "Guided": "momatch.denoiser",
    "Model": "momatch.model",
    "Student": "momatch.model",
    "TeacherConfig": "momatch.config",
    "distill": "momatch.assembly",
    "load_data": "momatch.data.sources",
    "load_student": "momatch.teachers.own",
    "load_teacher": "momatch.teachers.load",
    "recipe": "momatch.recipes",
    "text_encoder_of": "momatch.text",
}
_MODULES = ("analytic", "conventions", "evaluation", "methods", "process", "sampling", "schedules")

# Imported on first use, so neither checker finds the names.
__all__ = ["__version__", *_HOMES, *_MODULES]  # noqa: F822 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"momatch.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'momatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
