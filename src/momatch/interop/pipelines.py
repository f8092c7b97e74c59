"""A diffusers pipeline's folder, seen from outside: its parts, what tells it from others, its encoders."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from momatch.utils.errors import UsageError
from momatch.utils.text import first_line

MODEL_INDEX = "model_index.json"
DENOISERS = ("unet", "transformer", "prior")
AUTOENCODERS = ("vae", "vqvae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
WEIGHTS = {".safetensors", ".bin"}
SAMPLED_BYTES = 2**20  # of either end of a file of weights, for a fingerprint


def import_diffusers() -> Any:
    """The library.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import diffusers
        import transformers  # noqa: F401 (pipelines with text encoders need it)
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'momatch[diffusers]'") from None
    return diffusers


def components(pipeline: str | Path) -> dict[str, str | None]:
    """The parts of a pipeline by name, with the class of each, None where the part was left out.

    Its own class is under "_class_name".

    Raises:
        UsageError: if the folder holds no pipeline.
    """
    path = Path(pipeline, MODEL_INDEX)
    try:
        index = json.loads(path.read_text())
        parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2}
        return {"_class_name": str(index["_class_name"]), **parts}
    except FileNotFoundError:
        raise UsageError(
            f"{pipeline} is no folder of a diffusers pipeline (no {MODEL_INDEX}); download one with "
            "diffusers.DiffusionPipeline.from_pretrained(NAME).save_pretrained(FOLDER)"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}); save the pipeline again") from None


def component_config(pipeline: str | Path, name: str) -> dict[str, Any]:
    """config.json of a part; {} if it has none."""
    path = Path(pipeline, name, "config.json")
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}); save the pipeline again") from None


def denoiser_config(pipeline: str | Path) -> dict[str, Any]:
    """config.json of the network that denoises."""
    name = next((name for name in DENOISERS if Path(pipeline, name, "config.json").is_file()), "unet")
    return component_config(pipeline, name)


def encoders_fingerprint(pipeline: str | Path) -> str:
    """16 hexadecimal digits that tell a pipeline's autoencoder and text encoders from others; "" without any.

    From the configs, and the size and both ends of every file of weights: enough to tell checkpoints apart
    without reading gigabytes. The same weights in another precision count as others.
    """
    digest, any_found = hashlib.blake2b(digest_size=8), False
    for part in (*AUTOENCODERS, *TEXT_ENCODERS):
        folder = Path(pipeline, part)
        if not folder.is_dir():
            continue
        any_found = True
        config = {k: v for k, v in component_config(pipeline, part).items() if k not in _NOTES}
        digest.update(f"{part} {json.dumps(config, sort_keys=True)}".encode())
        for file in sorted(f for f in folder.iterdir() if f.suffix in WEIGHTS):
            digest.update(f"{file.name} {file.stat().st_size}".encode() + _ends(file))
    return digest.hexdigest() if any_found else ""


def load_encoders(pipeline: str | Path, device: str = "cpu") -> Any:
    """The pipeline with its autoencoder and text encoders on `device`, but without its denoiser.

    Raises:
        UsageError: if it cannot be loaded.
    """
    found, diffusers = components(pipeline), import_diffusers()
    left_out: dict[str, Any] = {
        name: None for name, kind in found.items() if kind is None or name in (*DENOISERS, *UNUSED)
    }
    try:
        with quiet():
            loaded = diffusers.DiffusionPipeline.from_pretrained(str(pipeline), **left_out)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(f"cannot load the encoders of {pipeline} ({first_line(error)})") from None
    if found["_class_name"] == "StableDiffusion3Pipeline":  # without its T5 it asks how wide embeddings are
        loaded.transformer = SimpleNamespace(config=SimpleNamespace(**denoiser_config(pipeline)))
    for name in (*AUTOENCODERS, *TEXT_ENCODERS):
        part = getattr(loaded, name, None)
        if part is not None:
            part.to(device).eval().requires_grad_(False)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of diffusers and transformers, which go to the terminal."""
    there = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name)]
    logs = [importlib.import_module(f"{name}.utils.logging") for name in there]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _ends(file: Path) -> bytes:
    with file.open("rb") as stream:
        start = stream.read(SAMPLED_BYTES)
        stream.seek(max(0, file.stat().st_size - SAMPLED_BYTES))
        return start + stream.read(SAMPLED_BYTES)


_NOTES = {"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype"}
