"""Teachers from elsewhere are distilled, sampled, measured and saved like our own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import momatch
from momatch import cli
from momatch.config import AlternatingConfig, InstantConfig
from momatch.config.schema import GuidanceConfig, MonitorConfig, ScheduleConfig, TrainConfig
from momatch.interop.load import teacher_of_student
from momatch.methods.alternating import Alternating
from momatch.methods.warm_start import WarmStart
from momatch.models.model import load_model
from momatch.training.build import distillation
from momatch.utils.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))
import folders  # noqa: E402

SHORT = momatch.DistillConfig(
    steps=2,
    train=TrainConfig(num_steps=4, batch_size=4),
    monitor=MonitorConfig(every=0),
)
METHODS = {"alternating": AlternatingConfig(), "instant": InstantConfig(lambda_steps=2)}
QUICK = "--train.num-steps 2 --train.batch-size 4 --monitor.every 0 --steps 2".split()


@pytest.fixture
def unet(tmp_path):
    return folders.save(tmp_path / "ddpm", folders.unet(), diffusers.DDPMScheduler())


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_a_diffusers_teacher_is_distilled(method, unet, tmp_path):
    teacher, data = momatch.load_teacher(unet), momatch.load_data("digits")
    config = dataclasses.replace(SHORT, method=METHODS[method], teacher=str(unet))
    before = teacher.fingerprint()
    student = momatch.distill(teacher, data, config, tmp_path / "run")
    assert teacher.fingerprint() == before != student.fingerprint()
    assert student.denoiser.clip == teacher.denoiser.clip == 1.0
    again = momatch.load_student(tmp_path / "run")
    assert torch.equal(student.sample(4, seed=1), again.sample(4, seed=1))
    assert student.sample(4).abs().max() <= 1 + 1e-5


@pytest.mark.parametrize(("kind", "matching", "warming"), [("epsilon", 0.5, 1.0), ("v_prediction", 1.0, 2.0)])
def test_losses_are_weighted_by_what_the_teacher_predicts(kind, matching, warming, tmp_path):
    """At α² = σ² = 1/2: w = α² for an ε-network, else 1; a warm start is a mean square in ε, or in v."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    folder = folders.save(tmp_path / "ddpm", folders.unet(), scheduler)
    config = dataclasses.replace(SHORT, teacher=str(folder), warm_start_steps=2)
    method = distillation(momatch.load_teacher(folder), momatch.load_data("digits"), config).method
    logsnr, x = torch.zeros(1), torch.zeros(1, 1, 8, 8)
    assert isinstance(method, WarmStart) and isinstance(method.method, Alternating)
    assert float(method.method.weighting(logsnr, x, x)) == matching
    assert float(method.denoising.weighting(logsnr, x, x)) == warming


def test_a_student_begins_where_the_schedule_is_cut(unet, tmp_path):
    config = dataclasses.replace(
        SHORT, teacher=str(unet), schedule=ScheduleConfig("teacher", logsnr_min=-6.0)
    )
    student = momatch.distill(
        momatch.load_teacher(unet), momatch.load_data("digits"), config, tmp_path / "run"
    )
    assert -6 <= float(student.schedule(torch.tensor(1.0))) < -5.9
    again = momatch.load_student(tmp_path / "run")
    assert torch.equal(student.sample(4, seed=1), again.sample(4, seed=1))
    with pytest.raises(UsageError, match=r"schedule.logsnr_min is 3.0; it must lie in \[−30, 0\]"):
        bad = dataclasses.replace(config, schedule=ScheduleConfig("teacher", logsnr_min=3.0))
        momatch.distill(momatch.load_teacher(unet), momatch.load_data("digits"), bad)
    with pytest.raises(UsageError, match=r"schedule.logsnr_min is -4.0: .* cannot be cut"):
        bad = dataclasses.replace(config, schedule=ScheduleConfig("interpolated", logsnr_min=-4.0))
        momatch.distill(momatch.load_teacher(unet), momatch.load_data("digits"), bad)


def test_classes_guidance_and_a_null_label(tmp_path):
    folder = folders.save(tmp_path / "ddpm", folders.unet(num_class_embeds=11), diffusers.DDPMScheduler())
    config = dataclasses.replace(SHORT, teacher=str(folder), guidance=GuidanceConfig(scale=1.0))
    with pytest.raises(UsageError, match="no null condition to guide"):
        momatch.distill(momatch.load_teacher(folder), momatch.load_data("digits"), config)
    teacher = momatch.load_teacher(folder, null_label=10)
    student = momatch.distill(teacher, momatch.load_data("digits"), config)
    assert student.num_classes == 10 and student.denoiser.null_values == {"label": 10}


def test_data_without_labels_do_not_teach_a_class_conditional_student(tmp_path):
    folder = folders.save(tmp_path / "ddpm", folders.unet(num_class_embeds=10), diffusers.DDPMScheduler())
    np.savez(tmp_path / "plain.npz", images=np.zeros((200, 8, 8), np.uint8))
    with pytest.raises(UsageError, match="have no labels"):
        momatch.distill(momatch.load_teacher(folder), momatch.load_data(str(tmp_path / "plain.npz")), SHORT)


def test_the_commands_take_a_diffusers_folder(unet, tmp_path, capsys):
    teacher, out, png = str(unet), str(tmp_path / "run"), str(tmp_path / "a.png")
    for command in [
        ["sample", teacher, "--num", "4", "--steps", "2", "--out", png],
        ["plan", "digits-8", "--teacher", teacher, *QUICK],
        ["distill", "digits-8", "--teacher", teacher, "--out", out, *QUICK],
        ["sample", out, "--num", "4", "--out", png],
        ["evaluate", out, "--num", "100", "--teacher-steps", "2"],
    ]:
        assert cli.main(command) == 0, (command, capsys.readouterr())
    for command, sentence in [
        (["evaluate", teacher, "--num", "100"], "name data to compare with by --data"),
        (["guidance", teacher, "--data", "digits", "--out", png], "has no null condition"),
    ]:
        assert cli.main(command) == 2
        assert sentence in capsys.readouterr().err


def test_the_commands_take_a_function(tmp_path, capsys):
    out, png = str(tmp_path / "run"), str(tmp_path / "a.png")
    for command in [
        ["sample", "tiny_teacher:make", "--num", "4", "--steps", "2", "--out", png],
        ["distill", "digits-8", "--teacher", "tiny_teacher:make", "--out", out, *QUICK],
        ["sample", out, "--num", "4", "--out", png],
    ]:
        assert cli.main(command) == 0, (command, capsys.readouterr())


def test_a_null_label_on_the_command_line_is_remembered(tmp_path, capsys):
    folder = folders.save(tmp_path / "ddpm", folders.unet(num_class_embeds=11), diffusers.DDPMScheduler())
    out = str(tmp_path / "run")
    rest = ["--teacher", str(folder), "--null-label", "10", "--guidance.scale", "1", "--out", out, *QUICK]
    assert cli.main(["distill", "digits-8", *rest]) == 0, capsys.readouterr()
    assert teacher_of_student(momatch.load_student(out)).denoiser.null_values == {"label": 10}
    png = str(tmp_path / "a.png")
    assert cli.main(["sample", str(folder), "--num", "4", "--steps", "1", "--out", png]) == 0


def test_a_network_of_ones_own(tmp_path):
    teacher = momatch.load_teacher("tiny_teacher:make")
    student = momatch.distill(teacher, momatch.load_data("digits"), SHORT)
    student.save(tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert torch.equal(student.sample(3), again.sample(3)) and again.denoiser.clip == 1.0
    for source, sentence in [
        ("tiny_teacher:no_model", "returned int; it must return a momatch.Model"),
        ("tiny_teacher:unmarked", "does not say that it returns a model, so it is not called"),
        ("os:abort", "does not say that it returns a model, so it is not called"),
        ("tiny_teacher:nothing", "has no function 'nothing'"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            momatch.load_teacher(source)
    with pytest.raises(UsageError, match="are for teachers of diffusers"):
        momatch.load_teacher("digits", null_label=10)


def test_clipping_is_true_in_value_and_straight_through_in_derivatives():
    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, z, time, cond=None):
            return self.gain * z

    plain = momatch.Denoiser(Ours(), "eps")
    clipped = momatch.Denoiser(plain.network, "eps", clip=0.5)
    z = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logsnr = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.0, 8.0])
    for training in (False, True):
        x, inside = plain(z, logsnr), clipped.train(training)(z, logsnr)
        assert torch.equal(inside, x.clamp(-0.5, 0.5)) and x.abs().max() > 2
        (free,) = torch.autograd.grad(x.sum(), plain.network.gain)
        (bound,) = torch.autograd.grad(inside.sum(), plain.network.gain)
        assert torch.equal(free, bound)


def test_a_clipping_teacher_samples_what_ddpm_samples(unet):
    """All 1000 steps of DDIM with η = 1, the same noise: the first steps, where clipping does everything."""
    model = momatch.load_teacher(unet)
    model.denoiser.double()
    stock = diffusers.DDIMScheduler.from_config(diffusers.DDPMScheduler().config)
    stock.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    network = model.denoiser.network.model
    for index in range(999, 989, -1):
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        t, s = (torch.full((2,), i / 1000, dtype=torch.float64) for i in (index + 1, index))
        with torch.no_grad():
            output = network(theirs, index).sample
            x = model.denoiser(ours, model.schedule(t))
        # "use_clipped_model_output" makes the step the posterior of the clipped x.
        theirs = stock.step(
            output, index, theirs, eta=1.0, variance_noise=noise, use_clipped_model_output=True
        ).prev_sample
        mean, variance = momatch.process.posterior(ours, x, model.schedule(s), model.schedule(t))
        ours = mean + variance.sqrt() * noise
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_guidance_is_clipped_last_and_derivatives_pass():
    """(1 + w) g(c) − w g(∅) of unclipped estimates, then the clip; forward mode passes straight through."""
    denoiser = momatch.Denoiser(Scale(), "x", {"label": 0}, clip=1.0).eval()
    z, logsnr, cond = torch.tensor([[0.8], [-2.0]]), torch.zeros(2), {"label": torch.ones(2).long()}
    guided = momatch.Guided(denoiser, 2.0)
    plain = torch.tensor([[3 * 0.8 * 1.5 - 2 * 0.8], [3 * -2.0 * 1.5 + 2 * 2.0]])
    torch.testing.assert_close(guided(z, logsnr, cond), plain.clamp(-1, 1))
    change = torch.func.jvp(lambda x: denoiser(x, logsnr, cond), (z,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(change, torch.full_like(z, 1.5))


class Scale(torch.nn.Module):
    """z for the null label, 1.5 z for any other."""

    def forward(self, z, time, cond):
        return z * (1 + 0.5 * (cond["label"] > 0))[:, None]


@pytest.mark.parametrize(
    ("part", "file", "entry", "says"),
    [
        (".", "model_index.json", {"requires_aesthetics_score": True}, "is a refiner"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(part, file, entry, says, unet):
    path = Path(unet) / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(UsageError, match=says):
        momatch.load_teacher(unet)


def test_a_network_that_knows_whole_timesteps_alone_is_refused(tmp_path):
    network = folders.unet(time_embedding_type="learned", num_train_timesteps=1000)
    folder = folders.save(tmp_path / "learned", network, diffusers.DDPMScheduler())
    with pytest.raises(UsageError, match="time_embedding_type = learned"):
        momatch.load_teacher(folder)


def test_what_is_left_out_of_a_scheduler_is_one_line_on_the_command_line(unet, tmp_path, capsys):
    path = Path(unet) / "scheduler" / "scheduler_config.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps({**contents, "thresholding": True, "sample_max_value": 2.0}))
    out = str(tmp_path / "grid.png")
    assert cli.main(["sample", str(unet), "--num", "1", "--steps", "1", "--out", out]) == 0
    said = capsys.readouterr().err
    assert said.startswith("momatch: this scheduler has thresholding") and said.count("\n") == 1
