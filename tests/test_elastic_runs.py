"""Elastic students through the whole house: config, plan, run, saved, sampled, reported."""

from __future__ import annotations

import pytest
import torch

import momatch
from momatch.cli import main
from momatch.config import DistillConfig, MonitorConfig, TrainConfig
from momatch.diffusion.denoiser import Denoiser
from momatch.methods.alternating import AlternatingConfig
from momatch.training.build import distillation
from momatch.training.plan import forward_units
from momatch.utils.errors import ConfigError, UsageError
from tiny_models import make_teacher, random_pictures

SHORT = TrainConfig(num_steps=2, batch_size=4, log_every=1)


def elastic(**options) -> DistillConfig:
    return DistillConfig(steps=[4, 1, 2], train=SHORT, monitor=MonitorConfig(every=0), **options)


def test_an_elastic_run_is_saved_and_sampled_with_any_of_its_counts(tmp_path):
    run = distillation(make_teacher(), random_pictures(), elastic(), tmp_path / "run")
    teacher, student = run.method.teacher, run.method.student
    assert isinstance(student, Denoiser) and run.model.step_counts == (1, 2, 4) and run.model.steps == 4
    z, logsnr = torch.randn(4, 1, 8, 8), torch.randn(4)
    label = {"label": torch.tensor([0, 1, 2, 0])} if run.model.num_classes else {}
    before = student(z, logsnr, {**label, "steps": torch.tensor([1.0, 2.0, 4.0, 1.0])})
    assert torch.equal(before, teacher(z, logsnr, label or None))
    for _ in run:
        pass
    run.finish()
    torch.nn.init.normal_(
        run.model.denoiser.network.conditioning.steps.weight, generator=torch.Generator().manual_seed(0)
    )
    run.model.save(tmp_path / "saved")
    loaded = momatch.load_student(tmp_path / "saved")
    assert loaded.step_counts == (1, 2, 4)
    for k in (1, 2, 4):
        torch.testing.assert_close(loaded.sample(3, steps=k, seed=1), run.model.sample(3, steps=k, seed=1))
    told = loaded.denoiser(z, logsnr, {**label, "steps": torch.full((4,), 4.0)})
    assert not torch.allclose(told, loaded.denoiser(z, logsnr, {**label, "steps": torch.full((4,), 1.0)}))
    with pytest.raises(UsageError, match="trained for 1, 2 or 4 steps"):
        loaded.sample(1, steps=17)


def test_the_auxiliary_is_told_the_count_unless_the_mixture_is_asked_for():
    for method, told in ((AlternatingConfig(), True), (AlternatingConfig(auxiliary_steps="mixture"), False)):
        run = distillation(make_teacher(), random_pictures(), elastic(method=method))
        auxiliary = run.method.trainable["auxiliary"].network
        assert (auxiliary.conditioning.steps is not None) == told


def test_what_cannot_be_elastic_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"steps is \(0, 4\); use 1 to 16, or a list of such"):
        DistillConfig(steps=(0, 4))
    with pytest.raises(ConfigError, match="method=instant trains a student for one number of steps"):
        DistillConfig(steps=(2, 4), method="instant")
    with pytest.raises(ConfigError, match="an adapter has no place"):
        DistillConfig(steps=(2, 4), adapter=momatch.config.AdapterConfig(rank=2))
    run = distillation(make_teacher(), random_pictures(), elastic())
    with pytest.raises(ConfigError, match="cannot teach"):
        distillation(run.model, random_pictures(), DistillConfig(teacher="mine", train=SHORT))
    assert DistillConfig(steps=[8]).steps == 8 and DistillConfig(steps=range(1, 17)).step_counts[-1] == 16


def test_a_plan_counts_the_rollouts_of_all_counts():
    """Five forwards of Algorithm 2, and on average ((1 + 2 + 6)/3 − 1)/2 = 1 of a rollout."""
    assert forward_units(DistillConfig(steps=(1, 2, 6), source="rollout")) == 6


@pytest.mark.parametrize("word", ["1,2,4", "1..4"])
def test_the_command_line_takes_a_list_or_a_range(word, tmp_path, capsys):
    command = ["distill", "digits-8", "--steps", word, "--train.num-steps", "2", "--train.batch-size", "4"]
    assert main([*command, "--monitor.every", "0", "--out", str(tmp_path / "run")]) == 0
    student = momatch.load_student(tmp_path / "run")
    assert student.step_counts == ((1, 2, 4) if word == "1,2,4" else (1, 2, 3, 4))
    assert (
        main(["distill", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "run")])
        == 0
    )
    assert main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main([*command, "--steps", "3..1", "--out", str(tmp_path / "x")]) == 2
    assert "--steps '3..1' is no range of 1 to 16" in capsys.readouterr().err
