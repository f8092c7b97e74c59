"""Rewards from the command line: what a finished run leaves, the built-in rewards, alarms and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import momatch
from momatch.cli import main
from momatch.config import DistillConfig
from momatch.data.sources import load_data
from momatch.evaluation.rewards import reward_function
from momatch.training import checkpoint
from momatch.training.build import distillation
from momatch.training.plan import forward_units
from momatch.utils.errors import ConfigError

SHORT = [
    "--train.num-steps",
    "4",
    "--train.batch-size",
    "8",
    "--train.log-every",
    "1",
    "--monitor.every",
    "0",
]
EXTRA = """
def darkness(x, cond, rows):
    return -x.flatten(1).mean(1)

def flat(x, cond, rows):
    return x.mean()

def frozen(x, cond, rows):
    return x.detach().flatten(1).mean(1)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished alternating run of two steps a sample."""
    path = tmp_path_factory.mktemp("reward") / "run"
    command = ["distill", "digits-8", "--steps", "2", *SHORT, "--keep-auxiliary", "--out", str(path)]
    assert main(command) == 0
    return path


def reward(run, out, *options: str) -> int:
    return main(["reward", str(run), *options, *SHORT, "--out", str(out)])


def test_a_reward_is_one_command_from_a_finished_run_and_resumes_and_is_reported(run, tmp_path):
    out = tmp_path / "out"
    assert reward(run, out, "--reward", "classifier:7", "--scale", "30") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["method"]["run"] == str(run) and config["method"]["scale"] == 30.0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = [row["reward"] for row in rows if "reward" in row]
    assert len(values) == 4 and all(value < 0 for value in values)
    student, former = momatch.load_student(out), momatch.load_student(run)
    assert student.steps == 2 and student.fingerprint() != former.fingerprint()
    assert main(["report", str(out)]) == 0
    assert "Mean reward of the samples" in (out / "report.html").read_text()
    again = student.fingerprint()
    assert main(["distill", "--config", str(out / "config.json"), "--out", str(out)]) == 0
    assert momatch.load_student(out).fingerprint() == again


def test_it_starts_from_that_run_s_student_and_auxiliary_of_the_file_or_a_checkpoint(run, tmp_path):
    config = DistillConfig(steps=2, method={"name": "reward", "run": str(run), "reward": "brightness"})
    teacher, data = momatch.load_teacher("digits"), load_data("digits")
    method = distillation(teacher, data, config).method
    former = momatch.load_student(run).denoiser.network.state_dict()
    saved = load_file(checkpoint.paths(run / "checkpoints")[-1])
    trained = {k: v for k, v in saved.items() if k.startswith("auxiliary.")}
    for name, value in method.student.network.state_dict().items():
        assert torch.equal(value, former[name])
        assert torch.equal(method.former.network.state_dict()[name], former[name])
        assert torch.equal(method.auxiliary.network.state_dict()[name], trained[f"auxiliary.network.{name}"])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "auxiliary.safetensors").unlink()
    config = replace(config, method=replace(config.method, run=str(copy)))
    other = distillation(teacher, data, config).method
    for a, b in zip(method.auxiliary.parameters(), other.auxiliary.parameters(), strict=True):
        assert torch.equal(a, b)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match="has no auxiliary; distil it with --keep-auxiliary"):
        distillation(teacher, data, config)


def test_drift_beyond_its_bound_raises_an_alarm(run, tmp_path):
    out = tmp_path / "out"
    options = ["--reward", "brightness", "--method.most-drift", "1e-6", "--scale", "1000"]
    assert reward(run, out, *options) == 0
    alarms = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    messages = [row["message"] for row in alarms if row.get("event") == "alarm"]
    assert any("drift is" in m and "lower method.scale" in m for m in messages)


def test_a_plan_counts_whole_samples():
    """Student 3, φ, θ and η₀ one each, and k calls for the sample."""
    method = {"name": "reward", "run": "x", "reward": "brightness"}
    assert forward_units(DistillConfig(steps=8, method=method)) == 6 + 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "method.reward is empty"),
        (["--reward", "beauty"], "method.reward is 'beauty'; use classifier"),
        (["--reward", "classifier:10"], "use classifier:0 to classifier:9"),
        (["--reward", "colour:pink"], "use colour:red, colour:green, colour:blue"),
        (["--reward", "colour:red"], "not RGB images"),
        (["--reward", "similarity"], "the matcher knows emoji alone"),
        (["--reward", "nowhere.at_all:f"], "cannot be imported"),
        (["--reward", "my_rewards:missing"], "no function of my_rewards"),
        (["--reward", "my_rewards:flat"], "gives a tensor of shape () for 2 samples"),
        (["--reward", "my_rewards:frozen"], "not differentiable in x"),
    ],
)
def test_what_cannot_be_a_reward_is_one_sentence(run, options, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(str(tmp_path))
    capsys.readouterr()
    assert reward(run, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_a_function_of_one_s_own_is_named_by_its_module(run, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reward(run, tmp_path / "out", "--reward", "my_rewards:darkness") == 0


def test_no_run_or_another_teacher_is_one_sentence(run, tmp_path, capsys):
    assert main(["reward", "--reward", "brightness", "--out", "x"]) == 2
    assert "name the finished run first" in capsys.readouterr().err
    assert main(["reward", str(tmp_path), "--reward", "brightness", "--out", "x"]) == 2
    assert "cannot read the config" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="method=instant has no auxiliary"):
        DistillConfig(method="instant", keep_auxiliary=True)


def test_built_in_rewards_say_what_they_are_named_for():
    digits = load_data("digits").train
    rows = torch.arange(200)
    x, labels = digits.images[rows], digits.labels[rows]
    found = reward_function("classifier", digits)(x, {"label": labels}, rows)
    wrong = reward_function("classifier", digits)(x, {"label": (labels + 1) % 10}, rows)
    assert float(found.mean()) > -0.2 and float(wrong.mean()) < -3
    seven = reward_function("classifier:7", digits)(x, None, None)
    torch.testing.assert_close(seven[labels == 7], found[labels == 7])
    assert float(reward_function("brightness", digits)(torch.full((1, 1, 8, 8), 0.25), None, None)) == 0.25

    emoji = load_data("emoji", 16).train
    red = torch.stack([torch.full((16, 16), value) for value in (1.0, -1.0, 0.0)])[None]
    assert float(reward_function("colour:red", emoji)(red, None, None)) == pytest.approx(1.5)
    assert float(reward_function("colour:green", emoji)(red, None, None)) == pytest.approx(-1.5)
    cond = {name: table[rows] for name, table in emoji.conditions.items()}
    shuffled = {name: value.roll(17, 0) for name, value in cond.items()}
    similarity = reward_function("similarity", emoji)
    fitting, other = (similarity(emoji.images[rows], c, rows) for c in (cond, shuffled))
    assert float(fitting.mean()) > float(other.mean()) + 0.2 and float(fitting.abs().max()) <= 1 + 1e-5
