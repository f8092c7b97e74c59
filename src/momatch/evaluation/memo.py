"""What measuring one set of samples leaves for the next: all that depends on the real images alone.

A bootstrap, a jackknife and a subset shuffle real and generated features with one generator, in turn. So what
they do to the real ones depends on the samples too, but only on their number: a generator is used alike for
any features of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Memo:
    """Results of one reference (and training set), on one extractor: of each kind the latest."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Hashable, Any]] = {}

    def recall(self, kind: str, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of that kind if it was computed for that `key`; else it is computed, and replaced."""
        if kind not in self._known or self._known[kind][0] != key:
            self._known[kind] = key, compute()
        return self._known[kind][1]


def circumstances(generated: Tensor, generator: torch.Generator) -> tuple[tuple[int, ...], bytes]:
    """All that the real side depends on of the samples: their shape, and the generator's state."""
    return tuple(generated.shape), generator.get_state().numpy().tobytes()
