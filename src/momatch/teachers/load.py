"""The one door for teachers, whoever made them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from momatch.errors import UsageError
from momatch.model import Model
from momatch.networks import custom
from momatch.networks.configs import CustomConfig
from momatch.teachers import diffusers, own

HUB_NAME = re.compile(r"(?!runs/)[\w-][\w.-]*/[\w-][\w.-]*")  # momatch's own runs are never on the hub
BUILDER = re.compile(r"[\w.]+:\w+")


def load_teacher(source: str | Path, null_label: int | None = None, size: int | None = None) -> Model:
    """Load a teacher.

    Args:
        source: "digits" for the one that ships with the package; the folder of a model, or of a run that
            trained one; the folder of a diffusers pipeline, or of a diffusers model with its scheduler; the
            name of one on the Hugging Face hub, "organisation/name"; or "package.module:function", whose
            call gives a `momatch.Model`.
        null_label: the label that stands for "no class" in a diffusers UNet2DModel; it can then be guided.
        size: side of what a diffusers teacher makes, if not what its files say.

    Raises:
        UsageError: if there is no usable model, or something about it has to be told.
    """
    text, path = str(source), Path(source)
    if not path.exists() and BUILDER.fullmatch(text):
        model = _built(text)
    elif path.is_dir() and not (path / "model.json").is_file() and diffusers.is_folder(path):
        return diffusers.load(path, null_label, size)
    elif not path.parent.is_dir() and isinstance(source, str) and HUB_NAME.fullmatch(text):
        return diffusers.load(diffusers.from_hub(text), null_label, size, pipeline=text)
    else:
        model = own.load_teacher(source)
    if null_label is not None or size is not None:
        raise UsageError(f"null_label and size are for teachers of diffusers; {source} is none")
    return model


def load_any(source: str | Path, null_label: int | None = None, size: int | None = None) -> Model:
    """Load whatever model a run ended with, its student or its teacher; or a teacher from elsewhere.

    Raises:
        UsageError: as `load_teacher`.
    """
    path = Path(source)
    outside = diffusers.is_folder(path) if path.is_dir() else not path.exists()
    if outside and not (path / "model.json").is_file():
        return load_teacher(source, null_label, size)
    return own.load_any(source)


def _built(builder: str) -> Model:
    model = custom.call(builder)
    if not isinstance(model, Model):
        raise UsageError(f"{builder} returned {type(model).__name__}; it must return a momatch.Model")
    return replace(model, network=CustomConfig(builder), info={"role": "teacher", **model.info})
