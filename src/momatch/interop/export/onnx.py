"""One network call of a student as ONNX, model.onnx; what it takes and what lies beside it: see `call`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from momatch.interop.export.call import network_call, write_beside
from momatch.models.model import Model
from momatch.utils.errors import UsageError
from momatch.utils.files import write_atomically

# What torch's exporter says about its own insides, whatever it exports.
EXPORTER_LOG, EXPORTER_REMARK = "torch.onnx._internal.exporter._registration", "torchvision is not installed"
EXPORTER_WARNINGS: list[tuple[str, type[Warning]]] = [
    ("", DeprecationWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    (r"# The axis name: \w+ will not be used, since it shares", UserWarning),
]


def export_onnx(model: Model, directory: Path) -> None:
    """Write model.onnx and sampler.json into `directory`; null-condition.safetensors for embedded prompts.

    Raises:
        UsageError: if a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'momatch[onnx]'") from None
    names, inputs, shapes, network = network_call(model)
    directory.mkdir(parents=True, exist_ok=True)
    with quiet():
        program: Any = torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=["x"],
            dynamic_shapes=(shapes,),
            custom_translation_table={torch.ops.aten.sigmoid.default: _sigmoid()},
            verbose=False,
        )
    write_atomically(directory / "model.onnx", lambda path: program.save(str(path)))
    write_beside(model, directory, names)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the known remarks of torch's exporter; whatever else it says is heard."""

    def unknown(record: logging.LogRecord) -> bool:
        return EXPORTER_REMARK not in record.getMessage()

    log = logging.getLogger(EXPORTER_LOG)
    log.addFilter(unknown)
    try:
        with warnings.catch_warnings():
            for message, category in EXPORTER_WARNINGS:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        log.removeFilter(unknown)


def _sigmoid() -> Any:
    """1/(1 + e^−x) in ONNX's own words: onnxruntime's Sigmoid is wrong by percents at −15, and α needs it."""
    from onnxscript import opset18

    op: Any = opset18  # its types know no Any

    def sigmoid(x: Any) -> Any:
        return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.Constant(value_float=1.0)))

    return sigmoid
