"""A look through a collection before anything is made of it: sizes, channels, captions, what is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from momatch.data.collections import Collection
from momatch.data.image_io import DataError
from momatch.data.rows import spread


@dataclass
class Survey:
    """What was found.

    Attributes:
        looked_at: pictures that were opened; evenly spread, where there are too many for all.
        whole: places of those that can be read, of the same class together.
        sizes: (width, height) → pictures.
        modes: "grey" or "RGB", as they are read → pictures.
        captions: pictures with a caption that is not empty.
        longest: the longest caption.
        damaged: place of a picture that cannot be read → what was said of it.
    """

    looked_at: int = 0
    whole: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    longest: str = ""
    damaged: dict[int, str] = field(default_factory=dict)

    def remedies(self, minimum: int, total: int) -> list[str]:
        """What has to be done before these pictures can be used, a sentence each."""
        found = []
        if total < minimum:
            found.append(f"there are {total:,} pictures; {minimum} or more are needed")
        if len(self.sizes) > 1:
            small = min(min(size) for size in self.sizes)
            found.append(f"they have {len(self.sizes):,} sizes; give --image-size, such as {_handy(small)}")
        elif any(width != height for width, height in self.sizes):
            found.append("they are not square; give --image-size for their central square, or take them so")
        if self.damaged:
            found.append(f"{len(self.damaged):,} cannot be read; repair or remove them")
        return found


def survey(collection: Collection, most: int) -> Survey:
    """Open the pictures of a collection, at most `most`, evenly spread."""
    found = Survey()
    for i in _places(collection, most):
        found.looked_at += 1
        try:
            item = collection.item(i)
        except DataError as error:
            found.damaged[i] = str(error)
            continue
        found.whole.append(i)
        height, width = item.pixels.shape[:2]
        found.sizes[width, height] += 1
        found.modes["grey" if item.pixels.ndim == 2 else "RGB"] += 1
        found.captions += bool(item.caption)
        found.longest = max(found.longest, item.caption or "", key=len)
    return found


def _places(collection: Collection, most: int) -> Sequence[int]:
    """At most `most` places, evenly spread, those of the same class together."""
    chosen = spread(len(collection), most).tolist()
    labels = collection.labels
    return chosen if labels is None else sorted(chosen, key=lambda i: (labels[i], i))


def _handy(side: int) -> int:
    """The largest power of two that is no more."""
    return 1 << max(side.bit_length() - 1, 0)
