"""Refusing impossible settings before any work, each in one sentence that names key, value and remedy."""

from __future__ import annotations

import math
from typing import Any, get_args

from momatch.config.schema import AdapterConfig, DistillConfig, GuidanceConfig, RunConfig, to_json
from momatch.diffusion.denoiser import Precision
from momatch.models.model import MAX_SEED, MAX_STUDENT_STEPS
from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.utils.errors import ConfigError

MOST_GUIDANCE = 1000.0


def check(config: RunConfig) -> None:
    """Refuse impossible values before any work.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    _require(isinstance(config.device, str), "device", config.device, 'give its name, such as "cuda:0"')
    for key, value in _flatten(to_json(config)):
        if isinstance(value, float):
            _require(math.isfinite(value), key, value, "it must be finite")
    positive = {
        "train.num_steps": config.train.num_steps,
        "train.batch_size": config.train.batch_size,
        "train.log_every": config.train.log_every,
        "train.checkpoint_every": config.train.checkpoint_every,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.clip_norm": config.optim.clip_norm,
        "weighting.exponent": config.weighting.exponent,
        "weighting.delta_exponent": config.weighting.delta_exponent,
        "weighting.maximum": config.weighting.maximum,
    }
    for key, value in positive.items():
        _require(0 < value < math.inf, key, value, "it must be above 0 and finite")
    for key in ("eps", "warmup_steps"):
        value = getattr(config.optim, key)
        _require(0 <= value < math.inf, f"optim.{key}", value, "it must not be negative")
    _require(0 <= config.train.seed < MAX_SEED, "train.seed", config.train.seed, f"use 0 to {MAX_SEED - 1}")
    known = get_args(Precision)
    _require(config.precision in known, "precision", config.precision, f"use {' or '.join(known)}")
    _require(config.image_size >= 0, "image_size", config.image_size, "it must be 0 (as they are) or more")
    for key in ("shift", "shift_high"):
        value = getattr(config.schedule, key)
        _require(abs(value) <= 30, f"schedule.{key}", value, "it must lie in [−30, 30]")
    lowest = config.schedule.logsnr_min
    _require(-30 <= lowest <= 0, "schedule.logsnr_min", lowest, "it must lie in [−30, 0], 0 to cut nothing")
    _require(config.monitor.every >= 0, "monitor.every", config.monitor.every, "it must be 0 (never) or more")
    _require(
        config.monitor.num_samples >= 100,
        "monitor.num_samples",
        config.monitor.num_samples,
        "use 100 or more",
    )
    for key in ("beta1", "beta2"):
        value = getattr(config.optim, key)
        _require(0 <= value < 1, f"optim.{key}", value, "it must lie in [0, 1)")
    if isinstance(config, DistillConfig):
        _check_distillation(config)
    else:
        _check_network(config.network)
        _require(0 <= config.cond_dropout < 1, "cond_dropout", config.cond_dropout, "it must lie in [0, 1)")
        _require(config.sampling_steps >= 1, "sampling_steps", config.sampling_steps, "it must be at least 1")


def _check_network(network: UNetConfig | UViTConfig) -> None:
    widths, dim = network.channels, network.embedding_dim
    fits = all(w > 0 and w % 8 == 0 for w in widths)
    _require(fits, "network.channels", widths, "use multiples of 8")
    _require(dim >= 2 and dim % 2 == 0, "network.embedding_dim", dim, "use an even number, 2 or more")
    blocks = network.blocks_per_level
    _require(blocks >= 1, "network.blocks_per_level", blocks, "use 1 or more")
    _require(0 <= network.dropout < 1, "network.dropout", network.dropout, "it must lie in [0, 1)")
    if isinstance(network, UViTConfig):
        width = network.width
        fits = width > 0 and width % (64 if width > 64 else 4) == 0
        _require(fits, "network.width", width, "use a multiple of 4, of 64 if above 64")
        _require(network.depth >= 1, "network.depth", network.depth, "use 1 or more")
        _require(network.patch_size >= 1, "network.patch_size", network.patch_size, "use 1 or more")
        return
    _require(bool(widths), "network.channels", widths, "name one width at least")
    levels = network.attention_levels
    fits = all(0 <= level < len(widths) for level in levels)
    _require(fits, "network.attention_levels", levels, f"use levels 0 to {len(widths) - 1}")
    fits = all(widths[level] < 64 or widths[level] % 32 == 0 for level in levels)
    _require(fits, "network.channels", widths, "levels with attention need multiples of 32")


def check_guidance(guidance: GuidanceConfig) -> None:
    """Refuse impossible guidance.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    scale = guidance.scale
    _require(0 <= scale <= MOST_GUIDANCE, "guidance.scale", scale, f"use 0 to {MOST_GUIDANCE:g}")
    _require(
        guidance.logsnr_min < guidance.logsnr_max,
        "guidance.logsnr_min",
        guidance.logsnr_min,
        f"it must be below guidance.logsnr_max, which is {guidance.logsnr_max}",
    )
    _require(0 < guidance.percentile < 1, "guidance.percentile", guidance.percentile, "it must lie in (0, 1)")


def _check_distillation(config: DistillConfig) -> None:
    _require(1 <= config.steps <= MAX_STUDENT_STEPS, "steps", config.steps, f"use 1 to {MAX_STUDENT_STEPS}")
    guidance, stopping, instant = config.guidance, config.stopping, config.instant
    at_least_0 = {
        "teacher_size": config.teacher_size,
        "teacher_term": config.teacher_term,
        "instant.lambda_steps": instant.lambda_steps,
        "instant.lambda_eps": instant.lambda_eps,
        "stopping.patience": stopping.patience,
        "stopping.within_noise": stopping.within_noise,
    }
    for key, value in at_least_0.items():
        _require(0 <= value < math.inf, key, value, "it must not be negative, and finite")
    check_guidance(guidance)
    _check_adapter(config.adapter)
    _require(
        0 <= config.student_dropout < 1, "student_dropout", config.student_dropout, "it must lie in [0, 1)"
    )
    _require(
        0 <= config.warm_start_steps < config.train.num_steps,
        "warm_start_steps",
        config.warm_start_steps,
        f"it must be below train.num_steps, which is {config.train.num_steps}",
    )
    _require(stopping.window >= 2, "stopping.window", stopping.window, "it must be at least 2")
    _require(0 < stopping.held_back < 1, "stopping.held_back", stopping.held_back, "it must lie in (0, 1)")
    if stopping.active:
        _require(config.monitor.every > 0, "monitor.every", 0, "a stopping rule needs looks at the samples")
    if config.method == "instant":
        auxiliary = config.adapter.auxiliary
        _require(auxiliary == "adapter", "adapter.auxiliary", auxiliary, "leave it out with method=instant")
        _require(config.update == "alternating", "update", config.update, "leave it out with method=instant")
    else:
        _require(
            not stopping.within_noise,
            "stopping.within_noise",
            stopping.within_noise,
            "it needs method=instant; use stopping.patience here",
        )
    if instant.centre:
        _require(config.source == "data", "source", config.source, "instant.centre needs source=data")


def _check_adapter(adapter: AdapterConfig) -> None:
    _require(adapter.rank >= 0, "adapter.rank", adapter.rank, "use 0 (whole networks) or more, such as 8")
    _require(adapter.alpha >= 0, "adapter.alpha", adapter.alpha, "use 0 (the rank) or more")
    _require(0 <= adapter.dropout < 1, "adapter.dropout", adapter.dropout, "it must lie in [0, 1)")
    if adapter.rank == 0:
        unused = {"alpha": adapter.alpha, "dropout": adapter.dropout, "targets": adapter.targets}
        for key, value in unused.items():
            _require(not value, f"adapter.{key}", value, "it needs adapter.rank above 0")
        full = adapter.auxiliary == "full"
        _require(not full, "adapter.auxiliary", adapter.auxiliary, "it needs adapter.rank above 0")


def _flatten(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in fields.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value}; {remedy}")
