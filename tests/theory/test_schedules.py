"""Noise schedules against their defining formulas."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from momatch.diffusion import schedules

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
EXAMPLES = {
    "cosine": schedules.cosine(),
    "shifted": schedules.shifted_cosine(256),
    "narrow": schedules.cosine(shift=1.0, logsnr_min=-6.0, logsnr_max=4.0),
    "interpolated": schedules.interpolated(shift_low=0.0, shift_high=-3.0),
    "edm": schedules.edm(),
    "rectified_flow": schedules.rectified_flow(shift=3.0),
    "tabulated": schedules.tabulated(BETAS),
}
each_schedule = pytest.mark.parametrize("schedule", EXAMPLES.values(), ids=EXAMPLES)
TIME = st.floats(0, 1)


def times(n: int = 1001, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=dtype)


@each_schedule
def test_decreasing_and_finite(schedule: schedules.NoiseSchedule) -> None:
    for dtype in (torch.float32, torch.float64):
        logsnr = schedule(times(dtype=dtype))
        assert logsnr.dtype == dtype and bool(logsnr.isfinite().all()) and bool((logsnr.diff() < 0).all())


@each_schedule
@given(t=TIME)
def test_inverse(schedule: schedules.NoiseSchedule, t: float) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    assert schedule.inverse(schedule(time)).item() == pytest.approx(t, abs=1e-9)


@each_schedule
def test_inverse_keeps_shape_and_clips(schedule: schedules.NoiseSchedule) -> None:
    t = times(12, torch.float32).view(3, 4)
    back = schedule.inverse(schedule(t))
    assert back.shape == t.shape and back.dtype == t.dtype
    # λ in float32 is known to about 1e-6; where λ(t) is flattest (slope 4) that is a small error of t.
    torch.testing.assert_close(back, t, rtol=0, atol=1e-5)
    assert schedule.inverse(torch.tensor([-1e3, 1e3])).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)


@each_schedule
def test_build_makes_it_again(schedule: schedules.NoiseSchedule) -> None:
    again = schedules.build(schedule.name, **json.loads(json.dumps(schedule.options)))
    assert (again.name, again.options) == (schedule.name, schedule.options)
    assert torch.equal(again(times()), schedule(times()))


@given(t=st.floats(0.01, 0.99), shift=st.floats(-4, 4))
def test_cosine(t: float, shift: float) -> None:
    """α = cos(πt/2), σ = sin(πt/2), up to the cut of the ends (here e^−20 of the quarter turn)."""
    schedule = schedules.cosine(shift, logsnr_min=-40, logsnr_max=40)
    expected = 2 * math.log(math.cos(math.pi * t / 2) / math.sin(math.pi * t / 2)) + shift
    assert schedule(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [schedules.cosine, schedules.rectified_flow])
def test_ends_are_where_they_were_cut(make) -> None:
    ends = make(logsnr_min=-9.0, logsnr_max=7.0)(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([7.0, -9.0], abs=1e-9)


def test_resolution_shift() -> None:
    """Averaging 2×2 pixels halves the noise's standard deviation: at twice the side, λ falls by 2 log 2."""
    difference = schedules.shifted_cosine(64)(times(5)) - schedules.shifted_cosine(32)(times(5))
    torch.testing.assert_close(difference, torch.full_like(difference, -2 * math.log(2)))


def test_interpolated_ends_on_either_shift() -> None:
    mixed = schedules.interpolated(shift_low=1.0, shift_high=-2.0)
    assert mixed(times())[0].item() == pytest.approx(schedules.cosine(1.0)(times())[0].item(), abs=1e-9)
    assert mixed(times())[-1].item() == pytest.approx(schedules.cosine(-2.0)(times())[-1].item(), abs=1e-9)


@given(t=TIME)
def test_edm(t: float) -> None:
    """Karras et al., eq. 5, in σ/α; t counts from the clean end."""
    sigma = (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    logsnr = schedules.edm()(torch.tensor(t, dtype=torch.float64)).item()
    assert logsnr == pytest.approx(-2 * math.log(sigma), abs=1e-9)


@given(t=st.floats(0.01, 0.99), shift=st.floats(0.3, 6))
def test_rectified_flow(t: float, shift: float) -> None:
    """σ/α = t′/(1 − t′) with the time shift of SD3, t′ = shift·t/(1 + (shift − 1)t)."""
    shifted = shift * t / (1 + (shift - 1) * t)
    schedule = schedules.rectified_flow(shift, logsnr_min=-60, logsnr_max=60)
    expected = 2 * math.log((1 - shifted) / shifted)
    assert schedule(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-8)


def test_tabulated_hits_every_entry() -> None:
    alpha_bar = 1.0
    expected = []
    for beta in BETAS:
        alpha_bar *= 1 - beta
        expected.append(alpha_bar)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha2 = torch.sigmoid(EXAMPLES["tabulated"](t))
    torch.testing.assert_close(alpha2, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert EXAMPLES["tabulated"](torch.zeros(1)).item() == schedules.LOGSNR_MAX


def test_tabulated_zero_terminal_snr_and_clean_start() -> None:
    schedule = schedules.tabulated([1e-9, 0.5, 1.0])
    ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends[1].item() == schedules.TABLE_LOGSNR_MIN
    assert ends[0].item() > math.log(1e9) - 1


@pytest.mark.parametrize("betas", [[], [0.1, 1.2], [-0.1], [0.1, math.nan], [0.1, 0.0], [1.0, 1.0]])
def test_bad_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        schedules.tabulated(betas)


def test_increasing_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="not decreasing"):
        schedules.interpolated(shift_low=0.0, shift_high=20.0)


def test_unknown_schedule_and_option_are_refused() -> None:
    with pytest.raises(ValueError, match="'linear'.*cosine"):
        schedules.build("linear")
    with pytest.raises(ValueError, match="rho"):
        schedules.build("cosine", rho=7)


LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cosine(),
        schedules.cosine(-1.5),
        schedules.rectified_flow(2.0),
        schedules.edm(),
        schedules.tabulated(LINEAR),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_cut_leaves_the_rest_of_the_schedule_as_it_was(schedule) -> None:
    cut = schedules.cut(schedule, -4.0)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    end = float(schedule.inverse(cut(t[-1:])))
    assert -4.0 - 1e-9 <= float(cut(t[-1])) < -3.97 and end < 1
    torch.testing.assert_close(cut(t), schedule(t * end), rtol=1e-6, atol=1e-6)
    again = schedules.build(cut.name, **json.loads(json.dumps(cut.options)))
    assert torch.equal(again(t), cut(t))
    assert schedules.cut(schedule, -80.0) is schedule


def test_a_table_is_cut_to_a_multiple_of_the_steps() -> None:
    whole = schedules.tabulated(LINEAR)
    cut = schedules.cut(whole, -6.0, 16)
    entries = len(cut.options["betas"])
    assert entries % 16 == 0 and cut.options["betas"] == LINEAR[:entries]
    logsnr = whole(torch.tensor([entries, entries + 17], dtype=torch.float64) / 1000)
    assert logsnr[0] >= -6 > logsnr[1]


@pytest.mark.parametrize(
    ("schedule", "logsnr_min", "says"),
    [
        (schedules.interpolated(1.0), -4.0, "cannot be cut"),
        (schedules.tabulated([0.5, 0.9]), -0.5, "nothing of the schedule"),
        (schedules.cosine(), 20.0, "nothing of the schedule"),
    ],
)
def test_what_cannot_be_cut_is_refused(schedule, logsnr_min, says) -> None:
    with pytest.raises(ValueError, match=says):
        schedules.cut(schedule, logsnr_min, 2)
