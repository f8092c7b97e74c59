"""A run as the library sees it: what is logged, what alarms, what a resumed run's log says."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

import momatch
from momatch.config.schema import DistillConfig, MonitorConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.evaluation.features import PixelFeatures
from momatch.models.model import Model
from momatch.training import run as runs
from momatch.training.build import distill, distillation
from momatch.training.claims import claim, extended
from momatch.training.monitor import Monitor
from momatch.utils.errors import ConfigError, RunError
from momatch.utils.run_folder import RunFolder


@pytest.fixture(scope="module")
def teacher():
    return momatch.load_teacher("digits")


@pytest.fixture(scope="module")
def data():
    return momatch.load_data("digits")


CONFIG = DistillConfig(
    train=TrainConfig(num_steps=8, batch_size=8, log_every=2, checkpoint_every=3),
    monitor=MonitorConfig(every=4, num_samples=100),
)


def test_distill_starts_from_the_teacher_and_leaves_it_alone(teacher, data):
    before = {k: v.clone() for k, v in teacher.denoiser.state_dict().items()}
    student = distill(teacher, data, CONFIG)
    assert all(torch.equal(before[k], v) for k, v in teacher.denoiser.state_dict().items())
    moved = [not torch.equal(before[k], v) for k, v in student.denoiser.state_dict().items()]
    assert any(moved) and student.steps == 8 and student.info["role"] == "student"
    images = student.sample(3, seed=1)
    assert images.shape == (3, 1, 8, 8) and bool(images.isfinite().all())


def test_a_saved_student_samples_the_same(teacher, data, tmp_path):
    student = distill(teacher, data, CONFIG)
    student.save(tmp_path / "student")
    loaded = momatch.load_student(tmp_path / "student")
    labels = {"label": torch.tensor([1, 2, 3])}
    assert torch.equal(student.sample(3, cond=labels, seed=5), loaded.sample(3, cond=labels, seed=5))
    assert loaded.info == student.info


def test_the_log_of_a_resumed_run_has_every_step_once(teacher, data, tmp_path):
    run = distillation(teacher, data, CONFIG, tmp_path)
    events = run.events()
    for event in events:
        if event.record.step == 5:
            break
    events.close()
    for checkpoint in (tmp_path / "checkpoints").glob("step-00000005*"):
        checkpoint.unlink()  # as if killed: the log is ahead of the newest checkpoint
    for _ in distillation(teacher, data, CONFIG, tmp_path):
        pass
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "gap" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line.get("event") == "look"] == [4, 8]
    assert [line["step"] for line in lines if line.get("event") == "start"] == [1, 4]


def test_a_folder_of_another_config_is_refused(tmp_path):
    claim(tmp_path, dataclasses.replace(CONFIG, steps=2))  # failed before its first step: no obstacle
    claim(tmp_path, CONFIG)
    claim(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="steps: 8 there, 4 here"):
        claim(tmp_path, dataclasses.replace(CONFIG, steps=4))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.safetensors").write_bytes(b"")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="not empty and no run's folder"):
        claim(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        claim(tmp_path, CONFIG)


def longer(steps: int) -> DistillConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=steps))


def test_a_finished_run_is_made_longer(teacher, data, tmp_path):
    """Twice; stopped and taken up in between; its past and its weights stay, and the log and model say so."""
    for _ in distillation(teacher, data, CONFIG, tmp_path):
        pass
    past = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="add --extend"):
        next(distillation(teacher, data, longer(12), tmp_path).events())
    config = extended(longer(12), tmp_path)
    assert config.train.extended_at == (8,)
    events = distillation(teacher, data, config, tmp_path).events()
    assert [next(events).record.step for _ in range(3)] == [9, 10, 11]
    events.close()
    assert extended(longer(12), tmp_path) == config  # the same command again
    assert [event.record.step for event in distillation(teacher, data, config, tmp_path)] == [12]
    run = distillation(teacher, data, extended(longer(14), tmp_path), tmp_path)
    assert [event.record.step for event in run] == [13, 14]
    assert run.finish().provenance.config["train"]["extended_at"] == [8, 12]
    log = (tmp_path / "metrics.jsonl").read_text()
    assert log.startswith(past)
    rows = [json.loads(line) for line in log.splitlines()]
    assert [(r["step"], r["num_steps"]) for r in rows if r.get("event") == "extended"] == [(8, 12), (12, 14)]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert sorted(rates) == [2, 4, 6, 8, 10, 12, 14] and rates[10] > rates[8] < rates[6]


def test_what_cannot_be_made_longer_is_refused(teacher, data, tmp_path):
    with pytest.raises(ConfigError, match="no run .* to extend; leave out --extend"):
        extended(CONFIG, tmp_path)
    for _ in distillation(teacher, data, CONFIG, tmp_path):
        pass
    with pytest.raises(ConfigError, match="num_steps is 4, but the run in .* has 8"):
        extended(longer(4), tmp_path)
    other = dataclasses.replace(extended(longer(12), tmp_path), steps=4)
    with pytest.raises(ConfigError, match="another config"):
        next(distillation(teacher, data, other, tmp_path).events())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["num_steps"] == 8
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"event": "stop", "step": 8, "reason": "enough"}\n')
    with pytest.raises(ConfigError, match="ended by its stopping rule"):
        extended(longer(12), tmp_path)


def test_a_folder_of_another_teacher_or_other_pictures_is_refused(teacher, data, tmp_path):
    for _ in distillation(teacher, data, CONFIG, tmp_path):
        break
    fewer = Split(data.train.subset(torch.arange(100), "digits-train"), data.heldout)
    with pytest.raises(ConfigError, match="inputs.data"):
        next(distillation(teacher, fewer, CONFIG, tmp_path).events())
    other = momatch.load_teacher("digits")
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1e-3)
    with pytest.raises(ConfigError, match="inputs.teacher"):
        next(distillation(other, data, CONFIG, tmp_path).events())


def test_a_guided_model_is_distilled_from_its_plain_network_and_cannot_be_saved(teacher, data, tmp_path):
    guided = dataclasses.replace(teacher, denoiser=momatch.Guided(teacher.denoiser, 3.0))
    with pytest.raises(ValueError, match="Guided denoiser cannot be saved"):
        guided.save(tmp_path / "guided")
    run = distillation(guided, data, CONFIG, tmp_path / "run")
    assert type(run.model.denoiser) is momatch.Denoiser and type(run.method.teacher) is momatch.Guided
    for _ in run:
        pass
    student = run.finish()
    assert torch.equal(student.sample(2, seed=3), momatch.load_student(tmp_path / "run").sample(2, seed=3))


def test_an_unconditional_teacher_on_pictures_without_classes(data):
    from momatch.config.schema import TeacherConfig
    from momatch.networks.configs import UNetConfig
    from momatch.training.build import teacher_training

    plain = ImageSet(data.train.images, torch.zeros(len(data.train), dtype=torch.long), 1, "plain")
    split = Split(plain, plain)
    config = TeacherConfig(
        network=UNetConfig(channels=(8,)), train=CONFIG.train, monitor=MonitorConfig(every=0)
    )
    run = teacher_training(split, config)
    for _ in run:
        pass
    model = run.finish()
    assert model.num_classes == 0
    student = distill(model, split, dataclasses.replace(CONFIG, steps=2))
    assert student.sample(2).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        student.sample(2, cond={"label": torch.tensor([0, 1])})


def test_the_best_distance_so_far_survives_a_resume(data, tmp_path):
    """So that the alarm for a rising distance works after one."""
    log = runs._Log(RunFolder(tmp_path))
    rows = [{"event": "look", "step": step, "frechet": f} for step, f in ((4, 2.0), (8, 1.0), (12, 3.0))]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"event": "look", "st'
    )
    assert [log.best_before(step) for step in (4, 5, 9)] == [float("inf"), 2.0, 1.0]


def monitor(model: Model, data: Split) -> Monitor:
    return Monitor(model, data.train, PixelFeatures(), 100, None)


def test_sane_outputs_raise_no_alarm_and_mad_ones_do(teacher, data):
    watch = monitor(teacher, data)
    sane = {"student_mean": watch.data_mean, "student_std": watch.data_std, "student_saturation": 0.01}
    assert watch.check(sane) == [] and watch.check({}) == []
    for name, value, says in (
        ("student_std", 0.3 * watch.data_std, "standard deviation"),
        ("student_mean", watch.data_mean + watch.data_std, "mean"),
        ("student_saturation", 0.4, "outside"),
        ("student_std", float("nan"), "standard deviation"),
    ):
        (alarm,) = watch.check({**sane, name: value})
        assert says in alarm


def test_latents_may_lie_outside_the_range_of_pictures(teacher):
    """Of deviation 1 a quarter lies beyond ±1.1; that is no alarm, and half is one."""
    latents = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = ImageSet(latents, torch.zeros(200, dtype=torch.long), 1, "latents", space="latents")
    watch = Monitor(teacher, data, PixelFeatures(), 100, None)
    metrics = {"student_mean": watch.data_mean, "student_std": watch.data_std}
    assert watch.check({**metrics, "student_saturation": 0.28}) == []
    assert "of the data's 27%" in watch.check({**metrics, "student_saturation": 0.5})[0]


def test_a_collapsing_model_raises_the_alarm(data):
    model = momatch.load_teacher("digits")
    watch = monitor(model, data)
    look, alarms = watch.look(1)
    assert look.frechet > 0 and alarms == []
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(0.0)
    assert "rose" in watch.look(2)[1][0]
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.fill_(float("nan"))
    assert "not finite" in watch.look(3)[1][0]


class Counting(PixelFeatures):
    """Counts the pictures that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return super().__call__(images)


@pytest.mark.parametrize("every", [0, 1])
def test_features_of_the_training_set_are_extracted_once_there_are_previews_to_compare(
    every, teacher, data, tmp_path, monkeypatch
):
    spy = Counting()
    monkeypatch.setattr(runs, "feature_extractor", lambda *_: spy)
    watched = MonitorConfig(every=every, num_samples=100)
    run = distillation(teacher, data, dataclasses.replace(CONFIG, monitor=watched), tmp_path)
    previews = sum(event.look is not None for event in run)
    assert spy.seen == (len(data.train) + 100 * previews if every else 0) and bool(previews) == bool(every)
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])  # what alarms go by is there
    assert start["data_std"] == pytest.approx(float(data.train.images.std()))


@pytest.mark.parametrize("when", ["under way", "before the end"])
def test_a_folder_that_is_taken_away_ends_the_run_and_the_command_begins_anew(when, teacher, data, tmp_path):
    config = DistillConfig(
        steps=2, train=TrainConfig(num_steps=4, batch_size=4, checkpoint_every=1, log_every=1)
    )
    run = distillation(teacher, data, config, tmp_path / "run")
    with pytest.raises(RunError, match="was removed.* while the run went on"):
        for event in run:
            if when == "under way" and event.record.step == 2:
                shutil.rmtree(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        run.finish()
    again = distillation(teacher, data, config, tmp_path / "run")
    assert [event.record.step for event in again] == [1, 2, 3, 4] and again.finish().is_student
