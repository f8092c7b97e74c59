"""Encoded captions, several for each picture."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from momatch.data.rows import Rows


class Wordings(Rows):
    """Token vectors of N pictures' captions, or the mask of what is a token; stored packed, as int8.

    Indexing gives each picture's first wording; `draw` gives any.

    Args:
        tokens: (T, D) int8, all tokens of all wordings one after another: (picture, wording, token).
        counts: (N, V) tokens of each wording.
        scale: float32 value of one int8 level.
        length: L, to which rows are padded with zeros; what is longer is cut.
        part: "tokens" gives (B, L, D) float32, "mask" gives (B, L) int64, 1 for a token and 0 for padding.
    """

    def __init__(
        self, tokens: Tensor, counts: Tensor, scale: float, length: int, part: Literal["tokens", "mask"]
    ):
        self._tokens, self._counts, self._scale = tokens, counts, scale
        self._length, self._part = length, part
        self._starts = counts.flatten().cumsum(0).roll(1).reshape(counts.shape)
        self._starts[0, 0] = 0
        self.dtype = torch.float32 if part == "tokens" else torch.int64
        self._row_shape = (length, tokens.shape[1]) if part == "tokens" else (length,)

    def draw(self, index: Tensor, u: Tensor) -> Tensor:
        """The rows at `index` (B,), each in the wording that u (B,) in [0, 1) picks."""
        wording = (u * self._counts.shape[1]).long()
        return self._worded(index if self.index is None else self.index[index], wording)

    @property
    def held_bytes(self) -> int:
        """The packed tokens; the mask shares them."""
        return self._tokens.untyped_storage().nbytes() if self._part == "tokens" else 0

    def evidence(self) -> Tensor | Rows:
        """All rows, in their first wording."""
        return self

    def _stored(self) -> int:
        return len(self._counts)

    def _read(self, index: Tensor) -> Tensor:
        return self._worded(index, torch.zeros_like(index))

    def _worded(self, index: Tensor, wording: Tensor) -> Tensor:
        place = torch.arange(self._length)
        mask = place < self._counts[index, wording][:, None]
        if self._part == "mask":
            return mask.long()
        where = (self._starts[index, wording][:, None] + place).clamp(max=len(self._tokens) - 1)
        return self._tokens[where].float() * self._scale * mask[:, :, None]
