"""The model card: what the student is, how to use it, what it scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from momatch import __version__
from momatch.data.emoji import TEXT_ENCODER
from momatch.interop.text_encoders import WHOLE
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig
from momatch.utils.errors import UsageError
from momatch.utils.run_folder import RunFolder
from momatch.utils.text import alternatives

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CALLS = {  # what a pipeline is called with beside the number of steps; guidance is in the student already
    "DDPMPipeline": "batch_size=4, ",
    "DiTPipeline": "class_labels=[0, 1, 2, 3], guidance_scale=1.0, ",
    "LDMPipeline": "batch_size=4, ",
    "FluxPipeline": '"a red heart", ',
}
TEXT_CALL = '"a red heart", guidance_scale=1.0, '
OURS = "moment_matching_pipeline"
TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"
REASONS = {
    "scheduler/moment_matching_scheduler.py": ", since no sampler of diffusers takes this student's steps",
    "unet/moment_matching_network.py": ", since diffusers has no class for its network",
}
EXAMPLE_LENGTH = 8  # tokens of a caption in the snippet, where any number will do


def render(
    model: Model,
    name: str,
    pipeline_class: str,
    code: list[str],
    licence: str | None,
    pipeline: Path | None,
    run: Path | None,
    decodes: bool,
) -> str:
    """The card's text.

    Args:
        model: the student.
        name: what `from_pretrained` is given.
        pipeline_class: of the folder.
        code: the folder's own files of Python, if diffusers' classes do not suffice.
        licence: of the student; the teacher's if None.
        pipeline: the teacher's pipeline, whose card may name a licence.
        run: the run's folder.
        decodes: whether the folder holds an autoencoder, of whose latents samples are.
    """
    from jinja2 import Environment, StrictUndefined

    origin = model.provenance
    config = origin.config
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    from_diffusers = isinstance(model.network, DiffusersConfig)
    source = (from_diffusers and origin.pipeline) or origin.teacher or "unknown"
    text = _text(model) if pipeline_class == OURS else None
    return environment.from_string(TEMPLATE.read_text()).render(
        name=name,
        title=Path(name).name,
        steps=model.steps,
        counts=alternatives(model.step_counts) if len(model.step_counts) > 1 else None,
        shape=model.sample_shape,
        teacher=_short(source),
        base_model=source if from_diffusers and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None,
        data=_short(origin.data or "unknown"),
        classes=[_short(name) for name in origin.class_names],
        method=_method(config),
        extended_at=config.get("train", {}).get("extended_at", []),
        num_steps=config.get("train", {}).get("num_steps", 0),
        guidance=config.get("guidance", {}).get("scale", 0.0),
        licence=licence or _licence(pipeline) or "unknown",
        code=code,
        reasons=REASONS,
        text=text,
        call=_own_call(model, decodes) if pipeline_class == OURS else CALLS.get(pipeline_class, TEXT_CALL),
        latent=origin.latent or decodes,
        rows=_rows(run),
        version=__version__,
    )


def _method(config: Mapping[str, Any]) -> str:
    """Its name; configs of earlier versions hold nothing else."""
    found = config.get("method", "unknown")
    return str(found.get("name") if isinstance(found, dict) else found)


def _own_call(model: Model, decodes: bool) -> str:
    """What our own pipeline is called with."""
    count = min(model.num_classes, 4) or 4
    call = f"class_labels={list(range(count))}, " if model.num_classes else ""
    if TOKENS in model.cond_shapes:
        call += f"{TOKENS}=tokens, {MASK}=mask, " if MASK in model.cond_shapes else f"{TOKENS}=tokens, "
    if not decodes and model.sample_shape[0] not in (1, 3):  # no picture
        return (call or "batch_size=4, ") + 'output_type="latent", '
    return call or "batch_size=4, "


def _short(source: str) -> str:
    """Without the folders of this machine, and without what Markdown or HTML would take for a mark."""
    name = Path(source).name if Path(source).is_absolute() else source
    return re.sub(r"[`<>|\s]+", " ", name)


def _text(model: Model) -> dict[str, Any] | None:
    """Of the student's text: the shape of the snippet's example, and where tokens come from."""
    if TOKENS not in model.cond_shapes:
        return None
    length, width = model.cond_shapes[TOKENS]
    return {
        "shape": (min(model.num_classes, 4) or 4, EXAMPLE_LENGTH if length == -1 else length, width),
        "width": width,
        "masked": MASK in model.cond_shapes,
        "encoder": _short(model.provenance.encoder or ""),
        "ours": model.provenance.text_encoder in (TEXT_ENCODER, WHOLE),
        "null": TOKENS in model.denoiser.null_values,
    }


def _licence(pipeline: Path | None) -> str | None:
    """What the teacher's card says."""
    path = pipeline / "README.md" if pipeline else None
    if path is None or not path.is_file():
        return None
    header = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace"), re.S)
    found = re.search(r"^license:\s*(\S+)", header.group(1), re.M) if header else None
    return found.group(1) if found else None


def _rows(run: Path | None) -> list[dict[str, Any]]:
    """The Fréchet distances of evaluation.json, one row for each model, step count and kind of features."""
    path = RunFolder(run).evaluation if run else None
    if path is None or not path.is_file():
        return []
    found = []
    try:
        for row in json.loads(path.read_text())["rows"]:
            for m in row["result"]["measurements"]:
                if m["metric"] == "frechet":
                    found.append({"name": row["name"], "steps": row["steps"], "m": m})
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{path} cannot be read; evaluate again: momatch evaluate {run}") from None
    return found
