"""Text encoders of text-conditional models. Nothing here yet: no model takes text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from momatch.model import Model


class TextEncoder(Protocol):
    """Prompts to what a network is asked with."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """A tensor (B, …) for each condition."""
        ...


def text_encoder_of(model: Model) -> TextEncoder | None:
    """The text encoder of a model; None for one that takes no text."""
    return None
