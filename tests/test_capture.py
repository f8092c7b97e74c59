"""Updates recorded once and replayed do what they do operation by operation, to the last bit.

CUDA graphs need a GPU (tests/test_devices.py); here a tape stands in for them, which runs the recorded
operations again and no Python. What it proves is that an update can be recorded at all: nothing in it looks
at a value, and nothing that Python computed while recording is stale later.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion.denoiser import Denoiser, Guided, Thresholded
from momatch.diffusion.schedules import cosine, tabulated
from momatch.methods import weighting
from momatch.methods.alternating import Alternating
from momatch.methods.average import Averaged
from momatch.methods.base import Batch, Method, Update
from momatch.methods.consistency import Consistency
from momatch.methods.denoising import Denoising
from momatch.methods.dmd import DistributionMatching
from momatch.methods.instant import Instant
from momatch.methods.jvp import difference_product
from momatch.methods.progressive import Progressive
from momatch.methods.regression import Regression
from momatch.methods.transition import Transition
from momatch.methods.warm_start import WarmStart
from momatch.networks.configs import UNetConfig
from momatch.networks.registry import build
from momatch.training.batches import image_batches
from momatch.training.capture import WARMUP_STEPS, Captured
from momatch.training.loop import train
from momatch.training.optim import Optimizer, learning_rate_schedule
from momatch.training.update import Deferred, Failure, Immediate, Updater
from momatch.utils.errors import Notice
from momatch.utils.seeding import derive_seed
from tape import TapeRecorder, nothing_waits

STEPS = 12
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=3)
UNET = UNetConfig(image_channels=1, channels=(8,), blocks_per_level=1, embedding_dim=8, num_classes=3)
PICTURES = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 3


def denoiser(seed: int, dropout: float = 0.0) -> Denoiser:
    torch.manual_seed(seed)
    network = build(replace(UNET, dropout=dropout))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(network, null_values={"label": 3})


def transition(schedule=None, **options) -> Transition:
    return Transition(schedule or cosine(), steps=4, **options)


def instant(product) -> Instant:
    teacher = denoiser(0)
    scale = {name: torch.ones_like(p) for name, p in teacher.named_parameters()}
    return Instant(teacher, denoiser(1), transition(), scale, product=product)


def alternating(teacher=None, student=None, **options) -> Alternating:
    return Alternating(teacher or denoiser(0), student or denoiser(1), denoiser(2), transition(), **options)


METHODS = {
    "alternating": alternating,
    "joint": lambda: alternating(update="joint"),
    "adaptive weight": lambda: alternating(weighting=weighting.adaptive()),
    "guided": lambda: alternating(teacher=Guided(denoiser(0), 1.5, (-4.0, 4.0))),
    "dropout": lambda: alternating(student=denoiser(1, dropout=0.2)),
    "instant": lambda: instant(difference_product),
    "denoising": lambda: Denoising(denoiser(0), cosine()),
    "a table": lambda: Denoising(denoiser(0), tabulated(torch.linspace(1e-4, 0.02, 100).tolist())),
    "warm start": lambda: WarmStart(Denoising(denoiser(5), cosine()), alternating(), 4),
    "average": lambda: Averaged(alternating(), 0.9),
    "progressive": lambda: Progressive(denoiser(0), denoiser(1), cosine(), 2, 2, 6),
    "consistency": lambda: Consistency(denoiser(0), denoiser(1), cosine(), 2, 3, 0.5),
    "dmd": lambda: DistributionMatching(denoiser(0), denoiser(1), denoiser(2), cosine(), 3, 1),
    "regression": lambda: Regression(denoiser(0), denoiser(1), cosine(), 2, 2),
    "draws": lambda: Regression(denoiser(0), denoiser(1), cosine(), 2, 2, "ancestral"),
}


def batches(labels: bool = True):
    return image_batches(PICTURES, LABELS if labels else None, 6, seed=3)


def recorded(method: Method, steps: int = STEPS, labels: bool = True):
    """Train as `train` does, recording; returns the weights, metrics at the end and the recorder."""
    optimizers = {role: Optimizer(net, OPTIM, waits=False) for role, net in method.trainable.items()}
    guard = Deferred(optimizers, torch.device("cpu"))
    recorder = TapeRecorder()
    update = Captured(Updater(method, optimizers, guard), recorder)
    for network in method.trainable.values():
        network.train()
    metrics = []
    for step in range(steps):
        torch.manual_seed(derive_seed(0, "dropout", step))
        for optimizer in optimizers.values():
            optimizer.set_learning_rate(learning_rate_schedule(OPTIM, step, steps))
        guard.begin(step)
        outcome = update(step, batches(labels)(step))
        method.after_update(step)
        values = {**outcome.metrics(), **{f"gradient_norm_{r}": n for r, n in outcome.norms.items()}}
        metrics.append({name: float(value) for name, value in values.items()})
    assert guard.failure() is None
    return state(method), metrics, recorder


def state(method: Method):
    parts = {**method.trainable, **method.kept}
    return {f"{r}.{k}": v.clone() for r, net in parts.items() for k, v in net.state_dict().items()}


def eager(method: Method, steps: int = STEPS, labels: bool = True):
    config = TrainConfig(num_steps=steps, batch_size=6, log_every=1)
    records = list(train(method, batches(labels), config, OPTIM))
    return state(method), [record.metrics for record in records]


@pytest.mark.parametrize("name", METHODS)
def test_replayed_updates_are_those_of_the_plain_loop_bit_for_bit(name):
    weights, metrics, recorder = recorded(METHODS[name]())
    expected, expected_metrics = eager(METHODS[name]())
    assert recorder.replayed >= STEPS - 3 * (WARMUP_STEPS + 1)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert ours == {key: theirs[key] for key in ours}


def test_a_model_without_labels_can_be_recorded():
    weights, _, recorder = recorded(alternating(), labels=False)
    assert recorder.replayed
    expected, _ = eager(alternating(), labels=False)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_each_kind_of_step_is_recorded_once():
    assert recorded(alternating())[2].recorded == 2
    assert recorded(alternating(update="joint"))[2].recorded == 1
    # denoising at the fourth step, then both halves of the alternation
    assert recorded(METHODS["warm start"]())[2].recorded == 3


def test_rollouts_are_not_recorded():
    method = Alternating(denoiser(0), denoiser(1), denoiser(2), transition(source="rollout"))
    weights, _, recorder = recorded(method)
    assert recorder.recorded == 0
    same = Alternating(denoiser(0), denoiser(1), denoiser(2), transition(source="rollout"))
    assert all(torch.equal(weights[key], value) for key, value in eager(same)[0].items())


class Looking(Denoising):
    """A method that looks at a value, and says that it can be recorded."""

    def step(self, step: int, batch: Batch) -> Update:
        if batch.x.sum().item() > 1e9:
            raise AssertionError
        return super().step(step, batch)


def test_what_cannot_be_recorded_runs_on_and_says_so_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        weights, _, recorder = recorded(Looking(denoiser(0), cosine()))
    notices = [str(w.message) for w in seen if issubclass(w.category, Notice)]
    assert len(notices) == 1 and "cannot be recorded" in notices[0] and recorder.recorded == 0
    expected, _ = eager(Looking(denoiser(0), cosine()))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


class Stale(Denoising):
    """A method whose step depends on its number, and which denies it."""

    def step(self, step: int, batch: Batch) -> Update:
        update = super().step(step, batch)
        return Update({"teacher": update.losses["teacher"] * (1 + step)}, update.metrics)


def test_the_tape_runs_no_python_again():
    """Otherwise the tests above would prove nothing: a stale number must show."""
    weights = recorded(Stale(denoiser(0), cosine()))[0]
    expected = eager(Stale(denoiser(0), cosine()))[0]
    assert not all(torch.equal(weights[key], expected[key]) for key in expected)


def test_captions_of_many_lengths_stop_being_recorded():
    method = Denoising(denoiser(0), cosine())
    optimizers = {role: Optimizer(net, OPTIM, waits=False) for role, net in method.trainable.items()}
    recorder = TapeRecorder()
    update = Captured(Updater(method, optimizers, Deferred(optimizers, torch.device("cpu"))), recorder)
    for size in range(1, 13):
        for step in range(WARMUP_STEPS + 1):
            update(step, image_batches(PICTURES, LABELS, size, seed=1)(step))
    assert recorder.recorded == 8


class Poisoned(Denoising):
    """NaN at one step."""

    def step(self, step: int, batch: Batch) -> Update:
        update = super().step(step, batch)
        factor = float("nan") if step == 5 else 1.0
        return Update({"teacher": update.losses["teacher"] * factor}, update.metrics)


def test_the_first_gradient_that_is_not_finite_stops_all_weights_where_they_are():
    method = Poisoned(denoiser(0), cosine())
    optimizers = {role: Optimizer(net, OPTIM, waits=False) for role, net in method.trainable.items()}
    guard = Deferred(optimizers, torch.device("cpu"))
    update = Updater(method, optimizers, guard)
    seen = []
    for step in range(9):
        guard.begin(step)
        update(step, batches()(step))
        seen.append(state(method))
    failure = guard.failure()
    assert failure is not None and (failure.role, failure.step) == ("teacher", 5)
    assert failure.loss != failure.loss  # nan
    for key in seen[4]:
        assert not torch.equal(seen[3][key], seen[4][key]) or not seen[4][key].is_floating_point()
        assert torch.equal(seen[4][key], seen[8][key])
    assert optimizers["teacher"].state()["step"] == 5


def test_a_guard_names_the_role_that_failed_first():
    optimizers = {role: Optimizer(nn.Linear(1, 1), OPTIM, waits=False) for role in ("student", "auxiliary")}
    guard = Deferred(optimizers, torch.device("cpu"))
    guard.begin(7)
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    guard.see({"student": good, "auxiliary": good}, {"student": good, "auxiliary": good})
    assert guard.failure() is None
    guard.see({"student": good, "auxiliary": 3 * good}, {"student": good, "auxiliary": bad})
    guard.begin(8)
    guard.see({"student": good, "auxiliary": good}, {"student": bad, "auxiliary": good})
    assert guard.failure() == Failure("auxiliary", 7, 3.0)
    at_once = Immediate()
    at_once.begin(7)
    assert not at_once.see({"student": 2 * good}, {"student": bad})
    assert at_once.failure() == Failure("student", 7, 2.0)


def test_nothing_in_a_step_waits_for_the_device():
    methods = [METHODS[name]() for name in ("alternating", "instant", "a table")]
    for method in (*methods, alternating(teacher=Thresholded(denoiser(0)))):
        batch = batches()(0)
        method.step(0, batch)  # tables are copied once
        with nothing_waits():
            method.step(0, batch)


def test_adam_without_a_first_moment_is_torchs_adam_bit_for_bit():
    """β₁ = 0, against fused Adam with all its state, over steps of very different sizes."""
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, OptimConfig(clip_norm=1e30))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in theirs.parameters()]))
    adam = torch.optim.Adam([flat], lr=1.0, betas=(0.0, 0.99), eps=1e-12, fused=True)
    rng = torch.Generator().manual_seed(0)
    for step in range(50):
        gradient = torch.randn(flat.shape, generator=rng) * 10.0 ** float(torch.randn((), generator=rng))
        optimizer.gradient.copy_(gradient)
        flat.grad = gradient.clone()
        optimizer.set_learning_rate(1e-3 * (step + 1))
        adam.param_groups[0]["lr"] = 1e-3 * (step + 1)
        optimizer.step()
        adam.step()
        assert torch.equal(optimizer.flat, flat)
    assert set(optimizer.state()) == {"step", "weight.exp_avg_sq", "bias.exp_avg_sq"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alternating", "instant"])
def test_compiled_networks_train_to_the_same_weights(name, monkeypatch):
    """The compiler's front half alone (aot_eager), which takes a second; kernels are the GPU's matter."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: plain(self, backend="aot_eager"))
    config = TrainConfig(num_steps=6, batch_size=6, log_every=1, compile="default")
    method = METHODS[name]()
    list(train(method, batches(), config, OPTIM))
    expected, _ = eager(METHODS[name](), steps=6)
    for key, value in state(method).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
