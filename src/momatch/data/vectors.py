"""Data that are no pictures: vectors, trajectories, arrays of any shape, with conditions by name.

A file of arrays, .npz or .safetensors, all with a row for each sample:

    x        (N, …) what is to be made: (N, D) vectors, (N, T, D) trajectories; numbers of about unit scale
    label    (N,) whole numbers from 0, if there are classes
    group    (N,) which rows belong together, an episode say: a group is held out as a whole
    others   (N, …) each, conditions under their own names: obs, goal, …
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momatch.data.image_io import DataError
from momatch.data.images import ImageSet, Split, random_split, stratified_split
from momatch.data.reading import USUAL, Reading
from momatch.data.records import check_labels
from momatch.utils.errors import Notice
from momatch.utils.text import count_of, first_line

X, LABEL, GROUP = "x", "label", "group"
SUFFIXES = (".npz", ".safetensors")
HELDOUT_FRACTION, MIN_ROWS = 0.1, 100
USUAL_STD = (0.2, 5.0)  # networks and noise schedules are made for numbers of about unit scale


def is_vectors(path: Path) -> bool:
    """Whether this is a file of arrays with an `x`."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    try:
        return X in _names(path)
    except Exception:  # whatever is wrong with it is said by whoever reads it
        return False


@dataclass(frozen=True)
class Vectors:
    """What a file of arrays holds, every array with the same rows.

    Attributes:
        path: the file.
        x: (N, …) float32.
        conditions: (N, …) float32 each, by name.
        labels: (N,) int64, or None.
        groups: (N,) which group each row is of, counted from 0, or None.
        num_classes: how many classes the labels are of; 1 without labels.
    """

    path: Path
    x: Tensor
    conditions: dict[str, Tensor]
    labels: Tensor | None
    groups: Tensor | None
    num_classes: int = 1

    def summary(self) -> str:
        """'read 2,000 rows of x (16×2); conditions obs (4); 3 classes; 40 groups'."""
        words = [f"read {len(self.x):,} rows of x ({_by(self.x.shape[1:])})"]
        if self.conditions:
            shapes = ", ".join(f"{name} ({_by(rows.shape[1:])})" for name, rows in self.conditions.items())
            words += [f"conditions {shapes}"]
        if self.labels is not None:
            empty = self.num_classes - len(self.labels.unique())
            lacking = f", {empty:,} of them without a row" if empty else ""
            words += [f"{count_of(self.num_classes, 'class', 'classes')}{lacking}"]
        if self.groups is not None:
            words += [count_of(int(self.groups.max()) + 1, "group")]
        return "; ".join(words)


def read_vectors(path: Path, reading: Reading = USUAL) -> Vectors:
    """The arrays of a file; a `Notice` says so where x is not of about unit scale.

    Args:
        path: .npz or .safetensors.
        reading: of it, how many classes there are, and whether labels are numbered anew.

    Raises:
        DataError: if arrays are missing, do not fit each other, or are not finite numbers.
    """
    try:
        arrays = _read(path)
    except Exception as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); save it again") from None
    if X not in arrays:
        raise DataError(f"{path} has no array x; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    rows = len(arrays[X]) if arrays[X].ndim else 0
    if rows < MIN_ROWS:
        raise DataError(f"{path} holds {rows} rows of x; {MIN_ROWS} or more are needed")
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != rows:
            shape = "×".join(map(str, array.shape)) or "one number"
            raise DataError(f"{path}: {name} is {shape}, x has {rows} rows; give a row of {name} for each")
    labels, groups = arrays.pop(LABEL, None), arrays.pop(GROUP, None)
    tensors = {name: _numbers(path, name, array) for name, array in arrays.items()}
    x = tensors.pop(X)
    if x.ndim < 2 or not x[0].numel():
        raise DataError(f"{path}: x is {tuple(x.shape)}; give (N, D) vectors, or (N, T, D) trajectories")
    std = float(x.std())
    if not USUAL_STD[0] <= std <= USUAL_STD[1]:
        _check_scale(path, std)
    found = None if labels is None else _labels(path, labels)
    if found is not None and reading.renumber_labels:
        found = found.unique(return_inverse=True)[1]
    classes = 1 if found is None else check_labels(found.tolist(), 0, reading.num_classes, f"{path}", "rows")
    return Vectors(path, x, tensors, found, None if groups is None else _groups(path, groups), classes)


def load_vectors(path: Path, reading: Reading = USUAL) -> Split:
    """Training and held-out rows of a file; the same tenth is held out always, of groups where it has any.

    A `Notice` says what was read.

    Args:
        path: .npz or .safetensors.
        reading: see `read_vectors`.

    Raises:
        DataError: see `read_vectors`.
    """
    found = read_vectors(path, reading)
    warnings.warn(f"{path}: {found.summary()}", Notice, stacklevel=2)
    data = ImageSet(
        found.x,
        torch.zeros(len(found.x), dtype=torch.int64) if found.labels is None else found.labels,
        found.num_classes,
        path.stem,
        conditions=found.conditions,
        null_condition={name: torch.zeros(rows.shape[1:]) for name, rows in found.conditions.items()},
        space="vectors",
    )
    if found.groups is not None:
        return _by_group(data, found.groups, path)
    split = stratified_split(data, HELDOUT_FRACTION, seed=0)
    if len(split.heldout) < HELDOUT_FRACTION * len(data) / 2:
        split = random_split(data, HELDOUT_FRACTION, seed=0)
    return split


def _check_scale(path: Path, std: float) -> None:
    """Refuse numbers that are all the same, and say so where they are not of unit scale.

    Raises:
        DataError: if there is nothing to learn.
    """
    if std == 0:
        raise DataError(f"{path}: all numbers of x are the same; there is nothing to learn")
    warnings.warn(
        f"{path}: x has standard deviation {std:.3g}; networks and noise are made for about 1, so divide x "
        "by that, and multiply what the model makes",
        Notice,
        stacklevel=3,
    )


def _names(path: Path) -> list[str]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    from safetensors import safe_open

    with safe_open(str(path), "np") as file:
        return list(file.keys())


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    from safetensors.torch import load_file

    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in load_file(path).items()
    }


def _numbers(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} is of type {array.dtype}; give numbers")
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
        raise DataError(f"{path}: {name} has numbers that are not finite, in row {row}; leave that row out")
    return tensor


def _labels(path: Path, labels: np.ndarray) -> Tensor:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: label must be whole numbers from 0, one for each row")
    return torch.from_numpy(labels.astype(np.int64))


def _groups(path: Path, groups: np.ndarray) -> Tensor:
    if groups.ndim != 1:
        raise DataError(
            f"{path}: group has the shape {groups.shape}; give one for each of {len(groups)} rows"
        )
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1].reshape(-1))


def _by_group(data: ImageSet, groups: Tensor, path: Path) -> Split:
    number = int(groups.max()) + 1
    if number < 2:
        raise DataError(f"{path}: all rows are of one group, so none can be held out; leave group away")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    held = torch.isin(groups, order[: max(1, round(number * HELDOUT_FRACTION))])
    return Split(
        data.subset((~held).nonzero().flatten(), f"{data.name}-train"),
        data.subset(held.nonzero().flatten(), f"{data.name}-heldout"),
    )


def _by(shape: torch.Size) -> str:
    return "×".join(map(str, shape))
