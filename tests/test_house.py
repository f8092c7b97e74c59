"""The structure that the rest relies on: who may import whom, how fast the door opens, which names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import momatch

SOURCE = Path(momatch.__file__).parent
# Left to right; a module imports only from rooms to its left. Leaves know nothing of the rest.
ORDER = [
    "errors",
    "devices",
    "files",
    "schedules",
    "process",
    "conventions",
    "denoiser",
    "sampling",
    "model",
    "lora",
    "pipelines",
    "latents",
    "prompts",
    "text",
    "teachers",
    "methods",
    "training",
    "encoders",
    "preparation",
    "config",
    "config_files",
    "validation",
    "fit",
    "evaluation",
    "reports",
    "monitoring",
    "stopping",
    "assessment",
    "runs",
    "assembly",
    "recipes",
    "progress",
    "memory",
    "planning",
    "assets",
    "arguments",
    "export",
    "drawing",
    "inspection",
    "comparison",
    "serving",
    "publication",
    "commands",
    "cli",
    "__main__",
]
LEAVES = {"networks": {"errors"}, "data": {"errors", "files"}, "analytic": set()}


def rooms_imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "momatch":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("momatch.")}
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_flow_left_to_right(path):
    here = room(path)
    allowed = LEAVES[here] | {here} if here in LEAVES else {*ORDER[: ORDER.index(here) + 1], *LEAVES}
    extra = rooms_imported(path) - allowed - {"__version__"}
    assert not extra, f"{path.name} must not import {sorted(extra)}"


def test_every_room_has_a_place():
    assert {room(path) for path in FILES} == set(ORDER) | set(LEAVES)


def test_importing_momatch_and_asking_for_help_imports_no_torch():
    for code in (
        "import momatch",
        "import momatch.cli as c; c.main(['--help'])",
        "import momatch.networks.configs",
    ):
        heavy = {"torch", "matplotlib", "diffusers", "tyro"}
        check = f"import sys; {code}; assert not {heavy} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_the_public_door_opens_every_name_it_lists():
    for name in momatch.__all__:
        assert getattr(momatch, name) is not None
    with pytest.raises(AttributeError):
        momatch.no_such_name  # noqa: B018


def test_no_pickle_and_no_global_seeding():
    """torch.manual_seed is for fresh networks (inside fork_rng) and nn.Dropout, which take no generator."""
    allowed = {"assembly.py", "loop.py", "make.py"}
    for path in FILES:
        text = path.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", ""), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "torch.load(" not in text or path.name == "efficientnet.py", path  # another package's weights
        if path.name not in allowed:
            assert "torch.manual_seed" not in text, path
