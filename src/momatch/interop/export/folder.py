"""A student as a folder that `DiffusionPipeline.from_pretrained` opens.

DIR/
  model_index.json     the pipeline: the teacher's class, and where its parts are
  unet/ transformer/   the student's network, as diffusers saves it; momatch's own with its code beside it
  scheduler/           its sampler, its step count and its noise levels
  vae/ tokenizer/ …    the teacher's other parts, copied
  README.md            the model card
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from momatch.interop.export import card, noise, standalone
from momatch.interop.pipelines import AUTOENCODERS, DENOISERS, MODEL_INDEX, components, import_diffusers
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig, UNetConfig, UViTConfig
from momatch.utils.errors import UsageError
from momatch.utils.files import write_atomically

PLAIN_PIPELINE = "DDPMPipeline"  # passes noise of variance 1 to a UNet2DModel, and nothing else
OURS = Path(__file__).with_name("moment_matching_pipeline.py")
OWN_PIPELINE = ("UNet2DModel", "UNet1DModel")  # need no other parts; our pipeline calls them
MARK = "momatch-export.json"  # names what an export wrote into a folder: a later one may replace that alone


def check_sampler(model: Model) -> None:
    """Refuse a student whose sampler is not the one that exports carry.

    Raises:
        UsageError: if it is sampled otherwise in more than one step, or makes tokens.
    """
    if model.of_tokens:
        raise UsageError(
            "this student makes tokens, which neither diffusers nor an exported sampler knows; keep its "
            "folder as it is: momatch.load_student opens it, vocabulary included"
        )
    if model.sampler != "ancestral" and model.steps > 1:  # in one step all samplers are the same
        raise UsageError(
            f"this student is sampled by {model.sampler}, and exports carry the ancestral sampler alone; "
            "keep it as it is: momatch.load_student opens it"
        )


def export_folder(model: Model, directory: Path, name: str, licence: str | None, run: Path | None) -> None:
    """Write the folder; a former export there is replaced.

    Args:
        model: the student.
        directory: where.
        name: how the card's snippet calls it: the folder, or its name on the hub.
        licence: of the student; the teacher's if None.
        run: the run's folder, for the figures of its evaluation.

    Raises:
        UsageError: if the student's network cannot travel, or the folder holds something else.
    """
    network = model.network
    if not isinstance(network, DiffusersConfig | UNetConfig | UViTConfig):
        raise UsageError(
            f"this student's network has the shape {type(network).__name__}, for which "
            "diffusers has no class; use --format onnx, or keep it as it is: momatch.load_student opens it"
        )
    diffusers, scheduler = import_diffusers(), noise.sampler(model)
    index: dict[str, Any] = {"_diffusers_version": diffusers.__version__}
    if isinstance(network, DiffusersConfig):
        pipeline = pipeline_folder(model)
        kind, part = _pipeline_class(model, network, pipeline, noise.is_stock(scheduler))
        claim(directory)
        _save_network(model, directory / part)
        index |= _copy_parts(pipeline, directory) if pipeline else {}
        index[part] = ["diffusers", network.class_name]
    else:
        pipeline, kind = pipeline_folder(model), OURS.stem
        claim(directory)
        index["unet"] = standalone.save(model, directory / "unet")
        index |= _copy_autoencoder(pipeline, directory) if pipeline else {}
    index |= {"_class_name": kind, "scheduler": noise.write(scheduler, directory)}
    if kind == OURS.stem:
        shutil.copyfile(OURS, directory / OURS.name)
        null_label = model.denoiser.null_values.get("label")
        index |= {"_class_name": [kind, "MomentMatchingPipeline"], "steps": model.steps}
        index["null_label"] = null_label
        if len(model.step_counts) > 1:
            index["told_steps"] = True
    contents = json.dumps(index, indent=2) + "\n"
    write_atomically(directory / MODEL_INDEX, lambda path: path.write_text(contents))
    text = card.render(model, name, kind, _code(directory), licence, pipeline, run, "vae" in index)
    write_atomically(directory / "README.md", lambda path: path.write_text(text))
    mark(directory)


def claim(directory: Path) -> None:
    """Make `directory` an empty folder for an export; what a former one wrote is removed.

    Raises:
        UsageError: if it holds something that no export wrote.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; choose another folder to export to")
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    former = _former(directory / MARK)
    if found and not former:
        raise UsageError(f"{directory} is not empty and no former export; choose another folder")
    if found - former:
        raise UsageError(
            f"{directory} holds {min(found - former)}, which no export wrote; choose another folder"
        )
    try:
        if found:
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {directory}: {error.strerror}; choose another folder") from None


def mark(directory: Path) -> None:
    """Note what the export wrote, so that a later one may replace it."""
    names = sorted({*(path.name for path in directory.iterdir()), MARK})
    contents = json.dumps({"made_by": "momatch export", "files": names}, indent=1) + "\n"
    write_atomically(directory / MARK, lambda path: path.write_text(contents))


def _former(path: Path) -> set[str]:
    """What a former export says that it wrote."""
    try:
        return set(json.loads(path.read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def pipeline_folder(model: Model) -> Path | None:
    """The folder of the teacher's pipeline, fetched if it came from the hub; None if it had none."""
    source = model.provenance.pipeline
    if source is None:
        return None
    path = Path(source)
    if not path.exists() and not path.is_absolute():
        from huggingface_hub import snapshot_download

        left_out = [f"{part}/*" for part in DENOISERS] + ["*.bin", "*.ckpt", "*.pt", "*.onnx*", "*.msgpack"]
        path = Path(snapshot_download(str(source), ignore_patterns=left_out))
    if not path.is_dir():
        raise UsageError(
            f"the teacher's pipeline {source} is gone; put it back there: its other parts are copied from it"
        )
    return path if (path / MODEL_INDEX).is_file() else None


def _pipeline_class(
    model: Model, network: DiffusersConfig, pipeline: Path | None, stock: bool
) -> tuple[str, str]:
    """The pipeline's class (or our file's name), and the name that it gives the network."""
    encoded = pipeline is not None and any(components(pipeline).get(name) for name in AUTOENCODERS)
    if network.class_name in OWN_PIPELINE and not encoded:
        plain = stock and not model.num_classes and network.class_name == "UNet2DModel"
        return (PLAIN_PIPELINE if plain else OURS.stem), "unet"
    if pipeline is None:
        raise UsageError(
            f"a {network.class_name} needs the other parts of a pipeline (autoencoder, text encoder), and "
            "its teacher was loaded without one; distil one from a pipeline's folder, or use --format onnx"
        )
    found = components(pipeline)
    part = next((name for name in DENOISERS if found.get(name)), None)
    if part is None:
        raise UsageError(f"the pipeline {pipeline} has none of {', '.join(DENOISERS)}")
    return str(found["_class_name"]), part


def _copy_autoencoder(pipeline: Path, directory: Path) -> dict[str, Any]:
    """Copy the pipeline's as vae/, if it has one; returns its entry of model_index.json."""
    index = json.loads((pipeline / MODEL_INDEX).read_text())
    name = next((name for name in AUTOENCODERS if (pipeline / name).is_dir()), None)
    if name is None:
        return {}
    shutil.copytree(pipeline / name, directory / "vae")
    return {"vae": index[name]}


def _code(directory: Path) -> list[str]:
    """The files of Python that travel along."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.py"))


def _save_network(model: Model, directory: Path) -> None:
    """By diffusers' own save_pretrained, its size that of the student's samples."""
    network: Any = model.denoiser.network
    sides = model.sample_shape[1:]
    size = sides[0] if len(set(sides)) == 1 else list(sides)
    # Networks of patches have their positions from the size that they were made for.
    if network.family.sized and network.model.config.sample_size != size:
        network.model.register_to_config(sample_size=size)
    network.model.save_pretrained(directory, safe_serialization=True)


def _copy_parts(pipeline: Path, directory: Path) -> dict[str, Any]:
    """Copy what is neither network nor sampler; returns the entries of model_index.json, options included."""
    index = json.loads((pipeline / MODEL_INDEX).read_text())
    kept = {k: v for k, v in index.items() if not k.startswith("_") and k not in (*DENOISERS, "scheduler")}
    for name in kept:
        if (pipeline / name).is_dir():
            shutil.copytree(pipeline / name, directory / name)
    return kept
