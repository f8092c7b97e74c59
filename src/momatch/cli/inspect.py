"""The command that looks at data and changes nothing: inspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console

from momatch.cli.parsing import check_out, parse
from momatch.data.collections import Collection, Reading
from momatch.data.folders import listed
from momatch.data.image_io import DataError, with_channels
from momatch.data.prepared import is_prepared
from momatch.data.rows import to_unit
from momatch.data.sources import BY_NAME, MIN_PICTURES, check_labels, open_collection
from momatch.data.survey import Survey, places, survey
from momatch.evaluation.report import plots
from momatch.utils.errors import UsageError
from momatch.utils.text import count_of

SHOWN = 8  # sizes and damaged files that are listed
THUMBNAIL = 64


@dataclass(frozen=True)
class InspectArguments:
    """Say what would be read of data, in which classes, and what left out; nothing is changed.

    Attributes:
        data: a folder of pictures, an .npz, tars, or hf:ORG/NAME[:SPLIT].
        most: pictures that are opened at most, evenly spread.
        num: pictures on the contact sheet, classes one after the other; 0 writes none.
        out: the contact sheet, a .png.
        caption_field: which field or column is the caption, if it has no usual name.
        label_field: which is the label.
        num_classes: how many classes there are, where labels are some of a larger set; 0 counts them.
        max_megapixels: million pixels of a picture that are read at most; 0 is Pillow's limit, about 179.
        anywhere: metadata may name pictures outside their folder.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    most: int = 2000
    num: int = 64
    out: Path = Path("inspect.png")
    caption_field: str = ""
    label_field: str = ""
    num_classes: int = 0
    max_megapixels: int = 0
    anywhere: bool = False


def inspect(arguments: list[str], console: Console) -> None:
    """`momatch inspect DATA`."""
    parsed = parse(InspectArguments, arguments, "inspect")
    check_out(parsed.out, ".png")
    for name in ("most", "num"):
        if getattr(parsed, name) < (name == "most"):
            raise UsageError(f"--{name} is {getattr(parsed, name)}; give a number of pictures")
    if parsed.data in BY_NAME or is_prepared(Path(parsed.data)):
        raise UsageError(f"{parsed.data} is ready for use as it is; inspect is for pictures of your own")
    reading = Reading(
        parsed.caption_field,
        parsed.label_field,
        parsed.num_classes,
        parsed.max_megapixels,
        parsed.anywhere,
    )
    found = open_collection(parsed.data, reading)
    seen = survey(found, parsed.most)
    for line in report(parsed.data, found, seen, parsed.num_classes):
        console.print(line, soft_wrap=True, markup=False)
    if parsed.num and seen.sizes:
        plots.save_png(contact_sheet(found, parsed.num), parsed.out)
        console.print(f"Contact sheet: {parsed.out}", soft_wrap=True, markup=False)


def report(data: str, found: Collection, seen: Survey, num_classes: int = 0) -> Iterable[str]:
    """What inspect prints, line by line."""
    yield f"{data}: {count_of(len(found), 'picture')}"
    yield from _classes(found)
    if seen.looked_at < len(found):
        yield f"Opened: {seen.looked_at:,} of them, evenly spread"
    yield f"Sizes: {_counts((f'{w}×{h}', n) for (w, h), n in seen.sizes.most_common())}"
    yield f"Channels: {_counts(seen.modes.most_common())}"
    if found.has_captions:
        yield f"Captions: {_share(seen.captions, seen.looked_at)}; the longest: {seen.longest!r}"
    else:
        yield f"Captions: none ({found.caption_help})"
    yield from (f"Note: {note}" for note in found.notes)
    yield f"Left out: {listed(found.left_out) if found.left_out else 'nothing'}"
    for message in seen.damaged[:SHOWN]:
        yield f"Damaged: {message}"
    yield from (f"To do: {remedy}" for remedy in seen.remedies(MIN_PICTURES, len(found)))
    try:
        check_labels(found.labels or [0], len(found.class_names), num_classes, data)
    except DataError as error:
        yield f"To do: {error}"


def contact_sheet(found: Collection, num: int) -> np.ndarray:
    """Thumbnails, classes one after the other; damaged ones are passed over.

    Returns:
        (H, W, 3) or (H, W) uint8.
    """
    pictures = []
    for i in places(found, num):
        try:
            pictures.append(with_channels(found.item(i, THUMBNAIL).pixels, 3))
        except DataError:
            continue
    return plots.image_grid(to_unit(torch.from_numpy(np.stack(pictures))), columns=min(8, len(pictures)))


def _classes(found: Collection) -> Iterable[str]:
    counts = found.class_counts()
    if len(counts) < 2:
        yield f"Classes: {f'one, {counts[0][1]}' if found.class_names else 'none'}"
        return
    yield f"Classes: {len(counts):,}, in the order of their labels"
    width = max(len(name) for _, name, _ in counts)
    for label, name, count in counts:
        yield f"  {label:>4}  {name:<{width}}  {count:,}" if found.class_names else f"  {label:>4}  {count:,}"


def _counts(pairs: Iterable[tuple[Any, int]]) -> str:
    """'64×64 (100), 32×32 (3)'; of many the most frequent, and how many others."""
    all_pairs = list(pairs)
    shown = [f"{what} ({count:,})" for what, count in all_pairs[:SHOWN]]
    rest = Counter(dict(all_pairs[SHOWN:])).total()
    return ", ".join([*shown, *([f"others ({rest:,})"] if rest else [])]) or "none"


def _share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{part:,} of {whole:,}, the others are empty"
