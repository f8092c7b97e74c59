"""Short and former module names: `momatch.schedules` is `momatch.diffusion.schedules`.

A module has one identity whatever it is imported as, so that classes, monkeypatches and isinstance agree.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOMES = {  # below momatch: then → now
    "analytic": "diffusion",
    "analytic.distances": "diffusion.distances",
    "analytic.mixture": "diffusion.gaussian_mixture",
    "arguments": "cli.parsing",
    "assembly": "training.build",
    "assessment": "evaluation.evaluate",
    "commands": "cli.train",
    "comparison": "cli.serve.comparison",
    "config_files": "config.files",
    "conventions": "diffusion.conventions",
    "data.items": "data.collections",
    "data.pictures": "data.image_io",
    "data.wordings": "data.paraphrases",
    "denoiser": "diffusion.denoiser",
    "devices": "utils.devices",
    "drawing": "cli.sample",
    "encoders": "interop.encoders",
    "errors": "utils.errors",
    "evaluation.assessment": "evaluation.evaluate",
    "evaluation.run": "evaluation.metrics",
    "evaluation.sweep": "evaluation.evaluate",
    "export": "interop.export",
    "export.card": "interop.export.card",
    "export.folder": "interop.export.folder",
    "export.moment_matching_network": "interop.export.moment_matching_network",
    "export.moment_matching_pipeline": "interop.export.moment_matching_pipeline",
    "export.moment_matching_scheduler": "interop.export.moment_matching_scheduler",
    "export.noise": "interop.export.noise",
    "export.onnx": "interop.export.onnx",
    "export.standalone": "interop.export.standalone",
    "files": "utils.files",
    "fit": "interop.compatibility",
    "inspection": "cli.evaluate",
    "latents": "interop.autoencoder",
    "lora": "interop.lora_files",
    "memory": "training.memory",
    "methods.products": "methods.jvp",
    "model": "models.model",
    "monitoring": "training.monitor",
    "networks.adapted": "networks.lora",
    "pipelines": "interop.pipelines",
    "planning": "training.plan",
    "preparation": "interop.prepare",
    "process": "diffusion.process",
    "progress": "cli.progress",
    "prompts": "interop.prompts",
    "publication": "cli.export",
    "recipes": "config.recipes",
    "reports": "evaluation.report",
    "reports.html": "evaluation.report.html",
    "reports.plots": "evaluation.report.plots",
    "reports.tables": "evaluation.report.tables",
    "runs": "training.run",
    "sampling": "diffusion.sampling",
    "schedules": "diffusion.schedules",
    "serving": "cli.serve.page",
    "stopping": "training.stopping",
    "teachers": "interop",
    "teachers.diffusers": "interop.diffusers_model",
    "teachers.load": "interop.load",
    "teachers.noise": "interop.diffusers_scheduler",
    "teachers.own": "interop.load",
    "text": "interop.text_encoders",
    "training.seeding": "utils.seeding",
}


class _Alias(Loader):
    """Loads a module by importing it under its present name."""

    def __init__(self, home: str):
        self.home = home

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.home)
        self.spec = module.__spec__  # the import system is about to replace it by the alias's
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package != "momatch" or rest not in HOMES:
            return None
        return ModuleSpec(fullname, _Alias(f"momatch.{HOMES[rest]}"))


def install() -> None:
    """Make the former names importable; once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the files, which aliases of whole packages would find
