"""Configs as people write them: YAML, TOML, JSON, on a recipe or whole; what a run writes is read back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from momatch.cli import main
from momatch.config import ConfigError, DistillConfig, InstantConfig, TeacherConfig
from momatch.config.given import as_yaml, read_given
from momatch.config.recipes import RECIPES, recipe
from momatch.networks.configs import UViTConfig

SAME = {
    "a.yaml": "recipe: digits-4\ntrain:\n  num_steps: 7\nmethod: {update: joint}\nsteps: [1, 2]\n",
    "a.toml": 'recipe = "digits-4"\nsteps = [1, 2]\n[train]\nnum_steps = 7\n[method]\nupdate = "joint"\n',
    "a.json": json.dumps(
        {"recipe": "digits-4", "steps": [1, 2], "train": {"num_steps": 7}, "method": {"update": "joint"}}
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_file_is_laid_upon_a_recipe(name, tmp_path):
    (tmp_path / name).write_text(SAME[name])
    base = recipe("digits-4")
    assert isinstance(base, DistillConfig)
    wanted = replace(
        base,
        steps=(1, 2),
        train=replace(base.train, num_steps=7),
        method=replace(base.method, update="joint"),
    )
    assert read_given(tmp_path / name) == wanted


def test_another_method_or_network_is_not_laid_upon_the_old_ones_settings(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("recipe: digits-4\nmethod: {name: instant}\n")
    found = read_given(file)
    assert isinstance(found, DistillConfig) and found.method == InstantConfig()
    file.write_text("recipe: digits-4\nmethod: instant\n")
    assert read_given(file) == found
    file.write_text("recipe: digits-teacher\nnetwork: {family: uvit, channels: [8], width: 16, depth: 1}\n")
    teacher = read_given(file)
    assert isinstance(teacher, TeacherConfig) and isinstance(teacher.network, UViTConfig)


def test_without_a_recipe_the_kind_is_in_the_file_or_that_of_the_command(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {num_steps: 3}\n")
    assert read_given(file, TeacherConfig).train.num_steps == 3
    with pytest.raises(ConfigError, match="says neither recipe nor kind; give one of them"):
        read_given(file)
    file.write_text("kind: distill\nsteps: 2\n")
    assert read_given(file, TeacherConfig) == DistillConfig(steps=2)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_run_writes_for_people_is_its_config(name, tmp_path):
    config = RECIPES[name]()
    (tmp_path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert read_given(tmp_path / "config.yaml") == config
    assert "# optimizer steps in all" in as_yaml(config)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("recipe: digits-4\ntrain: {num_stepps: 3}\n", "num_stepps"),
        ("recipe: digits-4\ntrain: {num_steps: many}\n", "train.num_steps"),
        ("recipe: digits-4\nmethod: {name: dmdd}\n", "dmdd"),
        ("recipe: digits-44\n", "unknown recipe 'digits-44'; did you mean digits-4"),
        ("recipe: [1]\n", "unknown recipe"),
        ("kind: {}\n", "kind is {}; give train-teacher or distill"),
        (
            "recipe: digits-4\nkind: train-teacher\n",
            "kind is 'train-teacher', but recipe digits-4 is for distill",
        ),
        ("- 1\n", "holds no settings by name"),
        ("1: 2\n", "holds no settings by name"),
        ("a: [\n", "cannot read the config"),
        ("a: !!python/object/apply:os.system [true]\n", "cannot read the config"),
        ("recipe: digits-4\ntrain:\n", "train"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(contents, said, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(contents)
    assert main(["distill", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    heard = capsys.readouterr().err
    assert said in heard and heard.count("\n") == 1 and not (tmp_path / "run").exists()


def test_options_override_the_file_and_a_run_can_be_given_again(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "recipe: digits-4\ntrain: {num_steps: 2, batch_size: 4}\nmonitor: {every: 0}\ndevice: cpu\n"
    )
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["distill", "--config", str(file), "--train.seed", "5", "--out", str(first)]) == 0
    assert json.loads((first / "config.json").read_text())["train"]["seed"] == 5
    assert main(["distill", "--config", str(first / "config.yaml"), "--out", str(again)]) == 0
    for name in ("config.json", "config.yaml", "student/model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
