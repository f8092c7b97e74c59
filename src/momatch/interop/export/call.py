"""One network call of a student, and its sampler as numbers: what ONNX and torch.export share.

DIR/
  model.pt2       (z, logsnr, time, conditions) → x: the whole denoiser, its scale included; also told its
                  steps, if it is made for several numbers. torch.export.load("model.pt2").module() is called
                  so; momatch is not needed
  sampler.json    logSNR and network's time of each call, and the coefficients of the steps between

Sampling: z is noise; for every call, x = model(z, logsnr, time); if it was not the last,
z = z_coefficient · z + x_coefficient · x + noise_std · noise. The last x is the sample.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond
from momatch.diffusion.process import step_coefficients
from momatch.diffusion.sampling import time_grid
from momatch.models.model import NULL_CONDITION, Model
from momatch.utils.errors import UsageError
from momatch.utils.files import write_atomically

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 8  # of the inputs that the network is traced with; both stay open


def export_program(model: Model, directory: Path) -> None:
    """Write model.pt2 and sampler.json into `directory`; null-condition.safetensors for embedded prompts.

    Raises:
        UsageError: if the model is guided or clipped.
    """
    names, inputs, shapes, network = network_call(model)
    # As open as the network is: upsampling of diffusers takes another way from 64 samples on.
    sides = tuple(dict.fromkeys(shape, torch.export.Dim.AUTO) for shape in shapes)
    directory.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.export.export(network, inputs, dynamic_shapes=(sides,), strict=False)
    write_atomically(directory / "model.pt2", lambda path: torch.export.save(program, path))
    write_beside(model, directory, names)


def network_call(
    model: Model,
) -> tuple[list[str], tuple[Tensor, ...], tuple[dict[int, Any], ...], nn.Module]:
    """Names of the inputs of a call, examples, which of their sides stay open, and the module to trace.

    Raises:
        UsageError: if the model is guided or clipped.
    """
    if model.denoiser.unwrapped is not model.denoiser:
        raise UsageError("a guided or clipped model cannot be exported; export the plain one")
    names, inputs, shapes = _inputs(model)
    denoiser = copy.deepcopy(model.denoiser).cpu()
    for parameter in denoiser.parameters():  # views into one buffer, channels last
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return names, inputs, shapes, _Call(denoiser, names[3:]).eval()


def write_beside(model: Model, directory: Path, names: list[str]) -> None:
    """sampler.json, and the null condition of models that are asked with embedded prompts."""
    nulls = {k: v.contiguous() for k, v in model.denoiser.null_values.items() if isinstance(v, Tensor)}
    if nulls:
        write_atomically(directory / NULL_CONDITION, lambda path: save_file(nulls, str(path)))
    contents = json.dumps({"inputs": names, **sampler(model)}, indent=1) + "\n"
    write_atomically(directory / "sampler.json", lambda path: path.write_text(contents))


def sampler(model: Model) -> dict[str, Any]:
    """What a sampling loop has to know; JSON types only. Step i lies between calls i and i + 1.

    The network of a student made for several numbers of steps has an input "steps"; the grids of the other
    numbers are "other_grids".
    """
    nulls = {k: v for k, v in model.denoiser.null_values.items() if not isinstance(v, Tensor)}
    others = [_grid(model, k) for k in model.step_counts if k != model.steps]
    return {
        **_grid(model, model.steps),
        "sample_shape": list(model.sample_shape),
        "num_classes": model.num_classes,
        "conditions": {name: list(shape) for name, shape in model.cond_shapes.items()},
        "null_values": nulls,
        "text_encoder": model.provenance.encoder,
        **({"other_grids": others} if others else {}),
    }


def _grid(model: Model, steps: int) -> dict[str, Any]:
    """Noise levels of so many calls, and the coefficients of the steps between them."""
    logsnr = model.schedule(time_grid(steps))
    of_z, of_x, std = (c[:-1].tolist() for c in step_coefficients(logsnr[1:], logsnr[:-1], eta=1.0))
    between = [
        {"z_coefficient": a, "x_coefficient": b, "noise_std": c}
        for a, b, c in zip(of_z, of_x, std, strict=True)
    ]
    return {
        "steps": steps,
        "logsnr": logsnr[:-1].tolist(),
        "time": model.denoiser.time.to_time(logsnr[:-1]).tolist(),
        "between": between,
    }


class _Call(nn.Module):
    """The denoiser, its conditions given one by one instead of in a dict."""

    def __init__(self, denoiser: Denoiser, names: list[str]):
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *inputs: Tensor) -> Tensor:
        z, logsnr, time, *conditions = inputs
        cond: Cond | None = dict(zip(self.names, conditions, strict=True)) or None
        return self.denoiser.in_range(self.denoiser.estimate(z, logsnr, time, cond))


def _inputs(model: Model) -> tuple[list[str], tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Names of the inputs, an example of each, and which of their sides stay open."""
    batch = torch.export.Dim("batch")
    names = ["z", "logsnr", "time"]
    zeros = torch.zeros(EXAMPLE_BATCH)
    inputs = [torch.randn(EXAMPLE_BATCH, *model.sample_shape), zeros, zeros.clone()]
    shapes: list[dict[int, Any]] = [{0: batch}, {0: batch}, {0: batch}]
    if model.num_classes:
        names.append("label")
        inputs.append(torch.zeros(EXAMPLE_BATCH, dtype=torch.int64))
        shapes.append({0: batch})
    if len(model.step_counts) > 1:
        names.append("steps")
        inputs.append(torch.ones(EXAMPLE_BATCH))
        shapes.append({0: batch})
    for name, shape in model.cond_shapes.items():
        names.append(name)
        sides = [EXAMPLE_LENGTH if side == -1 else side for side in shape]
        null = model.denoiser.null_values.get(
            name
        )  # of the type that it is asked with: a mask is whole numbers
        dtype = null.dtype if isinstance(null, Tensor) else torch.float32
        inputs.append(torch.ones(EXAMPLE_BATCH, *sides, dtype=dtype))
        lengths = {i + 1: torch.export.Dim("length") for i, side in enumerate(shape) if side == -1}
        shapes.append({0: batch, **lengths})
    return names, tuple(inputs), tuple(shapes)
