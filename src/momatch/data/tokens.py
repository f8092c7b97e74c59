"""Data that are rows of tokens: a text, cut into rows of equal length, or an array of whole numbers.

A row is kept as integers; as one-hot vectors, which networks and processes take, it exists in a batch alone.
What is held out are blocks of rows that lie together, so that no held-out row is cut from a sentence whose
other half is trained on. The vocabulary, what each token stands for, goes with the data into the model's
provenance: a character each, or of bytes "<0x0A>" and the like.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.data.image_io import DataError
from momatch.data.images import ImageSet, Split
from momatch.data.reading import USUAL, Reading
from momatch.data.rows import Rows
from momatch.utils.errors import Notice
from momatch.utils.text import first_line

TOKENS, VOCABULARY = "tokens", "vocabulary"
MOST_TOKENS = 2**14  # kinds of token: each becomes as many numbers in a batch
MOST_CHARACTERS = 2000
MIN_ROWS = 100
BLOCKS, HELDOUT_BLOCKS = 20, (4, 14)  # which of twenty blocks are held out: a tenth, from two places
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokens(Rows):
    """Rows of tokens, held as integers; indexing gives them one-hot, as float32.

    Args:
        tokens: (N, L) whole numbers from 0.
        size: C, entries of a one-hot vector; more than there are tokens where a process has one of its own.
    """

    dtype = torch.float32

    def __init__(self, tokens: Tensor, size: int):
        self._tokens, self._row_shape = tokens, (tokens.shape[1], size)

    @property
    def size(self) -> int:
        """C."""
        return self._row_shape[1]

    def of_size(self, size: int) -> Tokens:
        """The same rows in one-hot vectors of `size` entries."""
        other = Tokens(self._tokens, size)
        other.index = self.index
        return other

    def subset(self, index: Tensor) -> Tokens:
        """As of all `Rows`."""
        found = super().subset(index)
        assert isinstance(found, Tokens)
        return found

    def integers(self) -> Tensor:
        """All rows, (N, L) int64."""
        return (self._tokens if self.index is None else self._tokens[self.index]).long()

    @property
    def held_bytes(self) -> int:
        """The integers."""
        return self._tokens.untyped_storage().nbytes()

    def evidence(self) -> Tensor:
        """The integers, whatever the size of their vectors."""
        return self.integers().to(torch.int32)

    def _stored(self) -> int:
        return len(self._tokens)

    def _read(self, index: Tensor) -> Tensor:
        return F.one_hot(self._tokens[index].long(), self.size).to(self.dtype)


def is_tokens(path: Path) -> bool:
    """Whether this is a text, or an .npz with an array `tokens`."""
    if not path.is_file():
        return False
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return TOKENS in file.files
        except Exception:  # whatever is wrong with it is said by whoever reads it
            return False
    return path.suffix == ".txt"


def load_tokens(path: Path, reading: Reading = USUAL) -> Split:
    """Training and held-out rows of a file; the same blocks are held out always.

    A `Notice` says what was read.

    Args:
        path: .txt in UTF-8, or an .npz with `tokens` (N, L) whole numbers and perhaps `vocabulary`, texts.
        reading: of it, how long rows are, and whether a text is read by characters or by bytes.

    Raises:
        DataError: if the file is empty, too short or no such text, or has too many different tokens.
    """
    rows, vocabulary, size = read_tokens(path, reading)
    warnings.warn(f"{path}: {summary(rows, vocabulary, size)}", Notice, stacklevel=2)
    data = ImageSet(
        Tokens(rows, size),
        torch.zeros(len(rows), dtype=torch.int64),
        1,
        path.stem,
        space="tokens",
        vocabulary=vocabulary,
    )
    block = torch.arange(len(rows)) * BLOCKS // len(rows)
    held = torch.isin(block, torch.tensor(HELDOUT_BLOCKS))
    return Split(
        data.subset((~held).nonzero().flatten(), f"{data.name}-train"),
        data.subset(held.nonzero().flatten(), f"{data.name}-heldout"),
    )


def read_tokens(path: Path, reading: Reading = USUAL) -> tuple[Tensor, tuple[str, ...], int]:
    """Rows (N, L), the vocabulary (empty if unknown) and the number of kinds; see `load_tokens`."""
    found = _array(path) if path.suffix == ".npz" else _text(path, reading)
    if len(found[0]) < MIN_ROWS:
        what = f"{len(found[0])} rows of {found[0].shape[1]} tokens"
        shorter = "" if path.suffix == ".npz" else ": give more text, or a smaller --row-length"
        raise DataError(f"{path} holds {what}; {MIN_ROWS} or more are needed{shorter}")
    return found


def summary(rows: Tensor, vocabulary: Sequence[str], size: int) -> str:
    """'read 4,000 rows of 64 tokens; 73 different characters'."""
    kind = "bytes" if of_bytes(vocabulary) else "characters" if vocabulary else "tokens"
    return f"read {len(rows):,} rows of {rows.shape[1]:,} tokens; {size:,} different {kind}"


def with_mask(images: ImageSet, kind: Literal["mask", "uniform"]) -> ImageSet:
    """The rows in the vectors of a discrete process: of a masked one with an entry more, for the mask."""
    assert isinstance(images.images, Tokens)
    size = int(images.images.size) + (kind == "mask")
    return replace(images, images=images.images.of_size(size))


def decode(tokens: Tensor, vocabulary: Sequence[str]) -> list[str]:
    """The texts of rows of tokens (N, L); without a vocabulary their numbers.

    Bytes that are no UTF-8 become U+FFFD.
    """
    if not vocabulary:
        return [" ".join(map(str, row)) for row in tokens.tolist()]
    if of_bytes(vocabulary):
        values = [int(word[3:5], 16) for word in vocabulary]
        return [bytes(values[t] for t in row).decode("utf-8", "replace") for row in tokens.tolist()]
    return ["".join(map(vocabulary.__getitem__, row)) for row in tokens.tolist()]


def of_bytes(vocabulary: Sequence[str]) -> bool:
    """Whether its tokens are bytes."""
    return bool(vocabulary) and all(BYTE.fullmatch(word) for word in vocabulary)


def _text(path: Path, reading: Reading) -> tuple[Tensor, tuple[str, ...], int]:
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path} is empty; give a text")
    if reading.tokens == "bytes":
        symbols = np.frombuffer(data, np.uint8)
        kinds, numbers = np.unique(symbols, return_inverse=True)
        words = [f"<0x{kind:02X}>" for kind in kinds]
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 (byte {error.start:,}); convert it, or read it by bytes: --tokens bytes"
            ) from None
        text = text.replace("\r\n", "\n")
        kinds, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        words = [chr(kind) for kind in kinds]
        if len(words) > MOST_CHARACTERS:
            raise DataError(
                f"{path} has {len(words):,} different characters, more than {MOST_CHARACTERS:,}; read it by "
                "bytes: --tokens bytes"
            )
    if len(words) < 2:
        what = f"one character, {words[0]!r}, again and again" if words else "no character"
        raise DataError(f"{path} holds {what}; there is nothing to learn")
    length = reading.row_length
    rows = len(numbers) // length
    whole = torch.from_numpy(numbers.reshape(-1)[: rows * length].astype(np.int16))
    return whole.view(rows, length), tuple(words), len(words)


def _array(path: Path) -> tuple[Tensor, tuple[str, ...], int]:
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, names = file[TOKENS], file[VOCABULARY] if VOCABULARY in file.files else np.array([])
    except Exception as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); save it again") from None
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise DataError(
            f"{path}: tokens is of type {tokens.dtype} and shape {tokens.shape}; give whole numbers (N, L)"
        )
    if int(tokens.min()) < 0:
        raise DataError(f"{path}: tokens holds {tokens.min()}; number them from 0")
    words = tuple(map(str, names.tolist()))
    size = max(int(tokens.max()) + 1, len(words))
    if size > MOST_TOKENS or (words and len(words) < size):
        allowed = f"its vocabulary has {len(words):,}" if words else f"{MOST_TOKENS - 1:,} is the most"
        raise DataError(f"{path}: tokens holds {int(tokens.max()):,}, and {allowed}; number them from 0")
    if size < 2:
        raise DataError(f"{path}: all of tokens are 0; there is nothing to learn")
    return torch.from_numpy(tokens.astype(np.int16)), words, size
