"""Samples one does not want in memory as float32: rows that are read, or converted, when asked for.

A `Rows` stands where a tensor (N, …) would stand: it has a length, a shape and a dtype, and gives a tensor
for the rows asked for. `rows[:]` is all of them. A subset holds indices, never a copy of rows.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from momatch.utils.errors import UsageError
from momatch.utils.files import fingerprint
from momatch.utils.text import first_line

if TYPE_CHECKING:
    from safetensors import safe_open

SAMPLED_ROWS = 32  # that a fingerprint of shards reads
CHUNK = 1024
WHOLE_FINGERPRINT = 2**28  # pixels up to which a fingerprint is that of the float32 pictures


class DamagedShardError(UsageError):
    """A shard that cannot be read; the message names it."""


class Rows(ABC):
    """N rows that become a tensor when they are asked for.

    Attributes:
        shape: (N, …), as of a tensor.
        dtype: of the tensors that indexing gives.
        index: (N,) int64, which of the rows underneath; None for all of them.
    """

    device = torch.device("cpu")
    dtype: torch.dtype
    index: Tensor | None = None
    _row_shape: tuple[int, ...]

    def __len__(self) -> int:
        return self._stored() if self.index is None else len(self.index)

    def __getitem__(self, wanted: int | slice | Tensor | tuple[Any, ...]) -> Tensor:
        """The row, or the rows, at `wanted`: an integer, a slice, (M,) int64 or bool; or a tuple."""
        if isinstance(wanted, tuple):
            first, *rest = wanted
            return self[first][tuple(rest) if isinstance(first, int) else (slice(None), *rest)]
        if isinstance(wanted, int):
            return self[torch.tensor([wanted])][0]
        if isinstance(wanted, slice):
            wanted = torch.arange(len(self))[wanted]
        elif wanted.dtype == torch.bool:
            wanted = wanted.nonzero().flatten()
        wanted = torch.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"row {int(wanted.max())} of {len(self)}")
        return self._read(wanted if self.index is None else self.index[wanted])

    def __iter__(self) -> Iterator[Tensor]:
        """One row at a time, as iterating over a tensor."""
        for part in self.chunks():
            yield from part

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """All rows, at most `size` at a time."""
        for first in range(0, len(self), size):
            yield self[first : first + size]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, …)."""
        return (len(self), *self._row_shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions, the rows' own included."""
        return len(self.shape)

    @property
    def row_bytes(self) -> int:
        """Of one row, once it is a tensor."""
        return torch.Size(self._row_shape).numel() * self.dtype.itemsize

    def subset(self, index: Tensor) -> Rows:
        """The rows at `index` (M,) int64; rows may repeat, and none is copied."""
        other = copy.copy(self)
        other.index = index if self.index is None else self.index[index]
        return other

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Memory that the rows occupy for good; what the system maps and may drop is not counted."""

    @abstractmethod
    def evidence(self) -> Tensor | Rows:
        """What a fingerprint takes for these rows: themselves, or a digest (8,) uint8 where they are many."""

    @abstractmethod
    def _stored(self) -> int: ...

    @abstractmethod
    def _read(self, index: Tensor) -> Tensor: ...


class Pixels(Rows):
    """Pictures held as uint8; indexing gives float32 in [−1, 1].

    Args:
        levels: (N, C, H, W) uint8.
    """

    dtype = torch.float32

    def __init__(self, levels: Tensor):
        self._levels, self._row_shape = levels, tuple(levels.shape[1:])

    @property
    def held_bytes(self) -> int:
        """The pixels."""
        return self._levels.untyped_storage().nbytes()

    def evidence(self) -> Tensor | Rows:
        """All pixels: as the float32 that they become, or, of many, a digest of the levels."""
        if len(self) * torch.Size(self._row_shape).numel() <= WHOLE_FINGERPRINT:
            return self
        digest = hashlib.blake2b(f"{self.shape}".encode(), digest_size=8)
        index = torch.arange(len(self)) if self.index is None else self.index
        for part in index.split(CHUNK):
            digest.update(self._levels[part].contiguous().numpy().tobytes())
        return _bytes(digest.digest())

    def _stored(self) -> int:
        return len(self._levels)

    def _read(self, index: Tensor) -> Tensor:
        return to_unit(self._levels[index])


class Shards(Rows):
    """One tensor of safetensors files, row after row; the files are mapped, not read.

    Floating point comes as float32, `pictures` as float32 in [−1, 1], everything else as stored.

    Args:
        files: in order; each is opened when a row of it is first asked for.
        counts: rows in each.
        name: of the tensor in every file.
        row_shape: of one row.
        dtype: as stored.
        pictures: uint8 levels, to be read as pictures.
    """

    def __init__(
        self,
        files: Sequence[Path],
        counts: Sequence[int],
        name: str,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        pictures: bool = False,
    ):
        self.files, self.name, self.pictures = list(files), name, pictures
        self._ends = torch.tensor(list(counts), dtype=torch.int64).cumsum(0).tolist()
        self._row_shape, self._stored_dtype = tuple(row_shape), dtype
        self.dtype = torch.float32 if pictures or dtype.is_floating_point else dtype
        self._open: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the mappings, which every process makes anew."""
        return {**self.__dict__, "_open": {}}

    @property
    def held_bytes(self) -> int:
        """0: mapped pages are the system's to drop."""
        return 0

    def evidence(self) -> Tensor:
        """A digest of the files' names, sizes and headers, and of a few rows spread over them.

        A header carries the fingerprint of what was written, if `momatch prepare` wrote it. A file changed
        afterwards in place, to the same size, is noticed only where a sampled row has changed.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{self.name} {self.shape} {self._stored_dtype}".encode())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + header(file))
        if self.index is not None:
            digest.update(fingerprint({"index": self.index}).encode())
        digest.update(fingerprint({"rows": self[spread(len(self), SAMPLED_ROWS)]}).encode())
        return _bytes(digest.digest())

    def _stored(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _read(self, index: Tensor) -> Tensor:
        found = torch.empty((len(index), *self._row_shape), dtype=self._stored_dtype)
        shard_of = torch.tensor([bisect_right(self._ends, i) for i in index.tolist()], dtype=torch.int64)
        for shard in shard_of.unique().tolist():
            here = shard_of == shard
            first = self._ends[shard - 1] if shard else 0
            found[here] = self._tensor(shard)[index[here] - first]
        return to_unit(found) if self.pictures else found.to(self.dtype)

    def _tensor(self, shard: int) -> Tensor:
        if shard not in self._open:
            count = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
            tensor = opened(self.files[shard]).get_tensor(self.name)
            if tuple(tensor.shape) != (count, *self._row_shape) or tensor.dtype != self._stored_dtype:
                raise DamagedShardError(
                    f"{self.files[shard]} holds {self.name} of shape {tuple(tensor.shape)}, the index says "
                    f"{(count, *self._row_shape)}; delete that shard and run momatch prepare again"
                )
            self._open[shard] = tensor
        return self._open[shard]


def take(table: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """The rows at `index` (M,) int64: a copy of a tensor's, a view of `Rows`."""
    return table[index] if isinstance(table, Tensor) else table.subset(index)


def spread(n: int, most: int) -> Tensor:
    """At most `most` indices out of n, evenly spaced, (M,) int64; all of them if n is no more."""
    return torch.arange(n) if n <= most else torch.arange(most) * n // most


def sample_of(table: Tensor | Rows, max_bytes: int = 2**30, max_rows: int | None = None) -> Tensor:
    """A table as a tensor; of `Rows`, so many of them, evenly spread, as keep within the bounds."""
    if isinstance(table, Tensor):
        return table if max_rows is None else table[spread(len(table), max_rows)]
    most = max(1, max_bytes // max(table.row_bytes, 1))
    return table[spread(len(table), most if max_rows is None else min(most, max_rows))]


def held_bytes(table: Tensor | Rows) -> int:
    """Memory that a table occupies for good."""
    return table.untyped_storage().nbytes() if isinstance(table, Tensor) else table.held_bytes


def to_unit(levels: Tensor) -> Tensor:
    """uint8 levels → float32 in [−1, 1]."""
    return levels.float() / 127.5 - 1


def opened(path: Path) -> safe_open:
    """An open safetensors file.

    Raises:
        DamagedShardError: if it is missing or no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedShardError(
            f"the shard {path} is missing or damaged ({first_line(error)}); delete it and run "
            "momatch prepare again, which makes it anew"
        ) from None


def header(path: Path) -> bytes:
    """The header of a safetensors file: names, shapes and places of its tensors, and its metadata."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 2**24))


def _bytes(digest: bytes) -> Tensor:
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
