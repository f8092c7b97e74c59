"""Captions of prepared data: kept in a JSON list beside each shard, read when first asked for."""

from __future__ import annotations

import copy
import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from torch import Tensor

from momatch.data.image_io import DataError


class Captions(Sequence[str]):
    """N texts in files.

    Args:
        files: in order, a JSON list each.
        counts: texts in each.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]):
        self.files = list(files)
        self._ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self._index: Tensor | None = None
        self._read: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) if self._index is None else len(self._index)

    @overload
    def __getitem__(self, wanted: int) -> str: ...
    @overload
    def __getitem__(self, wanted: slice) -> list[str]: ...
    def __getitem__(self, wanted: int | slice) -> str | list[str]:
        """One caption, or a list of them."""
        if isinstance(wanted, slice):
            return [self[i] for i in range(*wanted.indices(len(self)))]
        if not -len(self) <= wanted < len(self):
            raise IndexError(wanted)
        wanted %= len(self)
        i = wanted if self._index is None else int(self._index[wanted])
        shard = bisect_right(self._ends, i)
        return self._texts(shard)[i - (self._ends[shard - 1] if shard else 0)]

    def subset(self, index: Tensor) -> Captions:
        """Those at `index` (M,) int64."""
        other = copy.copy(self)
        other._index = index if self._index is None else self._index[index]
        return other

    def _texts(self, shard: int) -> list[str]:
        if shard not in self._read:
            count = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
            try:
                texts = json.loads(self.files[shard].read_text())
                if len(texts) != count:
                    raise ValueError(f"{len(texts)} texts for {count} samples")
            except (OSError, ValueError, TypeError) as error:
                raise DataError(
                    f"the captions {self.files[shard]} are missing or damaged ({error}); delete the shard "
                    "beside them and run momatch prepare again"
                ) from None
            self._read[shard] = texts
        return self._read[shard]


def take_captions(captions: Sequence[str] | None, index: Tensor) -> Sequence[str] | None:
    """The captions at `index` (M,) int64."""
    if captions is None:
        return None
    if isinstance(captions, Captions):
        return captions.subset(index)
    return [captions[int(i)] for i in index]
