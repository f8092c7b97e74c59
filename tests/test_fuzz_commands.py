"""Commands, configs, models and runs at random: each works, or ends with one sentence and exit code 2.

MOMATCH_FUZZ=2000 pytest tests/test_fuzz_commands.py tries that many of each kind; the daily suite a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import momatch
from momatch.cli import main
from momatch.config import files
from momatch.config.recipes import RECIPES, recipe
from momatch.config.schema import to_json
from momatch.interop.load import load_any
from momatch.utils.errors import UsageError

CASES = int(os.environ.get("MOMATCH_FUZZ", "40"))
DIGITS = Path(momatch.__file__).parent / "assets" / "digits-teacher"
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**70,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "None",
    "\0",
    [],
    {},
    [[]],
]
OPTIONS = [
    *("--steps", "--num", "--labels", "--seed", "--eta", "--batch-size", "--prompt", "--guidance", "--clip"),
    *("--train.num-steps", "--train.batch-size", "--optim.learning-rate", "--method", "--method.update"),
    *("--weighting.w", "--schedule.shift", "--data", "--teacher", "--image-size", "--monitor.every", "--fit"),
    *("--device", "--precision", "--compile", "--format", "--scales", "--memory", "--gpus", "--out", "--x"),
    *("--cond", "--reward", "--extend", "--track", "--num-classes", "--sampler", "--sheet", "--anywhere"),
]
WORDS = [
    *(
        "0",
        "1",
        "2",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e400",
        "1,2",
        "1,,2",
        "1..4",
        "a",
        "",
        " ",
        "--",
        "-",
        "\0",
    ),
    *("cpu", "cuda:99", "none", "graph", "digits", "digits-8", "no/such", "/", "a.png", "joint", "é" * 50),
    *("80GiB", "{}", "[1]", "hf:", "os:abort", "99999999999999999999", "alternating", "instant", "dpm++"),
]
COMMANDS = [
    "sample",
    "evaluate",
    "guidance",
    "export",
    "report",
    "plan",
    "inspect",
    "compare",
    "distill",
    "reward",
]
SHORT = "--train.num-steps 1 --train.batch-size 2 --monitor.every 0 --device cpu".split()


def in_one_sentence(capsys, arguments):
    """Run a command; 0, or 1 or 2 and one line of stderr that is its own."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except Exception as error:
        raise AssertionError(arguments) from error
    said = capsys.readouterr().err
    assert code in (0, 1, 2), arguments
    if code:
        *notices, last = said.splitlines()
        assert last.startswith("momatch: "), (arguments, said)
        assert all(line.startswith("momatch: ") for line in notices), (arguments, said)
        assert "Traceback" not in said and len(said) < 10_000, arguments


def test_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("momatch.training.plan.PROBE_SECONDS", 0.0)
    rng = random.Random(0)
    for _ in range(CASES):
        command = rng.choice(COMMANDS)
        first = rng.choice(["digits", "digits-8", *WORDS])
        words = [w for _ in range(rng.randrange(3)) for w in (rng.choice(OPTIONS), rng.choice(WORDS))]
        small = {"sample": ["--num", "2"], "evaluate": ["--num", "100"], "guidance": ["--num", "100"]}
        cheap = small.get(command, []) if first == "digits" else []
        cheap = [*SHORT, "--out", "run"] if command in ("distill", "reward") else cheap
        cheap = SHORT if command == "plan" else cheap
        in_one_sentence(capsys, [command, first, *words, *cheap])


def broken(value, rng):
    """A JSON value with one place changed: another value, gone, renamed, or doubled."""
    value = json.loads(json.dumps(value))
    places = []

    def walk(inner):
        items = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, each in items:
            places.append((inner, key))
            if isinstance(each, dict | list):
                walk(each)

    walk(value)
    inner, key = rng.choice(places)
    way = rng.randrange(4)
    if way == 0 and isinstance(inner, dict):
        inner[f"{key}x"] = inner.pop(key)
    elif way == 1 and isinstance(inner, dict):
        del inner[key]
    elif way == 2 and isinstance(inner[key], int | float):
        inner[key] = inner[key] * rng.choice([-1, 0.5, 1000, 1e30])
    else:
        inner[key] = rng.choice(ODD)
    return value


def test_configs(tmp_path):
    rng, path = random.Random(1), tmp_path / "config.json"
    for _ in range(CASES):
        name = rng.choice(list(RECIPES))
        text = json.dumps(broken(to_json(recipe(name)), rng))
        if rng.randrange(5) == 0:
            cut = rng.randrange(len(text))
            text = text[:cut] + text[cut + rng.randrange(1, 9) :]
        try:
            path.write_text(text)
            files.read(path)
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, text


@pytest.mark.parametrize("what", ["description", "weights"])
def test_models(what, tmp_path):
    rng = random.Random(2)
    description = json.loads((DIGITS / "model.json").read_text())
    weights = (DIGITS / "model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little")
    folder = tmp_path / "model"
    shutil.copytree(DIGITS, folder)
    for _ in range(CASES):
        if what == "description":
            (folder / "model.json").write_text(json.dumps(broken(description, rng)))
        else:
            data = bytearray(weights)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(header + 8)] = rng.randrange(256)
            data = data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]
            (folder / "model.safetensors").write_bytes(data)
        try:
            model = load_any(folder)
            model.sample(1, 1, {"label": torch.zeros(1, dtype=torch.int64)})
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500


USES = [
    ["report", "run"],
    ["sample", "run", "--num", "1"],
    ["export", "run", "out"],
    ["compare", "run"],
    ["evaluate", "run", "--num", "100"],
]


def test_runs(tmp_path, monkeypatch, capsys):
    """A finished run, one of its files changed: report, sample, evaluate, the same command again."""
    monkeypatch.chdir(tmp_path)
    command = ["distill", "digits-2", *SHORT, "--out", "run"]
    assert main(command) == 0
    shutil.copytree("run", "kept")
    rng = random.Random(3)
    all_files = sorted(path.relative_to("kept") for path in Path("kept").rglob("*") if path.is_file())
    for _ in range(CASES):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("kept", "run")
        path = Path("run") / rng.choice(all_files)
        contents = bytearray(path.read_bytes() or b" ")
        way = rng.randrange(4)
        if way == 0:
            path.unlink()
        elif way == 1:
            path.write_bytes(contents[: rng.randrange(len(contents))])
        elif way == 2:
            contents[rng.randrange(len(contents))] = rng.randrange(256)
            path.write_bytes(contents)
        else:
            path.unlink()
            path.mkdir()
        what = rng.choice([command, [*command, "--extend"], *USES])
        in_one_sentence(capsys, what)
