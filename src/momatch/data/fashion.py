"""Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28×28 grey, ten classes of equal size.

Source: Xiao, Rasul, Vollgraf 2017 (MIT licence). It does not ship with the package: Debian has it as
`dataset-fashion-mnist`, and its four files may lie in `data/fashion-mnist` instead.
"""

from __future__ import annotations

from pathlib import Path

from momatch.data.folders import walk
from momatch.data.idx import Idx, image_files, to_split
from momatch.data.image_io import DataError
from momatch.data.images import Split

NAME = "fashion-mnist"
FOLDERS = (Path("data") / NAME, Path("/usr/share/datasets") / NAME)  # the second is Debian's
SIZES = (14, 28)
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def folder() -> Path | None:
    """Where the files are; None if they are nowhere."""
    return next((path for path in FOLDERS if path.is_dir() and image_files(walk(path))), None)


def load_fashion(image_size: int = 0) -> Split:
    """60,000 training and 10,000 test images as published, (N, 1, S, S) in [−1, 1].

    Args:
        image_size: S, 14 or 28 (0 means 28); 14 is the exact mean of 2×2 pixels.

    Raises:
        DataError: if it is another size, or the files are not there; the message says how to get them.
    """
    size = image_size or SIZES[-1]
    if size not in SIZES:
        raise DataError(f"image_size is {size}, but Fashion-MNIST comes as 14×14 or 28×28")
    found = folder()
    if found is None:
        raise DataError(
            f"Fashion-MNIST is not in {' nor in '.join(map(str, FOLDERS))}; apt-get install "
            "dataset-fashion-mnist, or put its four .gz files (github.com/zalandoresearch/fashion-mnist, "
            f"data/fashion) into {FOLDERS[0]}"
        )
    return to_split(
        Idx(walk(found)),
        len(CLASSES),
        size,
        name=f"fashion{size}",
        classifier=f"fashion{size}-classifier",
        class_names=CLASSES,
    )
