"""Where a run computes, and in which precision. On a GPU: make test-gpu."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import momatch
from momatch import cli
from momatch.config import AlternatingConfig, InstantConfig
from momatch.config.schema import (
    AdapterConfig,
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    StoppingConfig,
    TeacherConfig,
    TrainConfig,
)
from momatch.data.paraphrases import Wordings
from momatch.diffusion.denoiser import Guided, Thresholded
from momatch.evaluation.efficientnet import EfficientNetFeatures
from momatch.evaluation.evaluate import evaluate_at
from momatch.evaluation.features import extract
from momatch.methods.jvp import difference_product, forward_product
from momatch.models.model import Model, load_model
from momatch.training import batches
from momatch.training.batches import image_batches
from momatch.training.build import distillation, teacher_training
from momatch.training.plan import plan
from momatch.utils import devices, seeding
from momatch.utils.errors import ConfigError, UsageError
from tiny_models import UNET, UVIT, make_teacher, random_pictures

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
CONFIG = DistillConfig(
    steps=2,
    train=TrainConfig(num_steps=4, batch_size=4, log_every=1, checkpoint_every=2),
    monitor=MonitorConfig(every=2, num_samples=100),
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, method=InstantConfig(lambda_steps=2)),
    replace(CONFIG, method=InstantConfig(lambda_steps=2, product="difference", centre=True)),
    replace(
        CONFIG,
        method=AlternatingConfig("joint"),
        source="rollout",
        guidance=GuidanceConfig(1.0, -5, 5, "dynamic"),
    ),
    replace(CONFIG, guidance=GuidanceConfig(1.0, clip="static"), student_dropout=0.3),
    replace(CONFIG, adapter=AdapterConfig(rank=2), stopping=StoppingConfig(patience=9, held_back=0.5)),
]
NAMES = ["alternating", "instant", "difference", "rollout", "dropout", "adapter"]


@pytest.fixture
def data():
    return random_pictures()


def weights(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.denoiser.parameters()])


def finished(config, data, directory=None, network=UNET) -> Model:
    run = distillation(make_teacher(network), data, config, directory)
    for _ in run:
        pass
    return run.finish()


@pytest.mark.parametrize("name", ["quantum", "cuda:99", "meta", "", "cpu:7", "hpu", "privateuseone"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(name, data):
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used here.*; use cpu") as refused:
        distillation(make_teacher(), data, replace(CONFIG, device=name))
    assert len(str(refused.value)) < 200


def test_the_command_line_refuses_a_device_before_any_work(tmp_path, capsys):
    commands = (
        ["sample", "digits"],
        ["evaluate", "digits"],
        ["guidance", "digits"],
        ["serve", "digits"],
        ["demo", "--out", f"{tmp_path / 'a'}"],
        ["distill", "digits-8", "--out", f"{tmp_path / 'b'}"],
        ["train-teacher", "digits-teacher", "--out", f"{tmp_path / 'c'}"],
        ["plan", "digits-8"],
    )
    for command in commands:
        assert cli.main([*command, "--device", "cuda:99"]) == 2, command
        said = capsys.readouterr().err
        assert said.startswith("momatch: device 'cuda:99' cannot be used here") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_auto_is_a_gpu_if_there_is_one():
    assert devices.resolve().type == ("cuda" if torch.cuda.is_available() else "cpu")


@DEVICES
@pytest.mark.parametrize("network", [UNET, UVIT], ids=["unet", "uvit"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_every_option_trains_and_resumes_there(config, network, device, data, tmp_path):
    config = replace(config, device=device)
    unbroken = finished(config, data, tmp_path / "a", network)
    first = distillation(make_teacher(network), data, config, tmp_path / "b").events()
    next(first), next(first), next(first)
    first.close()
    resumed = finished(config, data, tmp_path / "b", network)
    assert unbroken.device.type == resumed.device.type == device
    # some sums of a GPU come in any order
    close = dict(rtol=0, atol=0) if device == "cpu" else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights(unbroken), weights(resumed), **close)
    assert not torch.equal(weights(resumed), weights(make_teacher(network)))
    cond = {"label": torch.tensor([0, 1, 2])}
    loaded = load_model(tmp_path / "b" / "student")
    assert loaded.device.type == "cpu"
    torch.testing.assert_close(loaded.to(device).sample(3, cond=cond), resumed.sample(3, cond=cond))


@GPU
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_gpu_computes_what_the_cpu_does(config, data, monkeypatch):
    """With the same noise, drawn on the CPU for both, the gradients are the same."""

    def drawn_on_the_cpu(draw):
        def drawn(*shape, generator=None, device=None, **options):
            if generator is None or generator.device.type != "cpu":
                return draw(*shape, generator=generator, device=device, **options)
            return draw(*shape, generator=generator, **options).to(device)

        return drawn

    made = []

    def one_generator(*path, device=None):
        if device is None:
            made.append(seeding.generator(*path))
        return made[-1]

    monkeypatch.setattr(batches, "generator", one_generator)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "randn", drawn_on_the_cpu(torch.randn))
    monkeypatch.setattr(torch, "rand", drawn_on_the_cpu(torch.rand))
    found = {}
    for device in ("cpu", "cuda"):
        run = distillation(make_teacher(), data, replace(config, device=device, student_dropout=0.0))
        for step in (0, 1):
            for loss in run.method.step(step, run.batches(step)).losses.values():
                loss.backward()
        learning = [p for network in run.method.trainable.values() for p in network.parameters()]
        found[device] = torch.cat([p.grad.cpu().flatten() for p in learning if p.grad is not None])
    size = found["cpu"].abs().max()
    torch.testing.assert_close(found["cuda"] / size, found["cpu"] / size, rtol=0, atol=2e-3)


@DEVICES
def test_the_same_pictures_and_wordings_are_drawn_everywhere(device):
    counts = torch.tensor([[1, 2], [2, 1], [1, 1]])
    tokens = torch.arange(2 * int(counts.sum()), dtype=torch.int8).view(-1, 2)
    conditions = {"t": Wordings(tokens, counts, 1.0, 2, "tokens")}
    images, labels = torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3)
    there = image_batches(images, labels, 64, 0, conditions, device)(5)
    here = image_batches(images, labels, 64, 0, conditions)(5)
    assert there.x.device.type == there.normal().device.type == device
    assert torch.equal(there.x.cpu(), here.x)
    draw = image_batches(images, labels, 64, 0, conditions, device)
    first, second = draw(5), draw(6)
    assert torch.equal(first.x, there.x) and not torch.equal(first.x, second.x)
    assert not torch.equal(first.normal(), second.normal())
    assert torch.equal(draw(5).normal(), draw(5).normal())
    for name in ("label", "t"):
        assert there.cond[name].device.type == device
        assert torch.equal(there.cond[name].cpu(), here.cond[name])
    assert torch.equal(there.cond["label"].cpu().float(), here.x.flatten())


@GPU
def test_a_run_may_move_to_another_device(data, tmp_path):
    events = distillation(make_teacher(), data, replace(CONFIG, device="cuda"), tmp_path).events()
    next(events)
    events.close()
    student = finished(replace(CONFIG, device="cpu"), data, tmp_path)
    assert student.device.type == "cpu"
    assert [row["step"] for row in log_of(tmp_path) if "event" not in row] == [1, 2, 3, 4]


def test_the_name_of_the_device_does_not_make_another_run(data, tmp_path):
    finished(replace(CONFIG, device="cpu"), data, tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["device"] == "cpu" == log_of(tmp_path)[0]["device"]
    assert not list(
        distillation(make_teacher(), data, replace(CONFIG, device="auto"), tmp_path)
    )  # it is complete
    del kept["precision"], kept["device"]  # as older folders
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert not list(distillation(make_teacher(), data, CONFIG, tmp_path))
    with pytest.raises(ConfigError, match="precision"):
        next(distillation(make_teacher(), data, replace(CONFIG, precision="bfloat16"), tmp_path).events())


@DEVICES
def test_a_teacher_is_trained_there(device, data, tmp_path):
    settings = TrainConfig(num_steps=3, batch_size=4)
    config = TeacherConfig(network=UNET, train=settings, monitor=MonitorConfig(3, 100), device=device)
    run = teacher_training(data, config, tmp_path)
    assert len(list(run)) == 3
    assert run.finish().device.type == device
    found = momatch.load_teacher(tmp_path)
    student = momatch.distill(
        found, data, replace(CONFIG, method=InstantConfig(lambda_steps=2), device=device)
    )
    assert student.device.type == found.device.type == device
    measured = plan(replace(CONFIG, device=device), found, data, probe_seconds=0.1)
    assert measured.device.partition(":")[0] == device and measured.seconds_per_step > 0


@DEVICES
def test_networks_give_there_what_they_give_on_the_cpu(device):
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logsnr, label = torch.tensor([-5.0, 0.0, 5.0]), torch.tensor([0, 3, 2])
    for network in (UNET, UVIT):
        model = make_teacher(network)
        guided = GuidanceConfig(2.0, -6, 6, "dynamic").apply(model.denoiser)
        here = guided(z, logsnr, {"label": label})
        model.to(device)
        there = guided(z.to(device), logsnr.to(device), {"label": label.to(device)})
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


@DEVICES
def test_samples_are_measured_and_drawn_there(device, tmp_path, capsys):
    model, digits = momatch.load_teacher("digits").to(device), momatch.load_data("digits")
    row = evaluate_at(model, "teacher", digits, 2, 300, resamples=5)
    assert row.samples_per_second > 0
    for out in (tmp_path / "grid.png", tmp_path / "samples.npz"):
        arguments = ["sample", "digits", "--num", "4", "--steps", "2", "--device", device, "--out", f"{out}"]
        assert cli.main(arguments) == 0
    assert np.load(tmp_path / "samples.npz")["images"].shape == (4, 8, 8, 1)


@GPU
def test_features_there_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here, there = (extract(EfficientNetFeatures(device), images) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


@DEVICES
def test_half_precision_is_the_networks_alone_and_of_training_alone(device, data):
    low = replace(CONFIG, device=device, precision="bfloat16")
    run = distillation(make_teacher(), data, low)
    assert run.method.teacher.precision == run.method.student.precision == "bfloat16"
    assert run.method.auxiliary.precision == "bfloat16"
    inside = []
    hook = run.method.student.network.register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    x = run.model.denoiser(torch.zeros(2, 1, 8, 8, device=device), torch.zeros(2, device=device))
    hook.remove()
    assert inside == [torch.bfloat16] and x.dtype == torch.float32
    for event in run:
        assert all(np.isfinite(list(event.record.metrics.values())))
    student = run.finish()
    assert student.denoiser.precision == "float32"
    assert {p.dtype for p in student.denoiser.parameters()} == {torch.float32}


def test_another_precision_is_refused(data):
    with pytest.raises(ConfigError, match='device is cpu; give its name, such as "cuda:0"'):
        distillation(make_teacher(), data, replace(CONFIG, device=torch.device("cpu")))  # pyright: ignore
    with pytest.raises(ConfigError, match="precision is 'float16'; use float32, tf32 or bfloat16"):
        distillation(make_teacher(), data, replace(CONFIG, precision="float16"))  # pyright: ignore


@pytest.mark.parametrize("wrapper", [Guided, Thresholded])
def test_half_precision_goes_through_wrappers_and_leaves_the_teacher_alone(wrapper, data):
    plain = make_teacher()
    given = replace(plain, denoiser=wrapper(plain.denoiser, 0.9))
    run = distillation(given, data, replace(CONFIG, precision="bfloat16", device="cpu"))
    inside = []
    parts = (run.method.teacher, run.method.student, run.method.auxiliary)
    for part in parts:
        part.unwrapped.network.register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    run.method.step(0, run.batches(0))
    assert inside == [torch.bfloat16] * 3
    assert given.denoiser.precision == given.denoiser.unwrapped.precision == "float32"


@DEVICES
@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
def test_a_teacher_is_trained_in_half_precision_and_predictions_come_back_whole(prediction, device, data):
    settings, quiet = TrainConfig(num_steps=2, batch_size=4), MonitorConfig(0)
    config = TeacherConfig(network=UNET, train=settings, monitor=quiet, prediction=prediction, device=device)
    run = teacher_training(data, replace(config, precision="bfloat16"))
    inside = []
    hook = run.model.denoiser.network.register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    x = run.model.denoiser(torch.zeros(2, 1, 8, 8, device=device), torch.zeros(2, device=device))
    hook.remove()
    assert inside == [torch.bfloat16] and x.dtype == torch.float32
    assert len(list(run)) == 2


@DEVICES
def test_half_precision_hardly_turns_the_gradient(device, data):
    found = {}
    for precision in ("float32", "bfloat16"):
        run = distillation(make_teacher(), data, replace(CONFIG, device=device, precision=precision))
        run.method.step(0, run.batches(0)).losses["auxiliary"].backward()
        gradients = [p.grad for p in run.method.auxiliary.parameters()]
        found[precision] = torch.cat([g.flatten() for g in gradients])
    assert not torch.equal(found["float32"], found["bfloat16"])
    assert float(torch.cosine_similarity(found["float32"], found["bfloat16"], dim=0)) > 0.98


@DEVICES
def test_the_product_of_algorithm_3_survives_half_precision(device):
    model = make_teacher().to(device)
    denoiser = model.denoiser
    generator = torch.Generator().manual_seed(0)
    direction = {
        k: torch.randn(p.shape, generator=generator).to(device) for k, p in denoiser.named_parameters()
    }
    z, logsnr = torch.randn(4, 1, 8, 8, generator=generator).to(device), torch.zeros(4, device=device)
    cond = {"label": torch.tensor([0, 1, 2, 3], device=device)}
    exact = forward_product(denoiser, direction, z, logsnr, cond)[1]
    denoiser.precision = "bfloat16"
    assert torch.equal(forward_product(denoiser, direction, z, logsnr, cond)[1], exact)
    difference = difference_product(denoiser, direction, z, logsnr, cond)[1]
    assert float((difference - exact).norm() / exact.norm()) < 0.01
    assert denoiser.precision == "bfloat16"
    with torch.autocast(device, torch.bfloat16):  # of whoever calls
        assert torch.equal(forward_product(denoiser, direction, z, logsnr, cond)[1], exact)
        assert torch.equal(difference_product(denoiser, direction, z, logsnr, cond)[1], difference)


@pytest.mark.parametrize("product", [forward_product, difference_product])
def test_tf32_is_off_inside_the_products_and_back_afterwards(product):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    denoiser, seen = make_teacher().denoiser, []
    denoiser.network.register_forward_hook(lambda *_: seen.append([b.allow_tf32 for b in backends]))
    direction = {k: torch.ones_like(p) for k, p in denoiser.named_parameters()}
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
            product(denoiser, direction, torch.zeros(2, 1, 8, 8), torch.zeros(2), None)
            assert [b.allow_tf32 for b in backends] == [allowed, allowed]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert seen and all(flags == [False, False] for flags in seen)


def log_of(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_tf32_is_used_where_it_was_asked_for_alone(precision, tmp_path):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    teacher, seen = make_teacher(), []
    short = TrainConfig(num_steps=2, batch_size=4)
    config = DistillConfig(
        steps=2, precision=precision, train=short, monitor=MonitorConfig(every=0), device="cpu"
    )
    run = distillation(teacher, random_pictures(), config)

    def look(*_):
        seen.append([b.allow_tf32 for b in backends])

    for network in run.method.trainable.values():
        network.register_forward_hook(look)
        network.register_full_backward_hook(look)
    for _ in run:
        assert [b.allow_tf32 for b in backends] == before
    student = run.finish()
    assert seen and all(flags == [precision == "tf32"] * 2 for flags in seen)
    seen.clear()
    replace(student, denoiser=student.denoiser.in_precision(precision)).sample(2)
    assert seen and all(flags == [precision == "tf32"] * 2 for flags in seen)
    assert [b.allow_tf32 for b in backends] == before


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_small_shapes(tmp_path):
    """It has minutes of a GPU, once in a while: they must not be lost to a mistake in it."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--tiny", "--out", str(tmp_path / "rows.jsonl")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    sections = {row["section"] for row in rows}
    assert sections == {"start", "small", "numbers", "large", "memory", "profile", "quality", "nccl"}
    assert all(row["same"] for row in rows if "same" in row)
