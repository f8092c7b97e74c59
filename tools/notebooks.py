"""Notebooks: scripts in examples/notebooks/ with cells marked `# %%`, made into .ipynb and run.

    python tools/notebooks.py             # run all, written to build/notebooks/ with what they show
    python tools/notebooks.py digits      # one

As scripts they are read, compared and checked like other code, and hold no outputs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "examples" / "notebooks"
OUT = ROOT / "build" / "notebooks"


def names() -> list[str]:
    """Of all notebooks, in order."""
    return sorted(path.stem for path in SOURCES.glob("*.py"))


def read(name: str) -> Any:
    """A notebook without outputs, of nbformat's own type."""
    import jupytext

    notebook = jupytext.read(SOURCES / f"{name}.py", fmt="py:percent")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def run(notebook: Any, folder: Path, timeout: int = 600) -> Any:
    """The notebook with its outputs; it works in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    from nbclient import NotebookClient

    folder.mkdir(parents=True, exist_ok=True)
    place = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=timeout, resources=place).execute()


def main(chosen: list[str]) -> None:
    """Run and write."""
    import nbformat

    for name in chosen or names():
        began = time.perf_counter()
        notebook = run(read(name), OUT / "work" / name)
        nbformat.write(notebook, OUT / f"{name}.ipynb")
        print(f"{OUT / name}.ipynb: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
