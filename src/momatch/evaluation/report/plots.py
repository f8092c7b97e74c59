"""Pictures: grids of samples, and curves.

Curves are matplotlib `Figure`s made without pyplot, so nothing global is touched. They are drawn in mid-tones
on a transparent ground, which reads on a light and on a dark page.
"""

from __future__ import annotations

import html
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from momatch.evaluation.evaluate import Row
from momatch.evaluation.report.tables import find

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILE_PIXELS = 64  # smaller pictures are enlarged to about this
GUTTER_PIXELS, GUTTER_GREY = 2, 96
TEXT_COLUMNS = 80  # of a text that is shown as an image
INK, GRID = "#7d8590", "#7d859040"
COLOURS = {"student": "#3b82f6", "teacher": "#e0782f"}
OTHER_COLOUR = "#2f9e6e"


def image_grid(images: Tensor, columns: int = 10) -> np.ndarray:
    """Lay pictures out in rows, enlarged by a whole factor if they are small, thin gutters between them.

    Args:
        images: (N, C, H, W) in [−1, 1], C = 1 (grey) or 3 (RGB); values outside are clipped.
        columns: pictures in a row; the last row may stay short.

    Returns:
        uint8, (rows, width) for grey and (rows, width, 3) for RGB.

    Raises:
        ValueError: if there are no pictures, or they are neither grey nor RGB.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            f"images have shape {tuple(images.shape)}; give (N, 1, H, W) or (N, 3, H, W) with N ≥ 1"
        )
    n, channels, height, width = images.shape
    columns = max(1, min(columns, n))
    rows = math.ceil(n / columns)
    factor = max(1, round(TILE_PIXELS / max(height, width)))
    levels = images.detach().cpu().float().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().byte()
    tiles = levels.permute(0, 2, 3, 1).numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    step_y, step_x = height * factor + GUTTER_PIXELS, width * factor + GUTTER_PIXELS
    shape = (rows * step_y + GUTTER_PIXELS, columns * step_x + GUTTER_PIXELS, channels)
    grid = np.full(shape, GUTTER_GREY, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y, x = GUTTER_PIXELS + i // columns * step_y, GUTTER_PIXELS + i % columns * step_x
        grid[y : y + height * factor, x : x + width * factor] = tile
    return grid[:, :, 0] if channels == 1 else grid


def save_png(array: np.ndarray, path: Path) -> None:
    """Write what `image_grid` returned as a PNG."""
    from PIL import Image

    Image.fromarray(array).save(path, format="PNG", optimize=True)


def vector_plot(samples: Tensor, real: Tensor | None = None) -> Figure:
    """Samples that are no pictures, real ones in grey beneath.

    Args:
        samples: (N, D) vectors, drawn as points of their first two numbers, or a histogram of the only one;
            (N, T, D) trajectories, drawn as paths through their first two numbers, or of the only one over
            time; of other shapes as vectors.
        real: (M, …) likewise.
    """
    figure, axes = _axes()
    for rows, colour, name in ((real, INK, "data"), (samples, COLOURS["student"], "samples")):
        if rows is None:
            continue
        rows = rows.detach().cpu().float()
        if rows.ndim == 3 and rows.shape[1] > 1:
            for i, path in enumerate(rows.numpy()):
                x, y = (path[:, 0], path[:, 1]) if path.shape[1] > 1 else (range(len(path)), path[:, 0])
                axes.plot(x, y, color=colour, alpha=0.5, linewidth=1, label=None if i else name)
        elif (flat := rows.flatten(1).numpy()).shape[1] > 1:
            axes.scatter(flat[:, 0], flat[:, 1], color=colour, alpha=0.6, s=8, label=name)
        else:
            axes.hist(flat[:, 0], bins=30, color=colour, alpha=0.5, density=True, label=name)
    single = samples.ndim == 3 and samples.shape[2] == 1
    _label(axes, "time" if single else "first number", "value" if single else "second number")
    _legend(axes)
    return figure


def text_image(text: str) -> str:
    """A text as SVG, line by line, long lines wrapped."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, TEXT_COLUMNS) or [""]]
    spans = "".join(
        f'<text x="8" y="{18 * i + 20}" xml:space="preserve">{html.escape(_printable(line))}</text>'
        for i, line in enumerate(lines)
    )
    size = f'width="{8 * TEXT_COLUMNS + 16}" height="{18 * len(lines) + 16}"'
    style = 'font-family="monospace" font-size="13" fill="#222"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{spans}</svg>'


def _printable(line: str) -> str:
    """Without what XML does not allow."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def training_curve(
    records: Sequence[Mapping[str, Any]], name: str, label: str = "", signed: bool = False
) -> Figure:
    """One number over the steps, raw and smoothed.

    Args:
        records: lines of metrics.jsonl that carry metrics.
        name: which number, e.g. "gap" or "loss"; values that are not finite are left out.
        label: what to call it on the axis.
        signed: if not, values that are not positive are left out too, and the axis is logarithmic.
    """
    figure, axes = _axes()
    steps, values = _series(records, name, positive=not signed)
    if len(steps):
        axes.plot(steps, values, color=COLOURS["student"], alpha=0.45, linewidth=1, label="as logged")
        axes.plot(steps, smooth(values, signed), color=COLOURS["student"], linewidth=2, label="smoothed")
        _legend(axes)
    axes.set_yscale("linear" if signed else "log")
    _label(axes, "step", label or name)
    return figure


def frechet_curve(looks: Sequence[Mapping[str, Any]]) -> Figure:
    """The cheap Fréchet distance over the steps; compare it with itself only."""
    figure, axes = _axes()
    steps, values = _series(looks, "frechet", positive=True)
    axes.plot(steps, values, color=COLOURS["student"], marker="o", markersize=4, linewidth=1.5)
    axes.set_yscale("log")
    sizes = sorted({look["num_samples"] for look in looks if "num_samples" in look})
    _label(
        axes, "step", f"cheap Fréchet distance (n = {', '.join(map(str, sizes))})" if sizes else "cheap FD"
    )
    return figure


def statistics_curves(
    records: Sequence[Mapping[str, Any]], data_mean: float | None = None, data_std: float | None = None
) -> Figure:
    """Mean, standard deviation and saturated share of what the student makes, beside the data's."""
    figure, (first, second, third) = _axes(columns=3)
    panels = (
        (first, "student_mean", "mean", data_mean),
        (second, "student_std", "standard deviation", data_std),
        (third, "student_saturation", "saturated share", None),
    )
    for axes, name, label, target in panels:
        steps, values = _series(records, name)
        axes.plot(steps, values, color=COLOURS["student"], linewidth=1.5, label="student")
        if target is not None:
            axes.axhline(target, color=OTHER_COLOUR, linestyle="--", linewidth=1.5, label="data")
            _legend(axes)
            reach = data_std or 1.0  # so that a drift looks as large as it is beside the data's spread
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, target - reach), max(high, target + reach))
        _label(axes, "step", label)
    third.set_ylim(0, max(0.2, third.get_ylim()[1]))
    return figure


def guidance_curve(points: Sequence[tuple[float, Row]]) -> Figure:
    """Recall against precision (and against class accuracy) along guidance scales.

    Args:
        points: (scale, what was measured at it).
    """
    figure, axes = _axes(columns=2)
    retrieval = any(find(row, "retrieval_accuracy") for _, row in points)
    accuracy = "retrieval_accuracy" if retrieval else "class_accuracy"
    for panel, metric, label in zip(
        axes, ("precision", accuracy), ("precision", accuracy.replace("_", " ")), strict=True
    ):
        found = [(w, find(row, metric), find(row, "recall")) for w, row in points]
        known = [(w, x.value, y.value) for w, x, y in found if x and y]
        panel.plot([x for _, x, _ in known], [y for _, _, y in known], color=OTHER_COLOUR, marker="o")
        for w, x, y in known:
            panel.annotate(f"w = {w:g}", (x, y), textcoords="offset points", xytext=(5, 5), color=INK)
        _label(panel, label, "recall")
    return figure


def quality_curve(rows: Sequence[Row]) -> Figure:
    """Fréchet distance against sampling steps, for every model, with 95 % intervals and the floor."""
    figure, axes = _axes()
    for name in dict.fromkeys(row.name for row in rows):
        points = sorted(
            (row for row in rows if row.name == name and find(row, "frechet")), key=lambda row: row.steps
        )
        found = [(row.steps, m.value, m.low, m.high) for row in points if (m := find(row, "frechet"))]
        found = [
            (k, v, v if low is None else low, v if high is None else high)
            for k, v, low, high in found
            if v > 0
        ]
        steps, values, lows, highs = (
            (np.array(column) for column in zip(*found, strict=True)) if found else [[]] * 4
        )
        axes.errorbar(
            steps,
            values,
            yerr=[np.subtract(values, lows), np.subtract(highs, values)],
            color=COLOURS.get(name, OTHER_COLOUR),
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1.5,
            label=name,
        )
    floors = [m.value for row in rows if (m := find(row, "frechet_floor"))]
    if floors:
        axes.axhline(
            floors[0], color=OTHER_COLOUR, linestyle="--", linewidth=1.5, label="floor: real pictures"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", nonpositive="clip")
    ticks = sorted({row.steps for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    _plain_log_ticks(axes)
    _label(axes, "sampling steps (network calls)", "Fréchet distance")
    _legend(axes)
    return figure


def smooth(values: np.ndarray, signed: bool = False, window: float = 0.1) -> np.ndarray:
    """Centred running mean over `window` of the series, geometric unless signed; it shrinks at the ends."""
    reach = int(len(values) * window / 2)
    seen = values if signed else np.log(values)
    means = np.array([seen[max(0, i - reach) : i + reach + 1].mean() for i in range(len(seen))])
    return means if signed else np.exp(means)


def svg(figure: Figure) -> str:
    """The figure as an SVG document, letters drawn as shapes, so that no font is needed."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def _axes(columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3) if columns > 1 else (6.4, 3.8), layout="constrained")
    return figure, figure.subplots(1, columns)


def _series(
    records: Sequence[Mapping[str, Any]], name: str, positive: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (r["step"], r[name])
        for r in records
        if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])
    ]
    pairs = [(step, value) for step, value in pairs if value > 0 or not positive]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _label(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _plain_log_ticks(axes)


def _plain_log_ticks(axes: Axes) -> None:
    """Write 2 and 0.05, not 2 × 10⁰ and 5 × 10⁻²; over more than two decades label the decades alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, position: f"{value:g}")
    wide = high / low > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
