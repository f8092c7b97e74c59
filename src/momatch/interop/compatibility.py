"""Do a model and data fit each other?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from momatch.data.images import KINDS, ImageSet, Split
from momatch.data.tokens import with_mask
from momatch.diffusion.categorical import CategoricalProcess
from momatch.interop.pipelines import encoders_fingerprint
from momatch.models.model import Model
from momatch.networks.configs import TokenTransformerConfig
from momatch.utils.errors import ConfigError

REMEDY = "choose a teacher (--teacher) and data (--data) that fit each other"


def in_space_of(model: Model, data: Split) -> Split:
    """The data as the model's process takes them: tokens, of masked diffusion, with room for the mask."""
    if not isinstance(model.process, CategoricalProcess) or data.train.space != "tokens":
        return data
    kind = model.process.kind
    return Split(with_mask(data.train, kind), with_mask(data.heldout, kind))


def check_fit(model: Model, images: ImageSet) -> None:
    """Refuse data that a model cannot make, or cannot be asked for.

    Raises:
        ConfigError: if their shapes differ, the data have more classes, or lack a condition that the model
            takes, or have it in another shape.
    """
    what = KINDS[images.space]
    shape = tuple(images.images.shape[1:])
    if images.space == "tokens":
        shape = _check_tokens(model, images)
    if shape != model.sample_shape:
        raise ConfigError(
            f"the data ({images.name}) are {what} of shape {shape}, the model makes "
            f"{model.sample_shape}; {_shape_remedy(images, model.sample_shape)}"
        )
    if model.num_classes > 1 and images.num_classes < 2 and "label" not in model.denoiser.null_values:
        raise ConfigError(
            f"the data ({images.name}) have no labels, the model must be given one of {model.num_classes}; "
            "put each class of pictures into a folder of its own"
        )
    if model.num_classes and images.num_classes > model.num_classes:
        raise ConfigError(
            f"the data ({images.name}) have {images.num_classes} classes, the model knows "
            f"{model.num_classes}; {REMEDY}"
        )
    _check_encoders(model, images)
    for name, wanted in model.cond_shapes.items():
        if name in images.conditions or not isinstance(model.denoiser.null_values.get(name), float):
            _check_condition(model, images, name, wanted)  # a number is a default, a guidance strength say


def _check_tokens(model: Model, images: ImageSet) -> tuple[int, ...]:
    """Refuse other tokens than the model's; returns the shape of a row.

    Raises:
        ConfigError: if their number, or what they stand for, differs.
    """
    length, size = images.images.shape[1:]
    if isinstance(model.network, TokenTransformerConfig):
        known = model.provenance.vocabulary
        other = sorted({*images.vocabulary} ^ {*known}) or ["in another order"]
        if known and images.vocabulary != known:
            raise ConfigError(
                f"the data ({images.name}) have other tokens than those that the model was trained on, "
                f"{other[0]!r} for one; {REMEDY}"
            )
        if size != model.network.num_tokens:
            raise ConfigError(
                f"the data ({images.name}) have {size} kinds of token, the model {model.network.num_tokens}; "
                f"{REMEDY}"
            )
    return (length,)


def _shape_remedy(images: ImageSet, wanted: tuple[int, ...]) -> str:
    """Another side, where that is all that differs."""
    if images.space == "tokens" and len(wanted) == 1:
        return f"cut them by --row-length {wanted[0]}"
    found = tuple(images.images.shape[1:])
    if images.space != "pixels" or found[0] != wanted[0] or len({*wanted[1:]}) > 1:
        return REMEDY
    return f"--image-size {wanted[-1]} reduces those of a folder or of tars, or {REMEDY}"


def _check_condition(model: Model, images: ImageSet, name: str, wanted: tuple[int, ...]) -> None:
    if name not in images.conditions:
        if images.space == "vectors":
            raise ConfigError(
                f"the data ({images.name}) come without {name}, which the model must be asked with; add an "
                "array of that name to the file"
            )
        text = model.provenance.text_encoder
        by = f"--text-encoder {text}" if text else "--teacher PIPELINE"
        raise ConfigError(
            f"the data ({images.name}) come without {name}, which the model must be asked with; make them "
            f"with momatch prepare PICTURES {by} --out FOLDER, and give that FOLDER as data"
        )
    found = tuple(images.conditions[name].shape[1:])
    if len(found) != len(wanted) or any(
        want not in (-1, size) for want, size in zip(wanted, found, strict=True)
    ):
        shape = "×".join("any" if size == -1 else str(size) for size in wanted)
        raise ConfigError(
            f"the data ({images.name}) have {name} of {'×'.join(map(str, found))} numbers a sample, the "
            f"model takes {shape}; prepare them with the text encoder of the model"
        )


def _check_encoders(model: Model, images: ImageSet) -> None:
    """Latents and embeddings mean something only to a network that grew up with the same encoders."""
    made_by = images.origin.get("pipeline") or images.origin.get("text_encoder")
    known, pipeline = model.provenance.text_encoder, model.provenance.pipeline
    if known and made_by and images.conditions and known != images.origin.get("text_encoder"):
        raise ConfigError(
            f"the captions of the data ({images.name}) were encoded by {made_by}, the model was trained on "
            f"those of {known}; use data of that encoder"
        )
    fingerprint = images.origin.get("encoders")
    if not fingerprint or not pipeline or not Path(pipeline).is_dir():
        return
    if encoders_fingerprint(pipeline) != fingerprint:
        raise ConfigError(
            f"the data ({images.name}) were prepared with the encoders of {made_by}, the model comes from "
            f"{pipeline}, whose encoders differ; run momatch prepare with --teacher {pipeline}"
        )


def with_null_condition(teacher: Model, nulls: Mapping[str, float | Tensor]) -> Model:
    """The teacher; where it knows no null value for something it takes, with the given one.

    Args:
        teacher: the teacher.
        nulls: what stands for "nothing asked for", by name: `ImageSet.null_condition`, or the null values of
            a student, which has kept those of its data.
    """
    known = teacher.denoiser.null_values
    added = {name: nulls[name] for name in teacher.cond_shapes if name in nulls and name not in known}
    if not added:
        return teacher
    denoiser = copy.copy(teacher.denoiser)  # the same weights; another dict of null values
    denoiser.null_values = {**known, **added}
    return replace(teacher, denoiser=denoiser)


def check_null_condition(teacher: Model, images: ImageSet, scale: float) -> None:
    """Refuse guidance away from a null condition that is not there, or not in the shape of the data's.

    Raises:
        ConfigError: naming what is missing.
    """
    taken = [*(["label"] if teacher.num_classes else []), *teacher.cond_shapes]
    missing = [name for name in taken if name not in teacher.denoiser.null_values]
    if missing or not taken:
        of = f" in {', '.join(missing)}" if teacher.cond_shapes else ""
        other = (
            "data made by momatch prepare" if teacher.cond_shapes else "a teacher trained with cond_dropout"
        )
        raise ConfigError(
            f"guidance.scale is {scale}, but this teacher has no null condition to guide away from{of}; "
            f"use guidance.scale 0, or {other}"
        )
    for name in teacher.cond_shapes:
        null, row = teacher.denoiser.null_values[name], tuple(images.conditions[name].shape[1:])
        if isinstance(null, Tensor) and tuple(null.shape) != row:
            raise ConfigError(
                f"the teacher's null condition has {name} of shape {tuple(null.shape)}, the data "
                f"({images.name}) of shape {row}, so guidance.scale {scale} cannot be used; prepare the data "
                "with the teacher's own pipeline"
            )
