"""`momatch compare`: evaluations of several runs in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from momatch.cli.parsing import OptionalPath, check_out, parse
from momatch.evaluation.report import compare as tables
from momatch.utils.errors import UsageError


@dataclass(frozen=True)
class CompareArguments:
    """One table of what `momatch evaluate` found of several runs.

    Attributes:
        runs: folders of runs that have been evaluated.
        out: also write it, as a .md, .csv or .html; the .csv has every number with its interval.
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")] = ()
    out: OptionalPath = None


def compare(arguments: list[str], console: Console) -> None:
    """`momatch compare RUN...`."""
    parsed = parse(CompareArguments, arguments, "compare")
    if not parsed.runs:
        raise UsageError("name what to compare: momatch compare RUN RUN ..., folders of evaluated runs")
    if parsed.out is not None:
        check_out(parsed.out, *tables.FORMATS)
    found = tables.entries([Path(run) for run in parsed.runs])
    console.print(tables.markdown(found), soft_wrap=True, markup=False)
    if parsed.out is not None:
        parsed.out.write_text(tables.FORMATS[parsed.out.suffix](found))
        console.print(f"Table: {parsed.out}", soft_wrap=True)
