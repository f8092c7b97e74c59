"""The documentation site: what its pages say is true, and it builds, whole and without a network."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import momatch
from momatch.config import recipes
from momatch.config.recipes import RECIPES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.md"))

spec = importlib.util.spec_from_file_location("check_site", ROOT / "tools" / "check_site.py")
assert spec is not None and spec.loader is not None
check_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_site)


def literals() -> list[str]:
    """Every string in the source, `…` where something is filled in."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        return None

    files = (ROOT / "src").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    found = [text(node) for node in nodes]
    return [each for each in found if each]


def says(literal: str, sentence: str) -> bool:
    """Whether the fixed parts of a sentence stand in a string, in their order."""
    place = 0
    for part in sentence.split("…"):
        place = literal.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_sentence_of_troubleshooting_is_one_that_the_program_prints():
    sentences = re.findall(r"^\*\*`([^`]+)`\*\*$", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(sentences) > 40
    known = literals()
    for sentence in sentences:
        assert len(sentence.replace("…", "").strip()) >= 12, sentence
        assert any(says(literal, sentence) for literal in known), sentence


def test_each_entry_of_troubleshooting_says_what_to_do():
    blocks = (DOCS / "troubleshooting.md").read_text().split("\n\n")
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        if block.startswith("**`"):
            assert following and not following.startswith(("**`", "#")), block


@pytest.mark.parametrize("path", API, ids=lambda p: p.name)
def test_examples_of_the_reference_run(path, tmp_path, monkeypatch):
    """Each by itself, with every recipe cut to a few steps."""
    monkeypatch.chdir(tmp_path)

    def short(make):
        def config():
            full = make()
            train = dataclasses.replace(full.train, num_steps=4, batch_size=8)
            monitor = dataclasses.replace(full.monitor, every=0)
            return dataclasses.replace(full, train=train, monitor=monitor)

        return config

    monkeypatch.setattr(recipes, "RECIPES", {name: short(make) for name, make in RECIPES.items()})
    examples = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    assert examples
    for code in examples:
        exec(compile(code, str(path), "exec"), {"__name__": "example"})


def test_every_public_name_has_a_place_and_an_example_in_the_reference():
    text = (DOCS / "api" / "index.md").read_text()
    examples = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    for name in momatch.__all__:
        assert f"`{name}`" in text, name
        if callable(getattr(momatch, name)):
            assert f"::: momatch.{name}\n" in text, name
            assert re.search(rf"\b{name}\b", examples), name


def test_every_module_of_the_reference_is_there():
    for path in API:
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M):
            module, _, last = name.rpartition(".")
            if last in momatch.__all__ and module == "momatch":
                continue
            assert importlib.util.find_spec(name) is not None, name


def test_code_beside_formulas_is_there():
    for file, name in re.findall(r"<!-- code: (\S+) (\S+) -->", (DOCS / "the-method.md").read_text()):
        node: ast.AST = ast.parse((ROOT / "src" / "momatch" / file).read_text())
        for part in name.split("."):
            inside = [each for each in ast.iter_child_nodes(node) if getattr(each, "name", "") == part]
            assert inside, f"{file} has no {name}"
            node = inside[0]


def test_make_docs_is_strict():
    """MkDocs counts the warnings that it logs: with --quiet it logs none, and strictness is lost."""
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line]
    assert lines and all("--strict" in line and "-q" not in line for line in lines)


def test_a_page_that_asks_another_host_is_noticed(tmp_path):
    (tmp_path / "index.html").write_text(
        '<a href="https://a.example/">a reader may go there</a><a href="gone.html">x</a><a href="#no">x</a>'
        '<p id="yes"></p><a href="#yes">x</a><link rel="canonical" href="https://b.example/">'
        '<script src="//c.example/x.js"></script><link rel="stylesheet" href="https://d.example/x.css">'
        "<style>@import 'https://e.example/x.css'; a { background: url(https://f.example/x.png) }</style>"
    )
    (tmp_path / "site.css").write_text("@font-face { src: url('https://g.example/x.woff') }")
    found = "\n".join(check_site.problems(tmp_path))
    assert {host for host in "abcdefg" if f"{host}.example" in found} == set("cdefg")
    assert "gone.html" in found and "#no" in found and "#yes" not in found


@pytest.mark.slow
def test_the_site_builds_and_needs_no_network(tmp_path):
    """With the strictness of `make docs`: a warning is an error."""
    pytest.importorskip("material")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert check_site.problems(tmp_path) == []
    method = (tmp_path / "the-method.html").read_text()
    assert "x_tilde" in method and 'class="beside"' in method
    for path in DOCS.glob("*.md"):
        assert (tmp_path / f"{path.stem}.html").is_file()


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(tmp_path):
    """In their order, on a budget on which nothing is learned."""
    pytest.importorskip("diffusers")
    text = (DOCS / "tutorial.md").read_text()
    for language, block in re.findall(r"```(python|py|sh)\n(.*?)```", text, re.S):
        if language == "sh":
            short = re.sub(r"--train.num-steps \d+", "--train.num-steps 4 --monitor.every 0", block)
            short = re.sub(
                r"--num \d{4,}", "--num 200", re.sub(r"--(teacher-)?steps 4,64", r"--\1steps 4", short)
            )
            commands = [shlex.split(line, comments=True) for line in short.replace("\\\n", " ").splitlines()]
            commands = [[sys.executable, "-m", *words] for words in commands if words[:1] == ["momatch"]]
        else:
            commands = [[sys.executable, "-c", block]]
        for command in commands:
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "circle.png").is_file()
