"""Recipes: each a function that returns a full config. The command line can override any field of them.

The numbers are explained, with what was tried, in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from momatch.config import (
    ConfigError,
    DistillConfig,
    MonitorConfig,
    RunConfig,
    TeacherConfig,
    WeightingConfig,
)
from momatch.networks.configs import UNetConfig
from momatch.training.loop import TrainConfig
from momatch.training.optim import OptimConfig

LONGER_STEPS = WeightingConfig(delta_exponent=0.6)  # flat w; what moved students most (docs/decisions.md)


def digits_teacher() -> TeacherConfig:
    """The digits teacher that ships with the package: a 174 k-parameter U-Net, 5,000 steps."""
    return TeacherConfig(
        network=UNetConfig(channels=(16, 32, 64), attention_levels=(2,)),
        train=TrainConfig(num_steps=5000, batch_size=128, checkpoint_every=1000),
    )


def digits(steps: int) -> DistillConfig:
    """Digits student as documented in docs/numbers.md."""
    return DistillConfig(
        steps=steps,
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=1500, batch_size=128),
        optim=OptimConfig(learning_rate=3e-4),
    )


def digits_1() -> DistillConfig:
    """Digits student of 1 step, alternating moment matching."""
    return digits(1)


def digits_2() -> DistillConfig:
    """Digits student of 2 steps, alternating moment matching."""
    return digits(2)


def digits_4() -> DistillConfig:
    """Digits student of 4 steps, alternating moment matching."""
    return digits(4)


def digits_8() -> DistillConfig:
    """Digits student of 8 steps, alternating moment matching."""
    return digits(8)


def digits_instant(steps: int) -> DistillConfig:
    """Digits student by Algorithm 3: as many student updates and pictures a minibatch as `digits`."""
    return replace(
        digits(steps),
        method="instant",
        train=TrainConfig(num_steps=750, batch_size=128, log_every=10),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=50),
    )


def digits_instant_8() -> DistillConfig:
    """Digits student of 8 steps, instant moment matching (no auxiliary network)."""
    return digits_instant(8)


def demo() -> DistillConfig:
    """What `momatch demo` runs: digits, 8 steps, two thirds of the documented budget."""
    return DistillConfig(
        steps=8,
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=1000, batch_size=128, checkpoint_every=200),
        optim=OptimConfig(learning_rate=3e-4),
        monitor=MonitorConfig(every=200),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits-teacher": digits_teacher,
    "digits-1": digits_1,
    "digits-2": digits_2,
    "digits-4": digits_4,
    "digits-8": digits_8,
    "digits-instant-8": digits_instant_8,
    "demo": demo,
}


def recipe(name: str) -> RunConfig:
    """The config of a recipe.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
