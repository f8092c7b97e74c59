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
from typing import TYPE_CHECKING, Any

from momatch.utils import moved

if TYPE_CHECKING:
    from momatch import evaluation, methods
    from momatch.config.recipes import recipe
    from momatch.config.schema import DistillConfig, TeacherConfig
    from momatch.data.sources import load_data
    from momatch.diffusion import conventions, process, sampling, schedules
    from momatch.diffusion import gaussian_mixture as analytic
    from momatch.diffusion.denoiser import Denoiser, Guided
    from momatch.interop.load import load_student, load_teacher
    from momatch.interop.pil import to_pil
    from momatch.interop.text_encoders import text_encoder_of
    from momatch.models.model import Model, Student
    from momatch.training.build import distill

__version__ = "0.1.0"

_HOMES = {
    "Denoiser": "momatch.diffusion.denoiser",
    "DistillConfig": "momatch.config.schema",
    "Guided": "momatch.diffusion.denoiser",
    "Model": "momatch.models.model",
    "Student": "momatch.models.model",
    "TeacherConfig": "momatch.config.schema",
    "distill": "momatch.training.build",
    "load_data": "momatch.data.sources",
    "load_student": "momatch.interop.load",
    "load_teacher": "momatch.interop.load",
    "recipe": "momatch.config.recipes",
    "text_encoder_of": "momatch.interop.text_encoders",
    "to_pil": "momatch.interop.pil",
}
_MODULES = ("analytic", "conventions", "evaluation", "methods", "process", "sampling", "schedules")

__all__ = [
    "Denoiser",
    "DistillConfig",
    "Guided",
    "Model",
    "Student",
    "TeacherConfig",
    "__version__",
    "analytic",
    "conventions",
    "distill",
    "evaluation",
    "load_data",
    "load_student",
    "load_teacher",
    "methods",
    "process",
    "recipe",
    "sampling",
    "schedules",
    "text_encoder_of",
    "to_pil",
]

moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"momatch.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'momatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
