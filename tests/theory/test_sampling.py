"""Samplers against the law that they must produce, and against diffusers."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from momatch.diffusion import process, sampling, schedules
from momatch.diffusion.denoiser import Denoiser, Guided
from momatch.diffusion.distances import sliced_wasserstein2
from momatch.diffusion.gaussian_mixture import ring_of_gaussians

MEAN, VARIANCE = 0.7, 0.3
SCHEDULE = schedules.cosine(logsnr_min=-30.0, logsnr_max=30.0)


def gaussian_denoiser(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
    """E[x | z] for x ~ N(MEAN, VARIANCE)."""
    alpha, sigma = (v[:, None] for v in process.alpha_sigma(logsnr))
    return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (z - alpha * MEAN)


def law_of_algorithm_1(steps: int) -> tuple[float, float]:
    """Mean and variance of the last x̂ for `gaussian_denoiser`: every step is linear in z.

    The step's coefficients are taken from conditioning the joint law of (z_s, z_t) given x, not from
    `process`.
    """
    mean, variance, gain, offset = 0.0, 1.0, 0.0, 0.0
    levels = SCHEDULE(torch.arange(steps, -1, -1, dtype=torch.float64) / steps).tolist()
    for i in range(steps):
        alpha2, sigma2 = 1 / (1 + math.exp(-levels[i])), 1 / (1 + math.exp(levels[i]))
        alpha = math.sqrt(alpha2)
        gain = alpha * VARIANCE / (alpha2 * VARIANCE + sigma2)  # x̂ = gain z + offset
        offset = MEAN - gain * alpha * MEAN
        if i == steps - 1:
            break
        alpha2_s, sigma2_s = 1 / (1 + math.exp(-levels[i + 1])), 1 / (1 + math.exp(levels[i + 1]))
        from_z = math.sqrt(alpha2 / alpha2_s) * sigma2_s / sigma2
        from_x = math.sqrt(alpha2_s) - from_z * alpha
        added = sigma2_s - from_z**2 * sigma2
        mean = from_z * mean + from_x * (gain * mean + offset)
        variance = (from_z + from_x * gain) ** 2 * variance + added
    return gain * mean + offset, gain**2 * variance


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_has_the_law_of_algorithm_1(steps: int) -> None:
    n, rng = 200_000, torch.Generator().manual_seed(steps)
    noise = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    x = sampling.ancestral(gaussian_denoiser, noise, steps, SCHEDULE, generator=rng)
    mean, variance = law_of_algorithm_1(steps)
    # Standard errors of mean and variance of n normal numbers; 5 of them, and rounding where the law is a
    # point.
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n) + 1e-9)
    assert x.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / n) + 1e-9)


def test_ancestral_is_of_first_order() -> None:
    """Variance is lost in proportion to 1/k, so doubling k halves the loss."""
    losses = [VARIANCE - law_of_algorithm_1(k)[1] for k in (128, 256, 512, 1024, 2048)]
    assert all(loss > 0 for loss in losses)
    order = [math.log2(coarse / fine) for coarse, fine in zip(losses, losses[1:], strict=False)]
    assert order == sorted(order) and order[-1] < 1
    assert order[-1] == pytest.approx(1, abs=0.02)
    assert law_of_algorithm_1(1024)[0] == pytest.approx(MEAN, abs=1e-6)


def test_ancestral_with_the_exact_denoiser_converges_to_the_mixture() -> None:
    """At k = 256 what is left is near the sampling floor; with fewer steps it is clearly worse."""
    n, mixture, rng = 5000, ring_of_gaussians(), torch.Generator().manual_seed(0)
    real, other = mixture.sample(n, rng), mixture.sample(n, rng)
    distances = {}
    for steps in (4, 16, 256):
        x = sampling.ancestral(
            mixture.denoiser(), torch.randn(n, 2, generator=rng), steps, SCHEDULE, generator=rng
        )
        distances[steps] = sliced_wasserstein2(x, real, 64, torch.Generator().manual_seed(1))
    floor = sliced_wasserstein2(other, real, 64, torch.Generator().manual_seed(1))
    assert distances[4] > 2 * distances[16] > 2 * distances[256]
    assert distances[256] < 1.5 * floor + 0.01


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ddim_with_exact_x_stays_on_the_line_of_x_and_eps(steps: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 16, 3, generator=rng, dtype=torch.float64)
    seen = []

    def exact(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        seen.append((z.clone(), logsnr))
        return x

    schedule = schedules.cosine()
    first = schedule(torch.ones(16, dtype=torch.float64))
    result = sampling.ddim(exact, process.diffuse(x, first, eps), steps, schedule)
    assert len(seen) == steps and torch.equal(result, x)
    for z, logsnr in seen:
        torch.testing.assert_close(z, process.diffuse(x, logsnr, eps))


@given(ends=st.tuples(st.floats(-15, 15), st.floats(-15, 15)), eta=st.floats(0, 1))
def test_any_eta_keeps_the_marginal_for_exact_x(ends: tuple[float, float], eta: float) -> None:
    """z_t = α_t x + σ_t ε must become α_s x + σ_s ε′ in law, whatever the share of fresh noise."""
    low, high = (torch.tensor(v, dtype=torch.float64) for v in sorted(ends))
    from_z, from_x, std = sampling.step_coefficients(high, low, eta)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.alpha_sigma(high), process.alpha_sigma(low)
    torch.testing.assert_close(from_z * alpha_t + from_x, alpha_s, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((from_z * sigma_t) ** 2 + std**2, sigma_s**2, rtol=1e-9, atol=1e-12)
    assert 0 <= std <= sigma_s


@given(ends=st.tuples(st.floats(-15, 15), st.floats(-15, 15)))
def test_eta_one_is_the_limit_of_eta(ends: tuple[float, float]) -> None:
    low, high = (torch.tensor(v, dtype=torch.float64) for v in sorted(ends))
    limit = sampling.step_coefficients(high, low, 1 - 1e-12)
    for exact, near in zip(sampling.step_coefficients(high, low, 1.0), limit, strict=True):
        torch.testing.assert_close(exact, near, rtol=0, atol=1e-5)


def test_steps_counts_network_calls() -> None:
    calls = []

    def counting(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        calls.append(logsnr[0].item())
        return z

    schedule = schedules.cosine()
    estimates = list(sampling.trajectory(counting, torch.randn(3, 2), 4, schedule))
    assert len(calls) == len(estimates) == 4
    grid = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    assert calls == pytest.approx(schedule(grid).tolist(), rel=1e-6)
    assert sampling.time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sampling.ancestral(gaussian_denoiser, torch.zeros(1, 1), 0, SCHEDULE)
    with pytest.raises(ValueError, match="eta.*1.5"):
        sampling.ancestral(gaussian_denoiser, torch.zeros(1, 1), 2, SCHEDULE, eta=1.5)


def toy_v(z: Tensor, logsnr: Tensor) -> Tensor:
    """Any smooth network will do for comparing samplers."""
    return torch.tanh(z.roll(1, dims=1) + 0.1 * logsnr[:, None]) + 0.5 * z


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("oracle", "eta"), [("ddpm", 1.0), ("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0)])
def test_diffusers_takes_the_same_steps(betas: str, oracle: str, eta: float) -> None:
    """Same betas, network, starting point and noise: every z on the way must be the same."""
    options = dict(
        beta_schedule=betas, clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    if oracle == "ddpm":
        theirs = DDPMScheduler(**options, variance_type="fixed_small")  # pyright: ignore[reportArgumentType]
    else:
        theirs = DDIMScheduler(**options)  # pyright: ignore[reportArgumentType]
    steps, noise = 10, torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = schedules.tabulated(theirs.betas.double().tolist(), logsnr_min=-25.0)
    logsnr_at = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)

    z, expected, rng = noise, [], torch.Generator().manual_seed(1)
    theirs.set_timesteps(steps)
    for timestep in theirs.timesteps:
        expected.append(z)
        v = toy_v(z, logsnr_at[int(timestep)].expand(len(z)))
        more = {} if oracle == "ddpm" else {"eta": eta}
        z = theirs.step(v, timestep, z, generator=rng, **more).prev_sample  # pyright: ignore

    seen = []

    def denoiser(z: Tensor, logsnr: Tensor, cond=None) -> Tensor:
        seen.append(z.clone())
        return process.to_x(toy_v(z, logsnr), z, logsnr, "v")

    rng = torch.Generator().manual_seed(1)
    x = sampling.ancestral(denoiser, noise, steps, schedule, generator=rng, eta=eta)
    # Their ᾱ is a product of 1000 float32 numbers; the last step is noise-free in ours.
    for ours, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)


class LabelledNetwork(nn.Module):
    """x̂ = label · z, counting its calls; label 10 is null."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        self.calls += 1
        label = cond["label"] if cond else torch.full((len(z),), 10)
        return label.to(z.dtype)[:, None] * z


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_is_the_formula_at_one_call(scale: float) -> None:
    network = LabelledNetwork()
    denoiser = Denoiser(network, "x", {"label": 10})
    z, logsnr, cond = torch.randn(6, 2, dtype=torch.float64), torch.zeros(6), {"label": torch.arange(6)}
    given_label, given_null = denoiser(z, logsnr, cond), denoiser(z, logsnr, denoiser.null_cond(cond))
    network.calls = 0
    guided = Guided(denoiser, scale)(z, logsnr, cond)
    assert network.calls == 1
    torch.testing.assert_close(guided, (1 + scale) * given_label - scale * given_null)


def test_guidance_keeps_to_its_interval() -> None:
    denoiser = Denoiser(LabelledNetwork(), "x", {"label": 10})
    z, cond = torch.ones(5, 1, dtype=torch.float64), {"label": torch.ones(5, dtype=torch.int64)}
    logsnr = torch.tensor([-3.0, -2.0, 0.0, 2.0, 3.0])
    guided = Guided(denoiser, 1.0, interval=(-2.0, 2.0))(z, logsnr, cond)
    assert guided[:, 0].tolist() == [1.0, -8.0, -8.0, -8.0, 1.0]


def test_guidance_without_condition_and_bad_options() -> None:
    denoiser = Denoiser(LabelledNetwork(), "x", {"label": 10})
    z, logsnr = torch.ones(2, 1), torch.zeros(2)
    assert torch.equal(Guided(denoiser, 2.0)(z, logsnr, None), denoiser(z, logsnr, None))
    with pytest.raises(ValueError, match="interval"):
        Guided(denoiser, 1.0, interval=(2.0, -2.0))
    with pytest.raises(ValueError, match="no null condition for \\['text'\\]"):
        denoiser.null_cond({"text": torch.zeros(2)})
