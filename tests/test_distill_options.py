"""Every option of a distillation, on a tiny network: it runs, resumes, refuses, and is planned."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

import momatch
from momatch.config import AlternatingConfig, InstantConfig
from momatch.config import files as config_files
from momatch.config.recipes import RECIPES, recipe
from momatch.config.schema import (
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    ScheduleConfig,
    StoppingConfig,
    TeacherConfig,
    TrainConfig,
    to_json,
)
from momatch.data.sources import load_data
from momatch.evaluation.report.html import read_run, write_report
from momatch.interop.load import load_teacher
from momatch.methods.base import Batch
from momatch.models.model import load_model
from momatch.networks import registry
from momatch.training import memory
from momatch.training import plan as planning
from momatch.training.build import distillation, teacher_training
from momatch.training.monitor import Look
from momatch.training.stopping import Smoothed, Stopper
from momatch.utils.errors import ConfigError, UsageError
from tiny_models import UNET, UVIT, make_teacher, random_pictures

CONFIG = DistillConfig(
    method=InstantConfig(lambda_steps=3),
    train=TrainConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2),
    monitor=MonitorConfig(every=0),
)


@pytest.fixture
def data():
    return random_pictures()


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.denoiser.parameters()])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, method=InstantConfig(lambda_steps=3, product="difference", centre=True)),
        replace(CONFIG, guidance=GuidanceConfig(1.0, -5, 5, "dynamic"), steps=2),
        replace(CONFIG, method="alternating", posterior="fresh", student_dropout=0.3),
        replace(CONFIG, method=AlternatingConfig("joint"), source="rollout", steps=3),
        replace(
            CONFIG, method="alternating", warm_start_steps=3, schedule=ScheduleConfig("cosine", shift=-1.0)
        ),
    ],
    ids=["instant", "centred difference", "guided", "fresh, dropout", "rollout", "warm start"],
)
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(config, data, tmp_path):
    unbroken = distillation(make_teacher(), data, config, tmp_path / "a")
    start = weights(unbroken)
    for _ in unbroken:
        pass
    first = distillation(make_teacher(), data, config, tmp_path / "b")
    events = first.events()
    for event in events:
        if event.record.step == 3:
            break
    events.close()
    resumed = distillation(make_teacher(), data, config, tmp_path / "b")
    for _ in resumed:
        pass
    assert torch.equal(weights(unbroken), weights(resumed))
    assert not torch.equal(weights(unbroken), start)
    model = resumed.finish()
    assert bool(model.sample(2).isfinite().all())
    assert load_model(tmp_path / "b" / "student").network == model.network


@pytest.mark.parametrize("network", [UNET, UVIT, replace(UVIT, channels=(), patch_size=2)])
def test_networks_are_saved_and_loaded_and_every_branch_learns(network, data, tmp_path):
    assert registry.from_json(json.loads(json.dumps(registry.to_json(network)))) == network
    run = distillation(make_teacher(network), data, replace(CONFIG, student_dropout=0.1))
    before = {k: v.clone() for k, v in run.model.denoiser.named_parameters()}
    for _ in run:
        pass
    still = [k for k, v in run.model.denoiser.named_parameters() if torch.equal(v, before[k])]
    assert not [k for k in still if "qkv.bias" not in k], still  # a key's bias changes nothing
    student = run.finish()
    student.save(tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    cond = {"label": torch.tensor([0, 1, 2])}
    assert torch.equal(student.sample(3, 2, cond, 1), loaded.sample(3, 2, cond, 1))


def test_a_guided_teacher_is_matched_where_guidance_acts(data):
    """With the same draws, a guided teacher gives another gradient, inside the interval alone."""

    def gradient(guidance: GuidanceConfig) -> torch.Tensor:
        config = replace(CONFIG, method="alternating", guidance=guidance)
        run = distillation(make_teacher(), data, config)
        run.method.step(1, run.batches(1)).losses["student"].backward()
        return torch.cat([p.grad.flatten() for p in run.model.denoiser.parameters()])

    plain, outside, inside = (
        gradient(GuidanceConfig(scale, low, high))
        for scale, low, high in ((0.0, -20, 20), (2.0, 30, 40), (2.0, -20, 20))
    )
    assert torch.equal(plain, outside) and not torch.allclose(plain, inside)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(method=InstantConfig()), "lambda_steps to 300"),
        (dict(warm_start_steps=6), "below train.num_steps"),
        (dict(student_dropout=1.0), "student_dropout is 1"),
        (dict(stopping=StoppingConfig(patience=3)), "needs previews"),
        (
            dict(method="alternating", stopping=StoppingConfig(within_noise=2.0), monitor=MonitorConfig(2)),
            "method=alternating logs nothing that falls to 0",
        ),
        (
            dict(method=InstantConfig(centre=True), source="rollout"),
            "method=instant, as it is set, needs source=data",
        ),
    ],
)
def test_impossible_combinations_are_refused_in_a_sentence(changes, says, data):
    with pytest.raises(ConfigError, match=says):
        distillation(make_teacher(), data, replace(CONFIG, **changes))


def test_impossible_guidance_is_refused_when_it_is_made():
    with pytest.raises(ConfigError, match="below guidance.logsnr_max"):
        GuidanceConfig(1.0, 3, -3)
    with pytest.raises(ConfigError, match="guidance.scale is -1"):
        GuidanceConfig(-1.0)


def test_guidance_needs_a_null_condition_and_forward_mode_a_network_that_has_it(data):
    teacher = make_teacher()
    teacher.denoiser.null_values.clear()
    with pytest.raises(ConfigError, match="no null condition"):
        distillation(teacher, data, replace(CONFIG, guidance=GuidanceConfig(1.0)))

    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Wrapped(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, z, logsnr, cond=None):
            return Old.apply(self.network(z, logsnr, cond))

    teacher = make_teacher()
    teacher.denoiser.network = Wrapped(teacher.denoiser.network)
    with pytest.raises(UsageError, match="method.product=difference"):
        distillation(teacher, data, replace(CONFIG, method=InstantConfig("forward", 1)))


def test_second_moments_are_estimated_once_kept_with_the_run_and_checked(data, tmp_path):
    distillation(make_teacher(), data, CONFIG, tmp_path)
    kept = (tmp_path / "second-moments.safetensors").read_bytes()
    again = distillation(make_teacher(), data, CONFIG, tmp_path)
    assert (tmp_path / "second-moments.safetensors").read_bytes() == kept
    scales = again.method.preconditioner.values()
    assert not all(torch.equal(s, torch.full_like(s, float(s.flatten()[0]))) for s in scales)
    with pytest.raises(ConfigError, match="another shape"):
        save_file({"a": torch.ones(2)}, tmp_path / "second-moments.safetensors")
        distillation(make_teacher(), data, CONFIG, tmp_path)


def test_two_processes_cannot_train_in_one_folder(data, tmp_path):
    run = distillation(make_teacher(), data, CONFIG, tmp_path / "run")
    events = run.events()
    next(events)
    with pytest.raises(ConfigError, match="another process"):
        next(distillation(make_teacher(), data, CONFIG, tmp_path / "run").events())
    events.close()
    assert len(list(distillation(make_teacher(), data, CONFIG, tmp_path / "run"))) == 5
    assert FileLock(tmp_path / "run" / ".lock", timeout=0).acquire()


def look(step: int, frechet: float) -> Look:
    return Look(step, frechet, 100, "pixels", "held back", None)


def test_patience_counts_looks_without_a_better_one():
    stopper = Stopper(StoppingConfig(patience=2))
    assert [stopper.see_look(look(i, f)) for i, f in enumerate([3.0, 2.0, 2.5, 1.9, 2.0, 2.1])] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert "2 previews" in (stopper.reason({}) or "")


def test_the_smoothed_loss_stops_a_run_at_zero_or_at_its_floor():
    smoothed = Smoothed("instant_loss", 4)
    found = [smoothed.update({"instant_loss": v}) for v in (1.0, 3.0, 1.0, 3.0, 2.0)]
    assert found[:3] == [{}] * 3
    assert found[3] == {"instant_loss_mean": 2.0, "instant_loss_error": pytest.approx(math.sqrt(4 / 3 / 4))}
    rule = StoppingConfig(within_noise=2.0, window=3)
    stopper = Stopper(rule)
    said = [stopper.reason({"instant_loss_mean": 0.1, "instant_loss_error": 0.06}) for _ in range(4)]
    assert said[:3] == [None] * 3 and "within 2 standard errors (0.06) of 0" in (said[3] or "")
    stopper, said = Stopper(rule), []
    for mean in (9.0, 5.0, 4.9, 4.95, 4.9, 4.9):
        said.append(stopper.reason({"instant_loss_mean": mean, "instant_loss_error": 0.1}))
    assert said[:4] == [None] * 4 and "has not fallen" in (said[4] or "")


def test_one_outlier_does_not_end_a_run():
    """It makes the mean of its window as large as the standard error."""
    rule = StoppingConfig(within_noise=2.0, window=5)
    smoothed, stopper = Smoothed("instant_loss", rule.window), Stopper(rule)
    losses = [0.13, 0.12, 0.14, 0.13, 5.4, 0.13, 0.12, 0.13, 0.11, 0.12, 0.1, 0.09, 0.08]
    found = [smoothed.update({"instant_loss": value}) for value in losses]
    assert any(f and f["instant_loss_mean"] < 2 * f["instant_loss_error"] for f in found)
    assert not any(stopper.reason(f) for f in found)


def test_a_loss_that_rises_first_stops_no_run_before_it_has_stopped_falling():
    stopper, said = Stopper(StoppingConfig(within_noise=2.0, window=3)), []
    rise, fall, floor = (0.5, 0.4, 0.6, 0.9, 1.5, 2.0, 1.9), (1.6, 1.2, 0.9), (0.85, 0.9, 0.85)
    for mean in rise + fall + floor:
        said.append(stopper.reason({"instant_loss_mean": mean, "instant_loss_error": 0.1}))
    assert said[:-1] == [None] * 12 and "has not fallen" in (said[-1] or "")


def test_a_run_that_stops_keeps_the_best_student_says_why_and_stays_stopped(data, tmp_path, monkeypatch):
    from momatch.training import run as runs

    values = iter([5.0, 2.0, 3.0, 4.0])

    class Looks(runs.Monitor):
        def look(self, step):
            return look(step, next(values)), []

    monkeypatch.setattr(runs, "Monitor", Looks)
    config = replace(
        CONFIG,
        train=TrainConfig(num_steps=40, batch_size=4, log_every=1),
        monitor=MonitorConfig(every=2),
        stopping=StoppingConfig(patience=2, held_back=0.2),
    )
    run = distillation(make_teacher(), data, config, tmp_path)
    assert len(run.reference) == 18 and len(run.data) == 72
    after = {}
    for event in run:
        after[event.record.step] = copy.deepcopy(run.model.denoiser.state_dict())
    assert max(after) == 8 and event.stopped
    student = run.finish()
    assert all(torch.equal(v, after[4][k]) for k, v in student.denoiser.state_dict().items())
    resumed = distillation(make_teacher(), data, config, tmp_path)
    assert list(resumed) == []
    again = resumed.finish()
    assert all(torch.equal(v, after[4][k]) for k, v in again.denoiser.state_dict().items())
    write_report(tmp_path)
    report = (tmp_path / "report.html").read_text()
    assert "2 previews without a Fréchet distance below 2" in report
    assert read_run(tmp_path).is_complete


def test_the_plan_of_an_instant_run_counts_what_it_holds(data):
    """No auxiliary and one optimizer; the teacher's gradient (which becomes ν) and Λ instead."""
    teacher = make_teacher()
    size = 4 * sum(p.numel() for p in teacher.denoiser.parameters())
    found = planning.plan(CONFIG, teacher, data, probe_seconds=0)
    by_role = {n.role: n for n in found.networks}
    assert list(by_role) == ["teacher", "student"]
    assert by_role["teacher"].memory == 3 * size and by_role["student"].memory == 3 * size
    run = distillation(teacher, data, CONFIG)
    assert sum(v.numel() * 4 for v in run.method.preconditioner.values()) == size
    assert found.forward_units == 10


def test_an_instant_step_holds_one_graph_at_a_time(data):
    """The teacher's graph is gone when the student's is made: the peak is one network's."""
    peaks = {}
    for method, steps in (("instant", (0,)), ("alternating", (0, 1))):
        chosen = CONFIG.method if method == "instant" else method
        config = replace(CONFIG, method=chosen, train=TrainConfig(num_steps=6, batch_size=32))
        teacher = make_teacher()
        run = distillation(teacher, data, config)
        networks = {"teacher": teacher.denoiser, **run.method.trainable}
        peaks[method] = max(
            memory.activation_bytes(run.method, run.batches, step, networks) for step in steps
        )
    assert peaks["instant"] == pytest.approx(peaks["alternating"], rel=0.1)


def test_batches_of_an_instant_run_hold_two_minibatches(data):
    run = distillation(make_teacher(), data, CONFIG)
    batch = run.batches(0)
    a, b = batch.halves()
    assert len(a.x) == len(b.x) == 4 and not torch.equal(a.x, b.x)
    assert isinstance(a, Batch) and torch.equal(
        torch.cat([a.cond["label"], b.cond["label"]]), batch.cond["label"]
    )


def test_configs_with_every_option_survive_json():
    config = replace(
        CONFIG,
        guidance=GuidanceConfig(1.5),
        stopping=StoppingConfig(patience=2),
        monitor=MonitorConfig(2),
        posterior="fresh",
    )
    assert config_files.from_json(to_json(config), DistillConfig) == config


IMAGENET = [name for name in RECIPES if name.startswith("imagenet")]


@pytest.mark.parametrize("name", IMAGENET)
def test_the_paper_s_recipes_are_the_size_they_say_and_are_planned_from_shapes(name):
    config = recipe(name)
    resolution = 64 if "64" in name else 128
    teacher = recipe(f"imagenet{resolution}-teacher")
    found = planning.outline(config, teacher)
    assert 3.5e8 < found.networks[0].parameters < 4.5e8
    roles = [n.role for n in found.networks]
    assert roles == (
        ["teacher"] if "teacher" in name else ["teacher", "student"] + ["auxiliary"] * ("alternating" in name)
    )
    assert found.probe_steps == 0 and found.seconds_per_step > 0 and found.activations > 2048 * 1e6


def test_an_outline_agrees_with_a_plan_that_is_measured(data):
    """The same small network both ways: parameters, memory and activations."""
    config = replace(CONFIG, method="alternating")
    measured = planning.plan(config, make_teacher(UVIT), data, probe_seconds=0)
    outlined = planning.outline(config, TeacherConfig(network=UVIT, image_size=8))
    assert outlined.networks == measured.networks
    assert outlined.forward_units == measured.forward_units
    assert outlined.activations == pytest.approx(measured.activations, rel=0.15)


@pytest.mark.parametrize("name", ["imagenet64-alternating-1", "imagenet64-instant-8"])
def test_the_paper_s_recipes_run_thin_on_a_made_folder(name, tmp_path):
    """Two steps each of teacher and student, with the recipe's own resizing, schedule and weights."""
    rng = np.random.default_rng(0)
    for label in range(4):
        folder = tmp_path / "imagenet" / f"n{label}"
        folder.mkdir(parents=True)
        for i in range(25):
            picture = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{i}.jpg")
    full = recipe("imagenet64-teacher")
    thin = replace(full.network, channels=(8, 8, 8), blocks_per_level=1, width=16, depth=1, embedding_dim=16)
    common = dict(
        train=TrainConfig(num_steps=2, batch_size=2, log_every=1),
        monitor=MonitorConfig(0),
        data=str(tmp_path / "imagenet"),
    )
    pictures = load_data(common["data"], full.image_size)
    run = teacher_training(pictures, replace(full, network=thin, **common), tmp_path / "teacher")
    assert [event.record.step for event in run] == [1, 2]
    assert run.finish().sample_shape == (3, 64, 64)
    config = replace(recipe(name), teacher=str(tmp_path / "teacher"), **common)
    run = distillation(load_teacher(config.teacher), pictures, config, tmp_path / "student")
    assert [event.record.step for event in run] == [1, 2]
    assert bool(run.finish().sample(1).isfinite().all())


def test_a_teacher_s_dropout_stays_with_the_teacher(data):
    """The paper distils without dropout; only student_dropout brings it back, and never to the auxiliary."""
    teacher = make_teacher(replace(UNET, dropout=0.4))

    def rates(module):
        return {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}

    for wanted in (0.0, 0.2, 0.4):
        config = replace(CONFIG, method="alternating", student_dropout=wanted)
        run = distillation(teacher, data, config)
        assert rates(run.method.student) == {wanted} and run.model.network.dropout == wanted
        assert rates(run.method.auxiliary) == {0.0}


def test_an_estimate_left_by_another_run_is_not_taken(data, tmp_path):
    """A run that failed before its first step leaves an estimate; another teacher must not use it."""
    distillation(make_teacher(), data, CONFIG, tmp_path)
    stale = (tmp_path / "second-moments.safetensors").read_bytes()
    other = make_teacher()
    with torch.no_grad():
        next(other.denoiser.parameters()).mul_(3.0)
    distillation(other, data, CONFIG, tmp_path)
    assert (tmp_path / "second-moments.safetensors").read_bytes() != stale


def test_forward_units_count_rollouts():
    units = {
        (method, source): planning.forward_units(replace(CONFIG, method=method, source=source, steps=5))
        for method in ("alternating", "instant")
        for source in ("data", "rollout")
    }
    assert list(units.values()) == [5, 7, 10, 14]


@pytest.mark.parametrize(("clip", "kept"), [("none", None), ("static", 1.0), ("dynamic", None)])
def test_a_student_is_kept_in_range_where_its_guided_teacher_is(clip, kept, data):
    teacher = make_teacher()
    config = replace(CONFIG, method="alternating", guidance=GuidanceConfig(scale=1.0, clip=clip))
    run = distillation(teacher, data, config)
    assert run.model.denoiser.clip == kept
    assert {network.clip for network in run.method.trainable.values()} == {kept}
    assert teacher.denoiser.clip is None


RULES = {
    "patience": (StoppingConfig(patience=2, held_back=0.2), 6),
    "smoothed loss": (StoppingConfig(within_noise=2.0, window=6, held_back=0.2), 50),
}


@pytest.mark.parametrize("rule", RULES)
def test_an_interrupted_run_stops_where_an_unbroken_one_does(rule, data, tmp_path, monkeypatch):
    """What a stopping rule has seen is read from the log; a preview made again after a kill counts once."""
    from momatch.training import run as runs

    class Looks(runs.Monitor):
        def look(self, step):
            return look(step, {6: 5.0, 12: 2.0, 18: 3.0}.get(step, 4.0)), []

    monkeypatch.setattr(runs, "Monitor", Looks)
    stopping, every = RULES[rule]
    config = replace(
        CONFIG,
        method=InstantConfig(lambda_steps=0),
        train=TrainConfig(num_steps=60, batch_size=4, log_every=1, checkpoint_every=5),
        monitor=MonitorConfig(every=every),
        stopping=stopping,
    )
    teacher = momatch.load_teacher("digits")
    digits = momatch.load_data("digits")
    unbroken = distillation(teacher, digits, config, tmp_path / "unbroken")
    events = list(unbroken)
    assert events[-1].stopped and events[-1].record.step < 60
    folder = tmp_path / "broken"
    for leave in (8, 14, 20, 99):
        broken = distillation(teacher, digits, config, folder)
        for event in broken:
            if event.record.step == leave:
                break
        newest = sorted((folder / "checkpoints").glob("step-*.safetensors"))
        if leave < 99 and len(newest) > 1:
            newest[-1].unlink()  # as a kill would have left it: the log is ahead of the checkpoint
    assert event.stopped == events[-1].stopped and event.record.step == events[-1].record.step
    assert broken.finish().fingerprint() == unbroken.finish().fingerprint()


def test_an_error_in_a_preview_saves_no_step_that_the_log_does_not_have(data, tmp_path, monkeypatch):
    from momatch.training import run as runs

    def fails(self, step):
        raise MemoryError("no room for a preview")

    config = replace(
        CONFIG,
        train=TrainConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2),
        monitor=MonitorConfig(every=3),
    )
    whole = distillation(make_teacher(), data, config)
    monkeypatch.setattr(runs.Monitor, "look", lambda self, step: (look(step, 1.0), []))
    list(whole)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Monitor, "look", fails)
        with pytest.raises(MemoryError):
            list(distillation(make_teacher(), data, config, tmp_path))
    names = [path.stem for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000002"]
    resumed = distillation(make_teacher(), data, config, tmp_path)
    list(resumed)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "instant_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_folder_of_somebody_s_is_refused_and_left_as_it_is(data, tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and no run"):
        list(distillation(make_teacher(), data, replace(CONFIG, method="alternating"), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.txt"]


def test_names_in_place_of_models_data_and_configs_are_a_sentence(data):
    teacher, config = make_teacher(), replace(CONFIG, method="alternating")
    for arguments, says in (
        (("digits", data, config), "teacher is 'digits'; give a model"),
        ((teacher, "digits", config), "data is 'digits'; give what momatch.load_data returns"),
        ((teacher, data, "digits-8"), "config is a str; give a DistillConfig"),
        ((teacher, data, TeacherConfig()), "config is a TeacherConfig; give a DistillConfig"),
    ):
        with pytest.raises(ConfigError, match=says):
            momatch.distill(*arguments)
