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

from momatch.cli.parsing import UNNAMED, OptionalPath, check_out, parse
from momatch.data.collections import Collection
from momatch.data.folders import listed
from momatch.data.image_io import DataError, with_channels
from momatch.data.prepared import is_prepared
from momatch.data.reading import USUAL, Reading
from momatch.data.records import check_labels
from momatch.data.rows import spread, to_unit
from momatch.data.sources import BY_NAME, MIN_PICTURES, open_collection
from momatch.data.survey import Survey, survey
from momatch.data.tokens import is_tokens, read_tokens, summary
from momatch.data.vectors import is_vectors, read_vectors
from momatch.evaluation.report import plots
from momatch.utils.errors import UsageError
from momatch.utils.text import count_of

SHOWN = 8  # sizes and damaged files that are listed
THUMBNAIL = 64


@dataclass(frozen=True)
class InspectArguments:
    """Say what would be read of data, in which classes, and what left out; nothing is changed.

    Attributes:
        data: a folder of pictures, an .npz, tars, a file of vectors, or hf:ORG/NAME[:SPLIT].
        most: pictures that are opened at most, evenly spread.
        sheet: where to write a contact sheet, a .png; none is written if left out.
        num: pictures on the contact sheet, classes one after the other.
        reading: how the data are read, as a run would.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    most: int = 2000
    sheet: OptionalPath = None
    num: int = 64
    reading: Annotated[Reading, UNNAMED] = USUAL


def inspect(arguments: list[str], console: Console) -> None:
    """`momatch inspect DATA`."""
    parsed = parse(InspectArguments, arguments, "inspect")
    if parsed.sheet:
        check_out(parsed.sheet, ".png", option="--sheet")
    for name in ("most", "num"):
        if getattr(parsed, name) < 1:
            raise UsageError(f"--{name} is {getattr(parsed, name)}; give a number of pictures")
    if parsed.data in BY_NAME or is_prepared(Path(parsed.data)):
        raise UsageError(f"{parsed.data} is ready for use as it is; inspect is for pictures of your own")
    if is_vectors(Path(parsed.data)):
        if parsed.sheet:
            raise UsageError(f"--sheet draws pictures, and {parsed.data} holds vectors; leave it out")
        console.print(
            f"{parsed.data}: {read_vectors(Path(parsed.data), parsed.reading).summary()}", soft_wrap=True
        )
        return
    if is_tokens(Path(parsed.data)):
        if parsed.sheet:
            raise UsageError(f"--sheet draws pictures, and {parsed.data} holds tokens; leave it out")
        found = summary(*read_tokens(Path(parsed.data), parsed.reading))
        console.print(f"{parsed.data}: {found}", soft_wrap=True)
        return
    found = open_collection(parsed.data, parsed.reading)
    seen = survey(found, parsed.most)
    for line in report(parsed.data, found, seen, parsed.reading.num_classes):
        console.print(line, soft_wrap=True, markup=False)
    if parsed.sheet and seen.sizes:
        plots.save_png(contact_sheet(found, seen, parsed.num), parsed.sheet)
        console.print(f"Contact sheet: {parsed.sheet}", soft_wrap=True, markup=False)
    elif seen.sizes:
        console.print("Nothing was written; --sheet FILE.png draws some of the pictures", soft_wrap=True)


def report(data: str, found: Collection, seen: Survey, num_classes: int = 0) -> Iterable[str]:
    """What inspect prints, line by line."""
    damaged = f" and {count_of(len(seen.damaged), 'file')} that cannot be read" if seen.damaged else ""
    yield f"{data}: {count_of(len(found) - len(seen.damaged), 'picture')}{damaged}"
    yield from _classes(found, seen)
    if seen.looked_at < len(found):
        yield f"Opened: {seen.looked_at:,} of them, evenly spread"
    yield f"Sizes: {_counts((f'{w}×{h}', n) for (w, h), n in seen.sizes.most_common())}"
    yield f"Channels: {_counts(seen.modes.most_common())}"
    if found.has_captions:
        yield f"Captions: {_share(seen.captions, len(seen.whole))}; the longest: {seen.longest!r}"
    else:
        yield f"Captions: none ({found.caption_help})"
    yield from (f"Note: {note}" for note in found.notes)
    yield f"Left out: {listed(found.left_out) if found.left_out else 'nothing'}"
    for message in list(seen.damaged.values())[:SHOWN]:
        yield f"Damaged: {message}"
    yield from (f"To do: {remedy}" for remedy in seen.remedies(MIN_PICTURES, len(found) - len(seen.damaged)))
    try:
        check_labels(found.labels or [0], len(found.class_names), num_classes, data)
    except DataError as error:
        yield f"To do: {error}"


def contact_sheet(found: Collection, seen: Survey, num: int) -> np.ndarray:
    """Thumbnails of what was opened, classes one after the other.

    Returns:
        (H, W, 3) or (H, W) uint8.
    """
    chosen = [seen.whole[int(j)] for j in spread(len(seen.whole), num)]
    pictures = [with_channels(found.item(i, THUMBNAIL).pixels, 3) for i in chosen]
    return plots.image_grid(to_unit(torch.from_numpy(np.stack(pictures))), columns=min(8, len(pictures)))


def _classes(found: Collection, seen: Survey) -> Iterable[str]:
    damaged = Counter(found.labels[i] for i in seen.damaged) if found.labels else Counter()
    counts = [(label, name, count - damaged[label]) for label, name, count in found.class_counts()]
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
