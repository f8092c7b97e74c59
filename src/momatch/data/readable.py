"""Those pictures of a collection that can be read, where some cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from momatch.data.collections import Collection, Item, digest
from momatch.data.image_io import DataError
from momatch.utils.text import count_of

READERS = 8  # threads that open pictures
NAMED = 5  # pictures that a note names
UNREADABLE = "unreadable picture"


class Readable(Collection):
    """The pictures of another collection without those that cannot be read.

    Args:
        inner: all of them. Each is opened once, here.
        most: how many may be left out.

    Raises:
        DataError: if there are more.
    """

    def __init__(self, inner: Collection, most: int):
        self.inner = inner
        damaged: list[int] = []
        messages: list[str] = []
        with ThreadPoolExecutor(READERS) as pool:
            for i, message in enumerate(pool.map(self._problem, range(len(inner)))):
                if message is None:
                    continue
                damaged.append(i)
                messages.append(message.rpartition(";")[0] or message)
                if len(damaged) > most:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(
                        f"more than {count_of(most, 'picture')} cannot be read, the limit of "
                        f"--skip-unreadable; the last: {message}"
                    )
        out = set(damaged)
        self.kept = [i for i in range(len(inner)) if i not in out]
        self.name, self.has_captions, self.caption_help = inner.name, inner.has_captions, inner.caption_help
        self.class_names = inner.class_names
        self.labels = inner.labels and [inner.labels[i] for i in self.kept]
        self.left_out, self.notes = inner.left_out.copy(), list(inner.notes)
        if damaged:
            self.left_out[UNREADABLE] += len(damaged)
            more = len(messages) - NAMED
            self.notes += [*messages[:NAMED], *([f"and {more:,} more such pictures"] if more > 0 else [])]

    def __len__(self) -> int:
        return len(self.kept)

    def item(self, i: int, image_size: int = 0, smooth: bool = False) -> Item:
        """See `Collection`."""
        found = self.inner.item(self.kept[i], image_size, smooth)
        return replace(found, label=None if self.labels is None else self.labels[i])  # perhaps numbered anew

    def identity(self) -> str:
        """See `Collection`."""
        return digest([self.inner.identity(), *map(str, self.kept)])

    def _problem(self, i: int) -> str | None:
        try:
            self.inner.item(i)
        except DataError as error:
            return str(error)
        return None
