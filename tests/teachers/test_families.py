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

sys.path.insert(0, str(Path(__file__).parent))
import families  # noqa: E402
import folders  # noqa: E402
from families import CASES, LEVELS, N  # noqa: E402


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def noise(shape, count=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, *shape, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(case, teacher) by the name of a class, loaded once."""
    known = {}

    def get(name):
        if name not in known:
            case = CASES[name]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = case.make()
            folder = folders.save(tmp_path_factory.mktemp(name), network, case.scheduler())
            known[name] = case, momatch.load_teacher(folder, size=case.size)
        return known[name]

    return get


def theirs_and_levels(case, name, model, cond):
    """(z, λ, diffusers' estimate of x) at every step of its pipeline, in double precision."""
    scheduler, network = case.scheduler(), model.denoiser.network.model
    table = getattr(scheduler, "alphas_cumprod", None)
    steps = run_theirs(case, name, model, cond, scheduler, network)
    found = []
    for step in steps:
        output, sample = step.output.double(), step.sample.double()
        if table is None:
            sigma = step.time / 1000
            one = diffusers.FlowMatchEulerDiscreteScheduler()
            one.set_timesteps(sigmas=[sigma])
            x = one.step(output, one.timesteps[0], sample).prev_sample.double()
            logsnr = 2 * math.log((1 - sigma) / sigma) if sigma < 1 else -80.0
            scale = 1.0 / math.hypot(sigma, 1 - sigma)
        else:
            output = output[:, : sample.shape[1]]
            x = scheduler.step(output, int(step.time), sample).pred_original_sample
            kept = float(table[int(step.time)].double())
            logsnr, scale = (math.log(kept / (1 - kept)) if kept else -80.0), 1.0
        found.append((case.back(sample) * scale, logsnr, case.back(x)))
    return found


def run_theirs(case, name, model, cond, scheduler, network):
    drawn = noise(model.sample_shape)
    network.double()
    if case.pipeline:
        options = families.asked(case, name, cond, model.sample_shape, torch.float64)
        if "sigmas" in pipeline_arguments(case) and not hasattr(scheduler, "alphas_cumprod"):
            options["sigmas"] = [1 - i / LEVELS for i in range(LEVELS)]
        pipe = families.around(case, network, scheduler)
        with torch.no_grad():
            return families.steps_of(pipe, case, options, LEVELS, drawn)
    scheduler.set_timesteps(LEVELS)
    found, z = [], drawn[0].double()
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = network(z, t).sample
        after = scheduler.step(output, t, z).prev_sample
        found.append(families.Step(output, float(t), z, after))
        z = after
    return found


def pipeline_arguments(case):
    import inspect

    return inspect.signature(getattr(diffusers, case.pipeline).__call__).parameters


def test_every_family_has_a_case_and_every_case_a_family():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_are_those_of_the_pipeline(name, loaded):
    case, model = loaded(name)
    cond = families.condition(model)
    try:
        model.denoiser.double()
        levels = theirs_and_levels(case, name, model, cond)
        assert len({level for _, level, _ in levels}) == LEVELS
        for z, level, x in levels:
            logsnr = torch.full((N,), level, dtype=torch.float64)
            with torch.no_grad():
                close(model.denoiser(z, logsnr, cond), x)
    finally:
        model.denoiser.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_samples_and_is_saved_to_the_bit(name, loaded, tmp_path):
    case, model = loaded(name)
    assert model.sample_shape[1:] == case.size
    cond = in_single(families.condition(model))
    samples = model.sample(N, 2, cond)
    assert samples.shape == (N, *model.sample_shape) and samples.isfinite().all()
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(samples, again.sample(N, 2, cond))


def in_single(cond):
    return cond and {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}
