"""Nothing gets lost: labels keep their pictures, conditions reach networks, settings reach methods."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import momatch
from momatch.config import AlternatingConfig
from momatch.config.schema import OptimConfig, ScheduleConfig, TeacherConfig, TrainConfig, WeightingConfig
from momatch.data.images import ImageSet, Split
from momatch.diffusion import process, schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.evaluation.evaluate import evaluate_at
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch, Method, Update
from momatch.methods.denoising import Denoising
from momatch.methods.transition import Transition
from momatch.methods.weighting import adaptive
from momatch.models.model import CHUNK, Model, ModelError, load_model
from momatch.networks.configs import UNetConfig
from momatch.training import checkpoint
from momatch.training.batches import image_batches
from momatch.training.build import distillation, teacher_training
from momatch.training.loop import train

SCHEDULE = schedules.cosine()


class Recorder(nn.Module):
    """Answers with its parameter; remembers label, noise level, input and mode of every call."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        self.calls.append((z.detach(), logsnr, cond["label"] if cond else None, self.training))
        return self.value.expand(z.shape)


def labelled(n: int) -> tuple[Tensor, Tensor]:
    """Pictures that show their label."""
    labels = torch.arange(n) % 7
    return labels.float()[:, None].expand(n, 2).clone(), labels


def test_batches_keep_labels_with_their_pictures():
    images, labels = labelled(50)
    batch = image_batches(images, labels, 32, seed=0)(3)
    assert torch.equal(batch.x[:, 0], batch.cond["label"].float())
    assert len(batch.cond["label"].unique()) > 3
    for half in batch.halves():
        assert torch.equal(half.x[:, 0], half.cond["label"].float())


@pytest.mark.parametrize("update", ["alternating", "joint"])
def test_all_three_networks_are_given_the_condition_and_the_teacher_is_in_evaluation_mode(update):
    networks = [Recorder().train() for _ in range(3)]
    method = Alternating(*networks, Transition(SCHEDULE, 4), update=update)
    images, labels = labelled(16)
    for step in (0, 1):
        method.step(step, Batch(images, {"label": labels}, torch.Generator().manual_seed(0)))
    for network, training in zip(networks, (False, True, True), strict=True):
        assert len(network.calls) == 2
        assert all(torch.equal(call[2], labels) and call[3] is training for call in network.calls)


def test_denoising_has_its_closed_form_and_drops_the_asked_share_of_conditions():
    network = Recorder()
    denoiser = Denoiser(network, "x", {"label": 9})
    weight = lambda logsnr, x, x_hat: 2 + logsnr.abs()  # noqa: E731
    method = Denoising(denoiser, SCHEDULE, weight, lambda u: 0.2 + 0.1 * u, cond_dropout=0.25)
    images, labels = labelled(20_000)
    with torch.no_grad():
        network.value.fill_(0.5)
    loss = method.step(0, Batch(images, {"label": labels}, torch.Generator().manual_seed(0))).losses[
        "teacher"
    ]
    z, logsnr, seen, _ = network.calls[0]
    t = SCHEDULE.inverse(logsnr)
    assert 0.2 - 1e-6 < float(t.min()) < 0.201 and 0.299 < float(t.max()) < 0.3 + 1e-6
    want = ((2 + logsnr.abs())[:, None] * (images - 0.5) ** 2).mean()
    torch.testing.assert_close(loss, want)
    alpha, sigma = process.alpha_sigma(logsnr[:, None])
    noise = (z - alpha * images) / sigma
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    dropped = seen == 9
    assert abs(float(dropped.float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(seen))
    assert torch.equal(seen[~dropped], labels[~dropped])


class Steep(Method):
    """A method whose gradient is far above the clip."""

    def __init__(self):
        self.network = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.network.weight)

    @property
    def trainable(self):
        return {"student": self.network}

    def step(self, step: int, batch: Batch) -> Update:
        return Update({"student": (self.network.weight * 1e6).sum()}, dict)


def test_the_loop_clips_and_follows_the_learning_rate_schedule():
    """With a huge Adam ε a step is rate · gradient/ε, so lengths of steps show clip and rate."""
    method = Steep()
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, beta1=0.0, beta2=0.0, eps=1e6, clip_norm=0.5)
    batches = image_batches(torch.zeros(4, 1), None, 2, 0)
    lengths, before = [], method.network.weight.detach().clone()
    for _ in train(method, batches, TrainConfig(num_steps=6, batch_size=2), optim):
        now = method.network.weight.detach().clone()
        lengths.append(float((now - before).norm()) * 1e6 / 0.5)
        before = now
    assert lengths == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25], rel=1e-4)


def test_every_chunk_of_a_large_sample_is_new():
    model = momatch.load_teacher("digits")
    images = model.sample(
        2 * CHUNK, steps=1, cond={"label": torch.zeros(2 * CHUNK, dtype=torch.long)}, seed=1
    )
    assert not torch.allclose(images[:CHUNK], images[CHUNK:])
    assert len(images.flatten(1).unique(dim=0)) == 2 * CHUNK


def test_leaving_a_sample_early_restores_the_training_mode():
    model = momatch.load_teacher("digits")
    model.denoiser.train()
    chunks = model.sample_chunks(2 * CHUNK, 1)
    next(chunks)
    assert not model.denoiser.training
    chunks.close()
    assert model.denoiser.training


class Copier(nn.Module):
    """A model that always draws what its label asks for: label/10 in every pixel, a little noise."""

    def __init__(self):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        return (cond["label"].float() / 10)[:, None, None, None] + 0.01 * z


def test_evaluation_asks_for_labels_in_turn_and_compares_with_held_out_pictures():
    """The held-out pictures are what the model draws; the training pictures are something else entirely."""
    labels = torch.arange(400) % 4
    like = (labels.float() / 10)[:, None, None, None] + 0.01 * torch.randn(
        400, 1, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    split = Split(ImageSet(like + 5, labels, 4, "a-train"), ImageSet(like, labels, 4, "a-heldout"))
    network = UNetConfig(num_classes=4)
    model = Model(Denoiser(Copier(), "x", {"label": 4}), network, SCHEDULE, (1, 4, 4), 1, 4)
    row = evaluate_at(model, "student", split, 1, 800, resamples=20)
    assert row.result.get("frechet", "pixels").value < 0.1
    assert row.result.get("frechet", "pixels").reference == "a-heldout"
    assert row.result.get("frechet_floor", "pixels").value > 10  # the training pictures against the held-out
    assert row.result.get("neighbour_ratio", None).value > 0


def test_every_setting_of_a_distillation_reaches_its_method():
    teacher, data = momatch.load_teacher("digits"), momatch.load_data("digits")
    config = dataclasses.replace(
        momatch.DistillConfig(),
        steps=4,
        method=AlternatingConfig("joint", teacher_term=0.3),
        weighting=WeightingConfig("snr_clipped", 7.0, exponent=2.0, delta_exponent=0.5),
        schedule=ScheduleConfig("cosine", shift=-1.5),
    )
    run = distillation(teacher, data, config)
    method = run.method
    assert isinstance(method, Alternating)
    u, clean = torch.tensor([0.25]), torch.tensor([9.0])
    assert float(method.transition.density(u)) == 0.0625 and float(method.transition.delta_density(u)) == 0.5
    assert float(method.weighting(clean, u, u)) == 7.0
    assert (method.teacher_term, method.update, method.transition.steps) == (0.3, "joint", 4)
    for schedule in (method.transition.schedule, run.model.schedule):
        assert float(schedule(torch.tensor(0.5))) == pytest.approx(-1.5, abs=1e-5)
    assert run.model.steps == 4


def test_every_setting_of_a_teacher_s_training_reaches_its_method():
    config = TeacherConfig(
        cond_dropout=0.4,
        prediction="eps",
        weighting=WeightingConfig("flat", exponent=3.0),
        schedule=ScheduleConfig("rectified_flow", shift=2 * math.log(2)),
    )
    method = teacher_training(momatch.load_data("digits"), config).method
    assert isinstance(method, Denoising)
    u = torch.tensor([0.5])
    assert float(method.density(u)) == 0.125 and float(method.weighting(u + 9, u, u)) == 1.0
    assert method.cond_dropout == 0.4 and method.denoiser.prediction == "eps"
    # A positive shift means less noise: λ(½) = +shift, as with cosine.
    assert float(method.schedule(u)) == pytest.approx(2 * math.log(2), abs=1e-3)


def test_the_adaptive_weight_looks_at_each_sample_alone():
    x = torch.zeros(2, 4)
    w = adaptive()(torch.zeros(2), x, torch.stack([torch.full((4,), 0.5), torch.full((4,), 0.1)]))
    torch.testing.assert_close(w, torch.tensor([2.0, 10.0]))


@pytest.mark.parametrize("shifts", [(0.0, 6.0), (0.0, 2.0)])
def test_a_schedule_that_is_nearly_flat_gives_no_negative_variance(shifts):
    """Rounding puts λ_t above λ_s there now and then."""
    schedule = schedules.interpolated(*shifts)
    t = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0))
    s = (t - 1e-7 * torch.rand(len(t), generator=torch.Generator().manual_seed(1))).clamp(min=0)
    assert bool((schedule(t) > schedule(s)).any())  # or this test says nothing
    for coefficient in process.posterior_coefficients(schedule(s), schedule(t)):
        assert bool((coefficient >= 0).all())


DAMAGE = {
    "a list": lambda fields: [],
    "no steps": lambda fields: fields.pop("steps") and fields,
    "no prediction": lambda fields: fields.pop("prediction") and fields,
    "steps is text": lambda fields: {**fields, "steps": "8"},
    "unknown prediction": lambda fields: {**fields, "prediction": "foo"},
    "schedule is a list": lambda fields: {**fields, "schedule": []},
    "shift is text": lambda fields: {**fields, "schedule": {"name": "cosine", "shift": "a"}},
    "shift is not finite": lambda fields: {**fields, "schedule": {"name": "cosine", "shift": math.nan}},
    "channels is a number": lambda fields: {**fields, "network": {**fields["network"], "channels": 8}},
    "info is missing": lambda fields: fields.pop("info") and fields,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_description_of_a_model_is_one_sentence(damage, tmp_path):
    momatch.load_teacher("digits").save(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))))
    with pytest.raises(ModelError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    method = Steep()
    batches = image_batches(torch.zeros(4, 1), None, 2, 0)
    config = TrainConfig(num_steps=2, batch_size=2, checkpoint_every=1)
    for _ in train(method, batches, config, OptimConfig(), tmp_path):
        pass
    before, path = checkpoint.paths(tmp_path)
    before.unlink()  # or it would be taken where the other is damaged
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "fingerprint"}
        good = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    moment = "optimizer.student.weight.exp_avg_sq"
    for tensors, told in (
        ({k: v for k, v in good.items() if k != moment}, metadata),
        ({**good, moment: torch.zeros(1, 1)}, metadata),
        ({k: v for k, v in good.items() if not k.startswith("optimizer.")}, metadata),
        ({**good, "student.weight": good["student.weight"] * math.nan}, metadata),
        (good, {**metadata, "progress": "{}x"}),
        (good, {**metadata, "progress": '{"step": 1, "frob": 2}'}),
    ):
        save_file(tensors, path, metadata=told)
        fresh = Steep()
        with pytest.raises(checkpoint.CheckpointError, match="delete it"):
            next(train(fresh, batches, config, OptimConfig(), tmp_path))
        assert float(fresh.network.weight.detach().abs().sum()) == 0
