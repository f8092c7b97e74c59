"""A new algorithm is one file in methods/: trained, planned, resumed and reported, no other file touched."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import momatch
from momatch import methods
from momatch.cli import main
from momatch.config import DistillConfig, EmaConfig, MonitorConfig, TrainConfig
from momatch.methods import registry
from momatch.training import checkpoint
from momatch.training.build import distillation
from tiny_models import make_teacher, random_pictures

# Regression on the teacher's mean: the student learns E[x | z_t] by heart, and an average of it is kept.
FILE = '''
"""Regression on the teacher's mean."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from momatch.methods.base import Method, MethodConfig, Update
from momatch.utils.settings import settings


@settings("method")
class RegressionConfig(MethodConfig):
    """Regression on the teacher's mean.

    Attributes:
        power: of the difference.
    """

    name: ClassVar[str] = "on-the-mean"
    headline: ClassVar[str] = "distance"
    caption: ClassVar[str] = "How far the student is from the mean of its teacher."

    power: Annotated[float, Field(gt=0)] = 2.0

    def forward_units(self, guided: bool) -> int:
        return 4 + guided

    def build(self, context):
        return Regression(context, self.power)


class Regression(Method):
    def __init__(self, context, power):
        self.teacher, self.student, self.schedule = context.teacher, context.student, context.schedule
        self.power, self.updates = power, nn.Linear(1, 1)
        self.updates.weight.data.zero_()

    def step(self, step, batch):
        logsnr = self.schedule(batch.uniform().squeeze(0))
        alpha = torch.sigmoid(logsnr).sqrt().view(-1, 1, 1, 1)
        z = alpha * batch.x + (1 - alpha**2).sqrt() * batch.normal()
        with torch.no_grad():
            mean = self.teacher(z, logsnr, batch.cond)
        loss = (self.student(z, logsnr, batch.cond) - mean).abs().pow(self.power).mean()
        rows = batch.rows.float().mean()
        return Update({"student": loss}, lambda: {"distance": loss.detach(), "mean row": rows})

    @property
    def trainable(self):
        return {"student": self.student}

    @property
    def kept(self):
        return {"updates": self.updates}

    @property
    def optimizer_overrides(self):
        return {"student": {"beta1": 0.9}}

    def after_update(self, step):
        self.updates.weight.data += 1
'''
SHORT = "--train.batch-size 4 --train.log-every 1 --train.checkpoint-every 2 --monitor.every 2".split()
SHORT += ["--monitor.num-samples", "100"]


@pytest.fixture
def regression(tmp_path, monkeypatch):
    """The file, in methods/ as far as Python can tell."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "on_the_mean.py").write_text(FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield registry.config_type("on-the-mean")
    sys.modules.pop("momatch.methods.on_the_mean")


def distil(tmp_path, name: str, *options: str) -> int:
    return main(["distill", "digits-8", "--method", name, *SHORT, *options, "--out", str(tmp_path / "run")])


def test_a_method_in_one_file_is_trained_planned_resumed_and_reported(regression, tmp_path, capsys):
    run = tmp_path / "run"
    assert distil(tmp_path, "on-the-mean", "--train.num-steps", "6", "--method.power", "1.5") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["method"] == {"name": "on-the-mean", "power": 1.5}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "distance" in row] == [1, 2, 3, 4, 5, 6]
    assert momatch.load_student(run).sample(2, seed=1).isfinite().all()
    kept = load_file(checkpoint.paths(run / "checkpoints")[-1])
    assert float(kept["kept.updates.weight"]) == 6
    again = ["distill", "--config", str(run / "config.json"), "--out", str(run)]
    assert main(again) == 0  # finished: saved again
    assert main(["report", str(run)]) == 0
    assert "How far the student is from the mean of its teacher." in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["plan", "digits-8", "--method", "on-the-mean", "--train.batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "4 forward passes" in printed and "auxiliary" not in printed
    assert main(["distill", "digits-8", "--method", "on-the-mean", "--method.power", "-1", "--out", "x"]) == 2
    assert "method.power is -1.0; it must be above 0" in capsys.readouterr().err


def test_such_a_method_resumes_bit_for_bit_with_what_it_keeps(regression, tmp_path):
    settings = TrainConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2)
    config = DistillConfig(method=regression(), train=settings, monitor=MonitorConfig(every=0))
    unbroken = distillation(make_teacher(), random_pictures(), config)
    for _ in unbroken:
        pass
    for stop in (3, 99):
        run = distillation(make_teacher(), random_pictures(), config, tmp_path / "resumed")
        for event in run:
            if event.record.step == stop:
                break
    assert run.model.fingerprint() == unbroken.model.fingerprint()
    assert float(run.method.kept["updates"].weight) == 6


def test_a_method_of_one_s_own_is_named_by_its_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_methods.py").write_text(FILE.replace('"on-the-mean"', '"mine"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distil(tmp_path, "my_methods:RegressionConfig", "--train.num-steps", "2") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"] == {"name": "my_methods:RegressionConfig", "power": 2.0}
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["distill", "digits-8", "--method", "gan", "--out", str(tmp_path / "other")]) == 2
    assert "method is 'gan'; use alternating, consistency, discrete, dmd, " in capsys.readouterr().err


def test_an_average_of_the_student_is_sampled_saved_and_resumed(tmp_path):
    """average ← β average + (1 − β) weights after every step, beginning with the first step's weights."""
    settings = TrainConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2)
    config = DistillConfig(ema=EmaConfig(0.75), train=settings, monitor=MonitorConfig(every=0))
    run = distillation(make_teacher(), random_pictures(), config)
    student = run.method.trainable["student"]
    expected = None
    for _ in run:
        now = torch.cat([p.detach().flatten() for p in student.parameters()])
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    found = torch.cat([p.flatten() for p in run.model.denoiser.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found, now)
    for stop in (3, 99):
        again = distillation(make_teacher(), random_pictures(), config, tmp_path)
        for event in again:
            if event.record.step == stop:
                break
    again.finish()
    saved = momatch.load_student(tmp_path)
    assert saved.fingerprint() == again.model.fingerprint() == run.model.fingerprint()


@pytest.mark.parametrize("name", [":X", ".a:X", "momatch.methods.base:MethodConfig", "os:path.join"])
def test_a_name_that_leads_to_no_method_is_one_sentence(name, tmp_path, capsys):
    assert main(["distill", "digits-8", "--method", name, "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_of_a_run_that_has_stopped_saves_the_same_student_again(tmp_path):
    """Its stopping rule ended it before any preview, so that the checkpoint alone has its weights."""
    rule = "--stopping.within-noise 3 --stopping.window 5 --train.log-every 1 --train.num-steps 80".split()
    short = ["--train.batch-size", "16", "--monitor.every", "200", "--device", "cpu"]
    command = ["distill", "digits-8", "--method", "instant", *rule, *short, "--out", str(tmp_path / "run")]
    prints = []
    for _ in range(2):
        assert main(command) == 0
        prints.append(momatch.load_student(tmp_path / "run").fingerprint())
    assert "stop" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert prints[0] == prints[1] != momatch.load_teacher("digits").fingerprint()


def test_a_setting_of_another_method_is_said_to_be_one(tmp_path, capsys):
    command = ["distill", "digits-8", "--out", str(tmp_path / "x")]
    assert main([*command, "--method", "instant", "--method.update", "joint"]) == 2
    assert (
        "--method.update is a setting of --method alternating and discrete, not of instant"
        in capsys.readouterr().err
    )
    assert main([*command, "--method.lambda-steps", "300"]) == 2
    assert (
        "--method.lambda-steps is a setting of --method instant, not of alternating"
        in capsys.readouterr().err
    )
