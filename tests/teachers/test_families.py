"""Every record of a family passes the same checks, against diffusers' own pipelines."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import momatch
from momatch.models.model import load_model
from momatch.networks.families import FAMILIES
from momatch.training.build import teacher_of
from momatch.utils.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))
import families  # noqa: E402
import folders  # noqa: E402
import stages  # noqa: E402
from families import CASES, N  # noqa: E402


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(case, teacher) by the name of a class, loaded once."""
    known = {}

    def get(name):
        if name not in known:
            case = CASES[name]
            folder = families.save(case, tmp_path_factory.mktemp(name))
            known[name] = case, momatch.load_teacher(folder, size=case.size)
        return known[name]

    return get


def test_every_family_has_a_case_and_every_case_a_family():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_are_those_of_the_pipeline(name, loaded):
    stages.estimates(name, *loaded(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_samples_and_is_saved_to_the_bit(name, loaded, tmp_path):
    stages.kept(name, *loaded(name), tmp_path)


def exploding(**options):
    network = folders.unet(time_embedding_type="fourier", **options)
    return network, diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)


def test_a_score_of_the_exploding_process_is_read_as_diffusers_steps(tmp_path):
    network, scheduler = exploding()
    model = momatch.load_teacher(folders.save(tmp_path, network, scheduler))
    network = model.denoiser.double().network.model
    for sigma in (0.01, 0.1, 1.0, 7.0, 50.0):
        y = stages.noise(model.sample_shape)[0].double() * sigma
        with torch.no_grad():
            score = network(y, torch.full((N,), sigma, dtype=torch.float64)).sample
        # A step from σ to 0, where the mean of what came before is the estimate; data lie in [0, 1].
        scheduler.timesteps, scheduler.discrete_sigmas = torch.zeros(1), torch.tensor([sigma]).double()
        theirs = 2 * scheduler.step_pred(score, 0, y).prev_sample_mean - 1
        logsnr = torch.full((N,), -2 * math.log(2 * sigma), dtype=torch.float64)
        alpha = torch.sigmoid(logsnr[0]).sqrt()
        with torch.no_grad():
            stages.close(model.denoiser(alpha * (2 * y - 1), logsnr), theirs)
    ends = model.schedule(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    theirs = [0.01, math.sqrt(0.01 * 50), 50.0]  # set_sigmas: geometric in t
    assert torch.allclose(ends, -2 * (2 * torch.tensor(theirs, dtype=torch.float64)).log())


def test_a_student_of_a_score_is_exported(tmp_path):
    folder = folders.save(tmp_path / "teacher", *exploding(), pipeline=False)
    model = momatch.load_teacher(folder)
    student = stages.distilled(model)
    student.save(tmp_path / "student")
    cond, again = None, momatch.load_student(tmp_path / "student")
    assert torch.equal(student.sample(2, cond=cond), again.sample(2, cond=cond))
    stages.exported("UNet2DModel", families.Case(folders.unet), student, tmp_path / "out")


RECORD = """
from momatch.networks.families.family import Asked, Family, needed


def call(model, z, time, cond):
    (text,) = needed(cond, "encoder_hidden_states")
    sizes = z.new_tensor([[64, 64]]).expand(len(z), 2)
    return model(z, text, time, sizes, sizes, 0 * sizes, return_dict=False)[0]


FAMILY = Family(
    "CogView3PlusTransformer2DModel",
    call,
    asked=lambda config: Asked({"encoder_hidden_states": (-1, config["text_embed_dim"])}),
)
"""


def test_a_class_that_is_not_known_is_taken_with_a_record_of_ones_own(tmp_path, monkeypatch):
    network = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, **families.HEADS, text_embed_dim=16, time_embed_dim=16,
        condition_dim=8, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    folder = folders.save(tmp_path / "teacher", network, families.ddim())
    with pytest.raises(UsageError) as refused:
        momatch.load_teacher(folder)
    shown = str(refused.value).partition("\n\n")
    assert shown[0].startswith("momatch knows no CogView3PlusTransformer2DModel, only AuraFlow")
    compile(shown[2], "my_family.py", "exec")
    assert 'needed(cond, "encoder_hidden_states"' in shown[2]
    (tmp_path / "cog_view_family.py").write_text(RECORD)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = momatch.load_teacher(folder, family="cog_view_family:FAMILY")
    cond = stages.in_single(families.condition(model))
    samples = model.sample(N, 2, cond)
    model.save(tmp_path / "saved")
    assert torch.equal(samples, load_model(tmp_path / "saved").sample(N, 2, cond))
    for name, sentence in [
        ("cog_view_family:call", "cog_view_family:call is of a function; the family of a CogView3Plus"),
        ("no_such_module:FAMILY", "cannot import 'no_such_module'"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            momatch.load_teacher(folder, family=name)
    with pytest.raises(UsageError, match="are for teachers of diffusers"):
        momatch.load_teacher("digits", family="cog_view_family:FAMILY")


def test_videos_want_all_their_sides(tmp_path):
    folder = families.save(CASES["WanTransformer3DModel"], tmp_path / "wan")
    assert momatch.load_teacher(folder).sample_shape == (4, 21, 60, 104)
    assert momatch.load_teacher(folder, size=[3, 4, 6]).sample_shape == (4, 3, 4, 6)
    with pytest.raises(UsageError, match="has 3 sides|have 3 sides, but 8 was given.*--teacher-sides FRAMES"):
        momatch.load_teacher(folder, size=8)
    config = momatch.DistillConfig(teacher=str(folder), teacher_sides=(2, 4, 4))
    assert teacher_of(config).sample_shape == (4, 2, 4, 4)


def test_flux_2_shifts_as_its_pipeline_does(tmp_path):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from momatch.networks.families import flux2

    for tokens in (64, 1024, 4096, 4300, 5000):
        for steps in (4, 28, 64, 200):
            assert math.isclose(flux2.mu(tokens, steps), compute_empirical_mu(tokens, steps), rel_tol=1e-9)
    scheduler = families.flow(use_dynamic_shifting=True)
    case = CASES["Flux2Transformer2DModel"]
    folder = folders.save(tmp_path / "p", case.make(), scheduler)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    model = momatch.load_teacher(folder, size=case.size)
    theirs = scheduler.time_shift(compute_empirical_mu(16, 64), 1.0, t)
    assert torch.allclose(torch.sigmoid(-model.schedule(t) / 2), theirs, atol=1e-3)
