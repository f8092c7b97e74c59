"""Every algorithm beside the paper's own: trained, resumed bit for bit, planned, saved with its sampler."""

from __future__ import annotations

import pytest
import torch

import momatch
from momatch.cli import main
from momatch.config import DistillConfig, MonitorConfig, TrainConfig
from momatch.diffusion import sampling
from momatch.methods.consistency import ConsistencyConfig
from momatch.methods.dmd import DistributionMatchingConfig
from momatch.methods.progressive import ProgressiveConfig
from momatch.methods.regression import RegressionConfig
from momatch.training.build import distillation
from momatch.utils.errors import ConfigError, UsageError
from tiny_models import make_teacher, random_pictures

METHODS = {
    "progressive": (ProgressiveConfig(rounds=2, round_steps=2), "ddim"),
    "consistency": (ConsistencyConfig(intervals=2, target_decay=0.5), "ddim"),
    "dmd": (DistributionMatchingConfig(updates=1), "renoise"),
    "regression": (RegressionConfig(teacher_steps=2), "ddim"),
    "draws": (RegressionConfig("ancestral", teacher_steps=2), "ancestral"),
}


def settings(method, **other) -> DistillConfig:
    train = TrainConfig(num_steps=5, batch_size=4, log_every=1, checkpoint_every=2)
    return DistillConfig(steps=2, method=method, train=train, monitor=MonitorConfig(every=0), **other)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_resumes_bit_for_bit_and_its_student_is_sampled_as_it_says(name, tmp_path):
    method, sampler = METHODS[name]
    config = settings(method, source="rollout" if name == "dmd" else "data")
    unbroken = distillation(make_teacher(), random_pictures(), config)
    metrics = [event.record.metrics for event in unbroken]
    assert all(method.headline in row for row in metrics if "student_std" in row)
    for stop in (3, 99):  # in the middle of progressive distillation's second round
        run = distillation(make_teacher(), random_pictures(), config, tmp_path)
        for event in run:
            if event.record.step == stop:
                break
    assert run.model.fingerprint() == unbroken.model.fingerprint() != make_teacher().fingerprint()
    run.finish()
    student = momatch.load_student(tmp_path)
    assert student.sampler == sampler
    cond = {"label": torch.tensor([0, 1, 2])}
    found = student.sample(3, cond=cond, seed=4)
    assert torch.equal(found, student.sample(3, cond=cond, seed=4, eta=sampling.ETAS[sampler]))
    for other in set(sampling.ETAS.values()) - {sampling.ETAS[sampler]}:
        assert not torch.equal(found, student.sample(3, cond=cond, seed=4, eta=other))


def test_what_an_algorithm_does_not_draw_is_refused():
    for name, (method, _) in METHODS.items():
        with pytest.raises(ConfigError, match="posterior is .*fresh.*draws no z_s from a posterior"):
            settings(method, posterior="fresh")
        if name != "dmd":
            with pytest.raises(ConfigError, match="needs source=data"):
                settings(method, source="rollout")


def test_a_student_of_another_sampler_is_not_exported_as_one_of_the_ancestral(tmp_path, capsys):
    """In one step there is no difference between samplers, and it may go."""
    run = distillation(make_teacher(), random_pictures(), settings(ConsistencyConfig()), tmp_path / "run")
    for _ in run:
        pass
    run.finish()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "is sampled by ddim, and exports carry the ancestral sampler alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["sample", str(tmp_path / "run"), "--num", "4", "--out", str(tmp_path / "a.png")]) == 0
    folder = tmp_path / "run" / "student" / "model.json"
    folder.write_text(folder.read_text().replace('"sampler": "ddim"', '"sampler": "euler"'))
    with pytest.raises(UsageError, match="unknown sampler 'euler'"):
        momatch.load_student(tmp_path / "run")


def test_they_are_planned_and_named_by_what_they_say_of_themselves(capsys):
    assert main(["plan", "digits-2", "--method", "dmd", "--train.batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "4 forward passes" in printed and "auxiliary" in printed
    assert [ProgressiveConfig(rounds=r).forward_units(guided=True) for r in (1, 2)] == [7, 5]
    assert RegressionConfig(teacher_steps=6).forward_units(guided=True) == 15
    assert ConsistencyConfig().forward_units(guided=True) == 6
