"""Adam as the paper sets it, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings, the same for every role.

    Attributes:
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up from 0; linear decay to 0 follows.
        beta1: Adam's first-moment decay (paper: 0).
        beta2: Adam's second-moment decay (paper: 0.99).
        eps: Adam's ε (paper: 1e-12).
        clip_norm: global-norm gradient clip of each role (paper: 1).
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-12
    clip_norm: float = 1.0


def learning_rate_schedule(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate at `step` (0-based) of `num_steps`: linear up to the peak, then linear down to 0."""
    warmup = max(config.warmup_steps, 1)
    rise = (step + 1) / warmup
    fall = (num_steps - step) / max(num_steps - warmup, 1)
    return config.learning_rate * min(rise, fall, 1.0)


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Adam:
    """Adam over `parameters`, fused into one kernel."""
    return torch.optim.Adam(
        parameters, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
