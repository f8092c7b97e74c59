"""Trackers are told of metrics and previews, by stand-ins for their packages."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from momatch.cli import main
from momatch.config.schema import DistillConfig, MonitorConfig, TrainConfig
from momatch.training.build import distillation
from momatch.training.trackers import TRACKERS, tracked
from tiny_models import make_teacher, random_pictures

CONFIG = DistillConfig(
    train=TrainConfig(num_steps=4, batch_size=4, log_every=2), monitor=MonitorConfig(4, 100), steps=2
)


class Recorder(SimpleNamespace):
    """A module of which any function may be called; remembers the calls."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self if name == "SummaryWriter" else args

        return call


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_metrics_previews_and_config(name, tmp_path, monkeypatch):
    package = Recorder()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, package)
    run = distillation(make_teacher(), random_pictures(), CONFIG, tmp_path / "run")
    with tracked([name], run) as tell:
        for event in run:
            tell(event)
    said = [str(call) for call in package.calls]
    assert any("'batch_size': 4" in call for call in said)
    assert [any(f"{step}" in call and "gap" in call for call in said) for step in (2, 4)] == [True, True]
    assert any("preview_frechet" in call for call in said)
    assert any("step-00000004.png" in call or call.startswith("('add_image', ('preview'") for call in said)
    assert package.calls[-1][0] in ("close", "finish", "end_run")


def test_none_is_told_unless_asked_for(tmp_path):
    run = distillation(make_teacher(), random_pictures(), replace(CONFIG), tmp_path / "run")
    with tracked([], run) as tell:
        for event in run:
            tell(event)


def test_wrong_names_and_missing_packages_are_one_sentence(tmp_path, monkeypatch, capsys):
    command = ["distill", "digits-8", "--out", str(tmp_path / "run"), "--track"]
    assert main([*command, "notes"]) == 2
    assert "--track notes is not known; use tensorboard, wandb, mlflow, trackio" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main([*command, "trackio"]) == 2
    assert "pip install trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
