"""In what precision networks compute. Weights, and what stands around a network, are float32 in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, a GPU's convolutions and matrix products may, or may not, round what they multiply to 10 bits.

    By themselves torch's convolutions do, its matrix products do not; here both do as they are told.
    """
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was
