"""The one door for models, whoever made them: a run, the package itself, diffusers, somebody's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from momatch.interop import diffusers_model as diffusers
from momatch.models.model import Model, ModelError, Student, load_model
from momatch.networks import custom
from momatch.networks.configs import CustomConfig
from momatch.utils.errors import UsageError
from momatch.utils.files import as_path
from momatch.utils.run_folder import RunFolder

ASSETS = Path(__file__).parent.parent / "assets"
HUB_NAME = re.compile(r"(?!runs/)[\w-][\w.-]*/[\w-][\w.-]*")  # momatch's own runs are never on the hub
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_config.json", "pytorch_lora_weights.bin")
BUILDER = re.compile(r"[\w.]+:\w+")


def load_teacher(
    source: str | Path,
    null_label: int | None = None,
    size: int | Sequence[int] | None = None,
    scheduler: str | Path | None = None,
    family: str = "",
    adapter: str | Path | None = None,
) -> Model:
    """Load a teacher.

    Args:
        source: "digits" for the one that ships with the package; the folder of a model, or of a run that
            trained one; the folder of a diffusers pipeline, of a diffusers model with its scheduler, or of a
            checkpoint of diffusers' training scripts in the folder of their pipeline; the name of one on the
            Hugging Face hub, "organisation/name"; a single .safetensors of weights, in diffusers' layout or
            the original one, with `scheduler`; or "package.module:function", whose call gives a
            `momatch.Model`.
        null_label: the label that stands for "no class" in a diffusers UNet2DModel; it can then be guided.
        size: side of what a diffusers teacher makes, if not what its files say; of videos (frames, height,
            width). Latents count where it makes latents.
        scheduler: the folder with the scheduler_config.json that a diffusers teacher was trained with, if its
            own has none; of a single file the folder of a pipeline of its kind, whose configs are its own.
        family: where the record of its network's class is, "package.module:NAME", if momatch has none.
        adapter: the folder of a LoRA adapter that is merged into a diffusers teacher.

    Raises:
        UsageError: if there is no usable model, its weights are not all finite, or something about it has to
            be told.
    """
    as_path(source, "a teacher")
    source = _snapshot(source)
    text, path = str(source), Path(source)
    _refuse_other_kinds(path, scheduler)
    if path.is_file() and scheduler is not None:
        home = Path(scheduler)
        return _finite(diffusers.load(home, null_label, size, None, None, family, adapter, path), source)
    if not path.exists() and BUILDER.fullmatch(text):
        model = _built(text)
    elif path.is_dir() and not (path / "model.json").is_file() and diffusers.is_folder(path):
        return _finite(diffusers.load(path, null_label, size, None, scheduler, family, adapter), source)
    elif not path.parent.is_dir() and isinstance(source, str) and HUB_NAME.fullmatch(text):
        found = diffusers.load(diffusers.from_hub(text), null_label, size, text, scheduler, family, adapter)
        return _finite(found, source)
    else:
        model = _own_teacher(source)
    if null_label is not None or size is not None or scheduler is not None or family or adapter:
        raise UsageError(
            f"null_label, size, scheduler, family and adapter are for teachers of diffusers; {source} is none"
        )
    return _finite(model, source)


def load_student(source: str | Path) -> Student:
    """Load a student from its folder or from its run's folder.

    Raises:
        ModelError: if there is no usable model, or it is no student.
    """
    model = _finite(_from_run(as_path(source, "a student"), "student"), source)
    if not isinstance(model, Student):
        raise ModelError(f"{source} holds a teacher, not a student; give the folder of a distillation run")
    return model


def load_any(
    source: str | Path, null_label: int | None = None, size: int | Sequence[int] | None = None
) -> Model:
    """Load whatever model a run ended with, its student or its teacher; or a teacher from elsewhere.

    Raises:
        UsageError: as `load_teacher`.
    """
    path = Path(source)
    outside = diffusers.is_folder(path) if path.is_dir() else not path.exists()
    if outside and not (path / "model.json").is_file():
        return load_teacher(source, null_label, size)
    if str(source) == "digits":
        return _own_teacher("digits")
    folder = RunFolder(path)
    model = _from_run(path, "student" if folder.model("student").is_dir() else folder.role)
    return _finite(model, source)


def teacher_of_student(student: Model) -> Model:
    """The teacher that a student was distilled from, loaded as it was then.

    Raises:
        UsageError: if the student does not say which one, or it cannot be loaded.
    """
    if student.provenance.teacher is None:
        raise ModelError(
            "this student does not say which teacher it was distilled from (info.teacher in its model.json); "
            "leave the teacher out, or write its folder there"
        )
    config = student.provenance.config
    null_label = int(config.get("null_label", -1))
    return load_teacher(
        student.provenance.teacher,
        null_label if null_label >= 0 else None,
        config.get("teacher_sides") or int(config.get("teacher_size", 0)) or None,
        config.get("scheduler") or None,
        config.get("teacher_family", ""),
        config.get("teacher_adapter") or None,
    )


def _snapshot(source: str | Path) -> str | Path:
    """The files themselves, if the source is a repository's folder in the hub's cache."""
    found = sorted(Path(source, "snapshots").glob("*/"))
    current = Path(source, "refs", "main")
    if current.is_file() and Path(source, "snapshots", current.read_text().strip()).is_dir():
        return Path(source, "snapshots", current.read_text().strip())
    return found[0] if len(found) == 1 and Path(source, "blobs").is_dir() else source


def _refuse_other_kinds(path: Path, scheduler: str | Path | None) -> None:
    """Refuse what holds weights and is no model's folder, nor a file whose configs are known.

    Raises:
        ModelError: saying how to make one of it.
    """
    if path.is_file() and path.suffix in SINGLE_FILES:
        known = scheduler is not None and diffusers.is_folder(Path(scheduler))
        if not known or path.suffix != ".safetensors":
            beside = (
                "name the folder of a diffusers pipeline of its kind, for its configs: --scheduler FOLDER; "
            )
            raise ModelError(
                f"{path} is a single file of weights; {beside if path.suffix == '.safetensors' else ''}"
                "make a pipeline's folder of it: in Python "
                f"diffusers.StableDiffusionPipeline.from_single_file('{path}').save_pretrained(FOLDER)"
            )
    adapter = next((name for name in ADAPTERS if (path / name).is_file()), None)
    if adapter and not (path / "model.json").is_file() and not diffusers.is_folder(path):
        raise ModelError(
            f"{path} is an adapter ({adapter}), not a model; give its base model as the teacher, and "
            f"the adapter beside it: --teacher-adapter {path}, or load_teacher(…, adapter=…)"
        )


def _finite(model: Model, source: str | Path) -> Model:
    """The model, if all its numbers are finite.

    Raises:
        ModelError: naming a tensor that has others.
    """
    for name, tensor in model.denoiser.network.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"the weights of {source} are damaged: {count:,} of the {tensor.numel():,} numbers of "
                f"{name.removeprefix('model.')} are NaN or infinite; take an earlier checkpoint, or "
                "one saved in float32"
            )
    return model


def _built(builder: str) -> Model:
    model = custom.call(builder)
    if not isinstance(model, Model):
        raise UsageError(f"{builder} returned {type(model).__name__}; it must return a momatch.Model")
    origin = replace(model.provenance, role=model.provenance.role or "teacher")
    return replace(model, network=CustomConfig(builder), provenance=origin)


def _own_teacher(source: str | Path) -> Model:
    """One that momatch made: shipped with the package, or in a folder."""
    if str(source) == "digits":
        return load_model(ASSETS / "digits-teacher")
    return _from_run(Path(source), "teacher")


def _from_run(path: Path, part: str) -> Model:
    if (path / "model.json").is_file():
        return load_model(path)
    if part == "student" and (path / "teacher" / "model.json").is_file():
        raise ModelError(
            f"{path} holds a teacher, not a student; distil one: momatch distill RECIPE --teacher {path}"
        )
    if part == "teacher" and (path / "student" / "model.json").is_file():
        raise ModelError(
            f"the run {path} has a student and no teacher; give {path / 'student'} to use that as a teacher"
        )
    if RunFolder(path).exists and not (path / part / "model.json").is_file():
        raise ModelError(
            f"the run {path} has no {part} yet; to finish it, run the command again that began it"
        )
    return load_model(path / part if (path / part).is_dir() else path)
