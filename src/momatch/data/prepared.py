"""A folder that `momatch prepare` wrote: what is in it, and how it is read.

index.json                     format, settings, tensors, shards
shard-00000.safetensors, …     latents or images, labels, and the conditions by name; rows in order
shard-00000.json, …            the captions of each shard, if there are any
null-condition.safetensors     the conditions when nothing is asked for
prepare.json                   settings, written first, so that another run does not mix with this one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momatch.data.captions import Captions
from momatch.data.image_io import DataError
from momatch.data.images import ImageSet
from momatch.data.rows import Shards, opened
from momatch.utils.errors import UsageError

FORMAT = "momatch-data-1"
INDEX, SETTINGS, NULL_CONDITION = "index.json", "prepare.json", "null-condition.safetensors"
LATENTS, IMAGES, LABELS = "latents", "images", "labels"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
}


def shard_path(folder: Path, shard: int) -> Path:
    """Of the safetensors file; the captions lie beside it as .json."""
    return folder / f"shard-{shard:05d}.safetensors"


def is_prepared(path: Path) -> bool:
    """Whether `momatch prepare` wrote this folder, or began to."""
    return (path / INDEX).is_file() or (path / SETTINGS).is_file()


def load_prepared(path: Path) -> ImageSet:
    """All samples of a prepared folder; shards stay on disk.

    Raises:
        DataError: if it is unfinished, or its index damaged.
        DamagedShardError: if a shard is missing or damaged; the message names it.
    """
    if not (path / INDEX).is_file():
        raise DataError(f"{path} is not finished (no {INDEX}); run momatch prepare again")
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}, this program reads {FORMAT!r}")
        return _from_index(path, index)
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path / INDEX} is damaged ({error}); run momatch prepare again") from None


def _from_index(path: Path, index: Mapping[str, Any]) -> ImageSet:
    counts = [int(shard["rows"]) for shard in index["shards"]]
    files = [path / shard["file"] for shard in index["shards"]]
    tables = {
        name: Shards(files, counts, name, tuple(t["shape"]), DTYPES[t["dtype"]], pictures=name == IMAGES)
        for name, t in index["tensors"].items()
    }
    space = "latents" if LATENTS in tables else "pixels"
    images = tables.pop(LATENTS if space == "latents" else IMAGES)
    labels = torch.cat([_labels(file, count) for file, count in zip(files, counts, strict=True)])
    tables.pop(LABELS)
    captions = [file.with_suffix(".json") for file in files] if index["captions"] else None
    return ImageSet(
        images,
        labels,
        int(index["num_classes"]),
        path.resolve().name,
        conditions=tables,
        null_condition=_null_condition(path / NULL_CONDITION) if tables else {},
        captions=None if captions is None else Captions(captions, counts),
        space=space,
        origin=index["settings"],
        class_names=tuple(index.get("class_names", ())),
    )


def _null_condition(path: Path) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v.clone() for k, v in read_tensors(path).items()}


def _labels(file: Path, count: int) -> Tensor:
    found = read_tensors(file, LABELS).get(LABELS)
    if found is None or found.shape != (count,):
        raise DataError(
            f"the shard {file} does not hold {count} samples, as the index says; delete it and "
            "run momatch prepare again"
        )
    return found.clone()


def read_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """The named tensors of a safetensors file that it has, or all; mapped, not copied.

    Raises:
        DamagedShardError: if the file is missing or damaged.
    """
    file = opened(path)
    return {name: file.get_tensor(name) for name in file.keys() if not names or name in names}  # noqa: SIM118
