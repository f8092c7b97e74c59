"""The structure that the rest relies on: the order of rooms, how fast the door opens, which names exist."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import momatch
from momatch.utils import moved

SOURCE = Path(momatch.__file__).parent
# A room imports only from itself and the rooms before it.
ORDER = [
    "utils",
    "diffusion",
    "networks",
    "data",
    "methods",
    "models",
    "interop",
    "config",
    "evaluation",
    "training",
    "cli",
    "__main__",
]


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
def test_a_room_imports_from_the_rooms_before_it(path):
    here = room(path)
    allowed = {*ORDER[: ORDER.index(here) + 1]} if here in ORDER else set()
    extra = rooms_imported(path) - allowed - {"__version__"}
    assert not extra, f"{path.relative_to(SOURCE)} must not import {sorted(extra)}"


def test_every_file_is_in_a_room():
    assert {room(path) for path in FILES} == {*ORDER, "assets"}


def test_former_names_open_the_same_modules():
    for old, new in moved.HOMES.items():
        module = importlib.import_module(f"momatch.{old}")
        assert module is importlib.import_module(f"momatch.{new}"), old
        assert module.__spec__ is not None and module.__spec__.name == f"momatch.{new}"
    assert momatch.schedules is importlib.import_module("momatch.diffusion.schedules")
    assert momatch.analytic.GaussianMixture is importlib.import_module("momatch.diffusion").GaussianMixture


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
    allowed = {"build.py", "loop.py", "two_sample.py"}
    for path in FILES:
        text = path.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", ""), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "torch.load(" not in text or path.name == "efficientnet.py", path  # another package's weights
        if path.name not in allowed:
            assert "torch.manual_seed" not in text, path


def test_the_package_is_typed_and_small_enough_to_install_everywhere():
    home = Path(momatch.__file__).parent
    assert (home / "py.typed").is_file()
    assert (
        sum(file.stat().st_size for file in home.rglob("*") if file.suffix != ".pyc" and file.is_file())
        < 10 * 2**20
    )


def test_the_version_is_one():
    root = Path(__file__).parent.parent
    assert f"version: {momatch.__version__}\n" in (root / "CITATION.cff").read_text()
