"""The model card: what the student is, how to use it, what it scored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from momatch import __version__
from momatch.evaluation.sweep import Row
from momatch.model import Model

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CALLS = {  # what a pipeline is called with beside the number of steps; guidance is in the student already
    "DDPMPipeline": "batch_size=4, ",
    "moment_matching_pipeline": "batch_size=4, ",
    "DiTPipeline": "class_labels=[0, 1, 2, 3], guidance_scale=1.0, ",
    "LDMPipeline": "batch_size=4, ",
    "FluxPipeline": '"a red heart", ',
}
TEXT_CALL = '"a red heart", guidance_scale=1.0, '


def render(
    model: Model,
    name: str,
    pipeline_class: str,
    stock: bool,
    licence: str | None,
    pipeline: Path | None,
    run: Path | None,
) -> str:
    """The card's text.

    Args:
        model: the student.
        name: what `from_pretrained` is given.
        pipeline_class: of the folder.
        stock: whether diffusers' own classes suffice.
        licence: of the student; the teacher's if None.
        pipeline: the teacher's pipeline, whose card may name a licence.
        run: the run's folder.
    """
    from jinja2 import Environment, StrictUndefined

    config = model.info.get("config", {})
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    source = str(model.info.get("pipeline") or model.info.get("teacher", "unknown"))
    return environment.from_string(TEMPLATE.read_text()).render(
        name=name,
        title=Path(name).name,
        steps=model.steps,
        shape=model.sample_shape,
        teacher=Path(source).name if Path(source).is_absolute() else source,
        base_model=source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None,
        data=model.info.get("data", "unknown"),
        method=config.get("method", "unknown"),
        guidance=config.get("guidance", {}).get("scale", 0.0),
        licence=licence or _licence(pipeline) or "unknown",
        trust=not stock or pipeline_class == "moment_matching_pipeline",
        own_sampler=not stock,
        call=f"class_labels={list(range(min(model.num_classes, 4)))}, "
        if pipeline_class == "moment_matching_pipeline" and model.num_classes
        else CALLS.get(pipeline_class, TEXT_CALL),
        latent=bool(model.info.get("vae")),
        rows=_rows(run),
        version=__version__,
    )


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
    path = run / "evaluation.json" if run else None
    if path is None or not path.is_file():
        return []
    found = []
    for fields in json.loads(path.read_text())["rows"]:
        row = Row.from_dict(fields)
        for m in row.result.measurements:
            if m.metric == "frechet":
                found.append({"name": row.name, "steps": row.steps, "m": m})
    return found
