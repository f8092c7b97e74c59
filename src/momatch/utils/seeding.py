"""Random numbers from (seed, step): no stream runs on across steps, so resuming needs no stored state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """63 bits for one purpose, such as the seed, "train" and the step; well mixed for neighbouring inputs."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *path))


class RowsGenerator:
    """Random numbers for some rows of a batch, of which other processes hold the others.

    The whole batch is cut into slices of equal length, each with a generator of its own, and into `parts` of
    equal length, of which this is number `part`: what a row gets depends on its place in the whole batch
    alone. Only slices that this part touches are drawn. With as many slices as parts none is drawn in vain;
    with one slice every process draws all of it, but the numbers are those of a single generator.

    Args:
        slices: a generator each.
        part: which part, 0 … parts − 1.
        parts: how many.
        minibatches: of which the batch consists, one after another; every process holds its part of each.
    """

    def __init__(
        self, slices: Sequence[torch.Generator], part: int = 0, parts: int = 1, minibatches: int = 1
    ):
        self.slices, self.part, self.parts, self.minibatches = slices, part, parts, minibatches
        self._chosen: tuple[Tensor, int] | None = None

    def half(self) -> RowsGenerator:
        """For half of the minibatches, from the same generators."""
        return RowsGenerator(self.slices, self.part, self.parts, max(self.minibatches // 2, 1))

    def only(self, chosen: Tensor, held: int) -> RowsGenerator:
        """The same, where just the rows `chosen` (M,) int64 of the `held` rows of this part are asked for.

        Numbers are drawn for all of them, since which rows other processes choose is not known here.
        """
        other = RowsGenerator(self.slices, self.part, self.parts, self.minibatches)
        other._chosen = chosen, held
        return other

    def draw(self, law: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, dim: int) -> Tensor:
        """Numbers from torch.randn or torch.rand, in `shape`, rows along `dim`; on the generators' device.

        Raises:
            ValueError: if the whole batch cannot be cut into the slices.
        """
        held = self._chosen[1] if self._chosen else shape[dim]
        size, rest = divmod(held * self.parts, len(self.slices))
        if rest:
            raise ValueError(f"{held * self.parts} rows cannot be cut into {len(self.slices)} equal slices")
        drawn: dict[int, Tensor] = {}
        rows: list[Tensor] = []
        length = held // self.minibatches
        for minibatch in range(self.minibatches):
            first = (minibatch * self.parts + self.part) * length
            for i in range(first // size, -(-(first + length) // size)):
                if i not in drawn:
                    of_slice = [*shape[:dim], size, *shape[dim + 1 :]]
                    source = self.slices[i]
                    drawn[i] = law(of_slice, generator=source, device=source.device, dtype=dtype)
                start, stop = max(first, i * size), min(first + length, (i + 1) * size)
                rows.append(drawn[i].narrow(dim, start - i * size, stop - start))
        found = rows[0] if len(rows) == 1 else torch.cat(rows, dim)
        return found.index_select(dim, self._chosen[0]) if self._chosen else found


Generator = torch.Generator | RowsGenerator


def part_of(source: Generator, part: int, parts: int) -> RowsGenerator:
    """For one of equal parts of the rows that `source` is for, which is left as it stands.

    Every part draws what its rows would get in the whole: the parts can be worked on one after another.
    """
    slices = [source] if isinstance(source, torch.Generator) else source.slices
    copies = [torch.Generator(each.device).set_state(each.get_state()) for each in slices]
    if isinstance(source, torch.Generator):
        return RowsGenerator(copies, part, parts)
    return RowsGenerator(copies, source.part * parts + part, source.parts * parts, source.minibatches)


def normal(like: Tensor, source: Generator | None) -> Tensor:
    """N(0, 1), in the shape (B, …), dtype and device of `like`."""
    if isinstance(source, RowsGenerator):
        return source.draw(torch.randn, like.shape, like.dtype, dim=0)
    return torch.randn(like.shape, generator=source, device=like.device, dtype=like.dtype)


def uniform(shape: tuple[int, int], like: Tensor, source: Generator | None) -> Tensor:
    """(n, B) numbers from U[0, 1), in the dtype and on the device of `like`."""
    if isinstance(source, RowsGenerator):
        return source.draw(torch.rand, shape, like.dtype, dim=1)
    return torch.rand(shape, generator=source, device=like.device, dtype=like.dtype)
