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
    """Results by what they depend on; of one reference (and training set), on one extractor."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def recall(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What is known under `key`; computed the first time."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def circumstances(generated: Tensor, generator: torch.Generator) -> tuple[tuple[int, ...], bytes]:
    """All that the real side depends on of the samples: their shape, and the generator's state."""
    return tuple(generated.shape), generator.get_state().numpy().tobytes()
