"""What the documents say is true: their Python runs, their commands exist, their figures are recorded."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest

from momatch.cli import COMMANDS
from momatch.config import recipes
from momatch.config.recipes import RECIPES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_examples_run(path, tmp_path, monkeypatch):
    """With every recipe cut to a few steps."""
    monkeypatch.chdir(tmp_path)

    def short(make):
        def config():
            full = make()
            train = dataclasses.replace(full.train, num_steps=4, batch_size=8)
            monitor = dataclasses.replace(full.monitor, every=0)
            return dataclasses.replace(full, train=train, monitor=monitor)

        return config

    monkeypatch.setattr(recipes, "RECIPES", {name: short(make) for name, make in RECIPES.items()})
    for code in blocks(path, "python"):
        exec(compile(code, str(path), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_exist(path):
    for block in blocks(path, "(?:sh|bash)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["momatch"]:
                assert words[1] in COMMANDS, line
                if words[1] in ("distill", "train-teacher", "plan"):
                    assert words[2] == "--config" or words[2] in RECIPES, line
            elif words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", path.read_text()):
        link = next(part for part in target if part)
        if not link.startswith("http"):
            assert (path.parent / link).exists() or (ROOT / link).exists(), link


def test_code_named_in_the_method_page_exists():
    text = (ROOT / "docs" / "the-method.md").read_text()
    for file in set(re.findall(r"`([a-z_/]+\.py)`", text)):
        assert (ROOT / "src" / "momatch" / file).exists() or (ROOT / file).exists(), file
    source = "\n".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    for name in set(re.findall(r"`(?:process|sampling)\.([a-z_]+)`", text)) - {"py"}:
        assert f"def {name}(" in source, name


def study(name: str, script: str = "digits"):
    """benchmarks/digits.py or another script, and one of its recorded results."""
    import importlib.util
    import json

    spec = importlib.util.spec_from_file_location(f"{script}_study", ROOT / "benchmarks" / f"{script}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_the_tables_of_the_digits_study_are_what_was_recorded():
    """Every line of the documents' tables is made by the study itself from its JSON."""
    module, report = study("2026-11-23-digits.json")
    page, readme = (ROOT / "docs" / "numbers.md").read_text(), (ROOT / "README.md").read_text()
    assert module.table(report) in page
    students = [row for row in report["differences"] if row["name"].startswith("student")]
    assert module.difference_table({**report, "differences": students}) in page
    names = [f"teacher-{k}" for k in (1024, 256, 64, 8)] + [f"student-{k}" for k in (8, 4, 2, 1)]
    assert module.readme_table(report, names) in readme


def test_the_tables_of_the_methods_and_options_are_what_was_recorded():
    page = (ROOT / "docs" / "numbers.md").read_text()
    module, report = study("2026-11-24-digits-table.json")
    assert module.methods_table(report) in page
    rows = (
        study("2026-11-24-digits-more.json")[1]["rows"] + study("2026-11-23-digits-methods.json")[1]["rows"]
    )
    options = ("adaptive", "dropout", "interpolated", "rollout", "shift", "warm")
    for kinds in (options, ("fresh",), ("guided0.25", "guided0.5", "guided1", "guided2")):
        chosen = [row for row in rows if row["name"].rsplit("-", 1)[0] in kinds]
        assert module.methods_table({"rows": chosen}) in page, kinds


def test_the_table_of_text_to_image_is_what_was_recorded():
    page = (ROOT / "docs" / "numbers.md").read_text()
    for name in ("2026-11-25-emoji", "2026-11-26-emoji16-h200", "2026-11-26-emoji32"):
        module, report = study(f"{name}.json", "emoji")
        assert module.table(report) in page, name


def test_the_tables_of_flow_and_latent_models_are_what_was_recorded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (ROOT / "docs" / "numbers.md").read_text()
    for kind in ("flow", "latent"):
        for path in (ROOT / "benchmarks" / "results").glob(f"*-diffusers-{kind}.json"):
            module, report = study(path.name, "diffusers_flow")
            assert module.table(report) in page, path.name


def test_the_table_of_samplers_is_what_was_recorded():
    page = (ROOT / "docs" / "numbers.md").read_text()
    module, report = study("2026-11-27-digits-samplers.json", "samplers")
    assert module.table(report) in page
    found = {(row["sampler"], row["steps"]): row for row in report["rows"]}
    for sampler, steps, recall in (("ancestral", 8, 0.71), ("unipc", 8, 0.79), ("dpm++", 8, 0.79)):
        assert round(found[sampler, steps]["recall"], 2) == recall
    assert (
        round(found["ancestral", 32]["recall"], 2) == 0.82 and round(found["unipc", 32]["recall"], 2) == 0.84
    )
