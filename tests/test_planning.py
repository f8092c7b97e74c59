import copy
import gc
import itertools
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from momatch.cli.plan import render
from momatch.config import AlternatingConfig, InstantConfig
from momatch.config.schema import (
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)
from momatch.data.images import ImageSet, Split
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.models.model import Model
from momatch.networks.configs import UNetConfig
from momatch.networks.unet import UNet
from momatch.training import memory
from momatch.training import plan as planning
from momatch.training.build import distillation, teacher_training
from momatch.training.loop import Record, train
from momatch.training.optim import Optimizer
from momatch.utils.errors import ConfigError
from momatch.utils.text import format_bytes, format_seconds

NETWORK = UNetConfig(channels=(8, 16), num_classes=3, embedding_dim=16)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(NETWORK), "v", {"label": 3})
    return Model(denoiser, NETWORK, schedules.cosine(), (1, 8, 8), 64, 3, {"role": "teacher"})


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(torch.rand(40, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(40) % 3, 3, "random")
    return Split(images, images)


def distill_config(batch_size=16, update="alternating", **fields):
    fields = {"method": AlternatingConfig(update), **fields}
    return DistillConfig(train=TrainConfig(num_steps=1000, batch_size=batch_size), **fields)


def activations(teacher, data, config, step=0):
    run = distillation(teacher, data, config)
    return memory.activation_bytes(
        run.method, run.batches, step, {"teacher": teacher.denoiser, **run.method.trainable}
    )


def test_memory_of_weights_has_its_closed_form(teacher, data):
    found = planning.plan(distill_config(), teacher, data, probe_seconds=0)
    parameters = sum(p.numel() for p in teacher.denoiser.parameters())
    by_role = {n.role: n for n in found.networks}
    assert list(by_role) == ["teacher", "student", "auxiliary"]
    assert all(n.parameters == parameters and n.weights == 4 * parameters for n in found.networks)
    assert (by_role["teacher"].gradients, by_role["teacher"].optimizer_state) == (0, 0)
    for role in ("student", "auxiliary"):
        assert (by_role[role].gradients, by_role[role].optimizer_state) == (4 * parameters, 4 * parameters)
    assert found.data == 40 * 8 * 8 * 4
    rest = found.activations + found.workspace + found.data
    assert found.memory == 4 * parameters * (1 + 3 + 3) + rest


def allocated(method, batches, config):
    """Most bytes that the allocator had given out at a time in a step of each kind: torch's own account."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recording:
        records = train(method, batches, config.train, config.optim)
        next(records), next(records)
        gc.collect()
        begun = time.time_ns()
        next(records), next(records)
        records.close()
    events = [e for e in recording.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = itertools.accumulate(e.nbytes() for e in events)
    return max(size for size, event in zip(held, events, strict=True) if event.start_ns() >= begun)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update": "joint"},
        {"guidance": GuidanceConfig(scale=1.0)},
        {"method": InstantConfig(lambda_steps=1)},
        {"method": InstantConfig(lambda_steps=1, product="difference")},
        {"method": InstantConfig(lambda_steps=1, centre=True), "source": "data"},
    ],
    ids=("alternating", "joint", "guided", "instant", "difference", "centred"),
)
def test_memory_is_what_the_allocator_gives_out(teacher, data, options):
    config = distill_config(batch_size=32, **options)
    run = distillation(teacher, data, config)
    weights = planning.network_cost("teacher", teacher.denoiser).weights
    before = weights * (2 if config.method.name == "instant" else 1)  # θ, and Λ
    peak = before + allocated(run.method, run.batches, config)
    found = planning.plan(config, teacher, data, probe_seconds=0)
    # Kernels have a workspace of their own, some 50 kB, which nothing but the allocator sees.
    assert found.memory - found.data == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_optimizer_state_is_what_the_optimizer_holds(teacher, beta1):
    network = copy.deepcopy(teacher.denoiser).requires_grad_(True)
    config = OptimConfig(beta1=beta1)
    optimizer = Optimizer(network, config)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for key, t in optimizer.state().items() if key != "step")
    assert planning.network_cost("student", network, config).optimizer_state == held


def test_activations_grow_in_proportion_to_the_batch(teacher, data):
    one, four = (activations(teacher, data, distill_config(size)) for size in (16, 64))
    assert four == pytest.approx(4 * one, rel=0.01)
    feature_map = 16 * 8 * 8 * 8 * 4  # batch × channels × pixels × bytes
    assert 5 * feature_map < one < 50 * feature_map


def test_joint_step_keeps_the_activations_of_both_networks(teacher, data):
    alternating = [activations(teacher, data, distill_config(), step) for step in (0, 1)]
    joint = activations(teacher, data, distill_config(update="joint"))
    assert joint == pytest.approx(sum(alternating), rel=0.05)


def test_activations_leave_out_the_weights(data):
    config = TeacherConfig(network=NETWORK, train=TrainConfig(batch_size=1))
    run = teacher_training(data, config)
    networks = dict(run.method.trainable)
    with_weights = memory.activation_bytes(run.method, run.batches, 0, {})
    without = memory.activation_bytes(run.method, run.batches, 0, networks)
    weights = planning.network_cost("teacher", networks["teacher"]).weights
    assert 0.5 * weights < with_weights - without < 1.01 * weights


@pytest.mark.parametrize(("update", "units"), [("alternating", 5), ("joint", 7)])
def test_forward_units_are_the_calls_that_a_step_makes(teacher, data, update, units):
    config = distill_config(update=update)
    run = distillation(teacher, data, config)
    calls = []
    for network in (teacher.denoiser, *run.method.trainable.values()):
        network.register_forward_hook(lambda *_: calls.append(1))
    for step in (0, 1):
        calls.clear()
        losses = run.method.step(step, run.batches(step)).losses
        assert len(calls) + 2 * len(losses) == units == planning.forward_units(config)
    assert planning.forward_units(TeacherConfig()) == 3


def test_time_adds_up(teacher, data):
    config = distill_config(monitor=MonitorConfig(every=250, num_samples=100))
    found = planning.plan(config, teacher, data, probe_seconds=0.3)
    assert found.probe_steps >= 2 and found.probe_steps % 2 == 0
    assert found.images_per_second == pytest.approx(16 / found.seconds_per_step)
    per_forward = found.seconds_per_step / (5 * 16)
    assert found.look_seconds == pytest.approx(4 * 100 * 8 * per_forward)
    assert found.seconds == pytest.approx(1000 * found.seconds_per_step + found.look_seconds)
    unwatched = replace(found, look_seconds=0.0)
    never = planning.plan(distill_config(monitor=MonitorConfig(every=0)), teacher, data, probe_seconds=0)
    assert never.look_seconds == 0 and unwatched.seconds < found.seconds


def test_nothing_is_trained_and_nothing_written(teacher, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(teacher.denoiser.state_dict())
    state = torch.get_rng_state()
    planning.plan(distill_config(), teacher, data, probe_seconds=0)
    after = teacher.denoiser.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(state, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_teacher(data):
    config = TeacherConfig(network=NETWORK, train=TrainConfig(num_steps=500, batch_size=8))
    found = planning.plan(config, data=data, probe_seconds=0)
    assert [n.role for n in found.networks] == ["teacher"] and found.forward_units == 3
    assert found.networks[0].optimizer_state == 8 * found.networks[0].parameters


def test_plan_refuses_what_the_run_would_refuse(teacher, data):
    with pytest.raises(ConfigError, match="steps is 17"):
        planning.plan(distill_config(steps=17), teacher, data)
    wide = ImageSet(torch.zeros(40, 1, 16, 16), torch.arange(40) % 3, 3, "wide")
    with pytest.raises(ConfigError, match="shape"):
        planning.plan(distill_config(), teacher, Split(wide, wide))


def test_render_shows_every_part(teacher, data):
    found = replace(
        planning.plan(distill_config(), teacher, data, probe_seconds=0),
        seconds_per_step=0.2,
        look_seconds=3.0,
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(render(found))
    text = console.export_text()
    for part in (
        "teacher",
        "auxiliary",
        "activations",
        "forward passes; a backward",
        "a picture, and so",
        "80 images/s",
        "3.3 min",
        f"{found.networks[0].parameters:,}",
    ):
        assert part in text
    assert format_bytes(found.memory) in text


def test_pictures_stay_in_main_memory_beside_a_gpu(teacher, data):
    here = planning.plan(distill_config(), teacher, data, probe_seconds=0)
    there = replace(here, device="cuda:0")
    assert here.data > 0 and there.memory == here.memory - here.data
    for found, said in ((here, False), (there, True)):
        console = Console(width=100, record=True, file=open("/dev/null", "w"))
        console.print(render(found))
        assert ("in main memory" in console.export_text()) == said


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 KiB"),
        (700 * 2**20, "700 MiB"),
        (2**30, "1 GiB"),
        (2**60, "1048576 TiB"),
    ],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.72, "0.7 s"), (45, "45 s"), (203.0, "3.4 min"), (18720, "5.2 h"), (181440, "2.1 days")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_probe_leaves_out_the_warm_up_and_times_whole_pairs(teacher, data, monkeypatch):
    def slow_start(method, batches, config, optim):
        for i in range(config.num_steps):
            cheap_or_dear = 1.0 if i % 2 == 0 else 3.0
            clock.append(clock[-1] + (50.0 if i < planning.WARMUP_STEPS else cheap_or_dear))
            yield Record(i + 1, 0, clock[-1])

    monkeypatch.setattr(planning, "train", slow_start)
    for seconds, expected_steps in ((0.0, 2), (101.0, 2), (105.0, 4), (110.5, 6)):
        clock = [0.0]
        per_step, steps = planning.probe(distillation(teacher, data, distill_config()), seconds)
        assert (per_step, steps) == (2.0, expected_steps)
