"""DPM-Solver++ and UniPC on a schedule of ours, against the exact flow of Gaussian data."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import momatch
from momatch.cli import main
from momatch.diffusion import sampling, schedules
from momatch.diffusion.solvers import SOLVERS, solve

pytest.importorskip("diffusers")
SCHEDULE = schedules.cosine()
MEAN, VARIANCE = 0.6, 0.25
NOISE = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]


def exact_mean(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
    alpha, sigma2 = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr)[:, None]
    return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma2) * (z - alpha * MEAN)


def exact_flow(z: Tensor) -> Tensor:
    """Where the probability flow leads: each quantile of z_1 to the same quantile of the data."""
    start = SCHEDULE(torch.ones(1).double())
    alpha, sigma2 = torch.sigmoid(start).sqrt(), torch.sigmoid(-start)
    return MEAN + math.sqrt(VARIANCE) * (z - alpha * MEAN) / (alpha**2 * VARIANCE + sigma2).sqrt()


def error(samples: Tensor) -> float:
    return float((samples - exact_flow(NOISE)).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_of_second_order_beats_ddim_and_more_the_more_steps(name):
    ratios = []
    for steps in (7, 16, 64):  # 7 does not divide 1,000
        ddim = error(sampling.ddim(exact_mean, NOISE, steps, SCHEDULE))
        ratios.append(ddim / error(solve(name, exact_mean, NOISE, steps, SCHEDULE)))
    assert ratios[0] > 1.5 and min(ratios[1:]) > 5
    coarse, fine = (error(solve(name, exact_mean, NOISE, k, SCHEDULE)) for k in (32, 128))
    assert coarse / fine > 4  # DDIM: 4


@pytest.mark.parametrize("name", SOLVERS)
def test_it_calls_the_network_at_the_times_of_the_grid_and_returns_its_last_estimate(name):
    for steps in (1, 3, 8):
        seen = []

        def watched(z, logsnr, cond, seen=seen):
            assert cond == {"label": 3} and logsnr.shape == (11,)
            seen.append((float(logsnr[0]), exact_mean(z, logsnr)))
            return seen[-1][1]

        x = solve(name, watched, NOISE, steps, SCHEDULE, {"label": 3})  # type: ignore[dict-item]
        torch.testing.assert_close(
            torch.tensor([level for level, _ in seen]).double(),
            SCHEDULE(sampling.time_grid(steps))[:-1],
            atol=1e-4,
            rtol=1e-5,
        )
        torch.testing.assert_close(x, seen[-1][1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        solve(name, exact_mean, NOISE, 0, SCHEDULE)


def test_a_teacher_is_evaluated_by_the_sampler_asked_for(monkeypatch, capsys, tmp_path):
    teacher, cond = momatch.load_teacher("digits"), {"label": torch.tensor([3, 5])}
    found = replace(teacher, sampler="unipc").sample(2, 8, cond, seed=1)
    noise = torch.randn((256, 1, 8, 8), generator=torch.Generator().manual_seed(1_000_003))[:2]
    torch.testing.assert_close(found, solve("unipc", teacher.denoiser, noise, 8, teacher.schedule, cond))
    assert main(["evaluate", "digits", "--steps", "2", "--sampler", "dpm++", "--num", "100"]) == 0
    assert "teacher dpm++" in capsys.readouterr().out
    assert main(["evaluate", "digits", "--sampler", "euler"]) == 2
    assert "--sampler" in capsys.readouterr().err
