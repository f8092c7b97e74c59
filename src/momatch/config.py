"""Everything a run can be told, as plain data: from recipes, the command line or a run's config.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from momatch import schedules
from momatch.denoiser import Clipped, Denoiser, Guided
from momatch.errors import UsageError
from momatch.methods import weighting
from momatch.methods.transition import Posterior, Source
from momatch.methods.weighting import TimeDensity, Weighting
from momatch.model import MAX_SEED, MAX_STUDENT_STEPS
from momatch.networks.configs import UNetConfig
from momatch.process import Prediction
from momatch.schedules import NoiseSchedule
from momatch.training.loop import TrainConfig
from momatch.training.optim import OptimConfig


class ConfigError(UsageError):
    """A config that cannot be run; the message names the key, the value and what to do."""


@dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule.

    Attributes:
        name: which; see momatch.schedules. "teacher" takes the teacher's, whatever it is (students only).
        shift: logSNR shift; of the clean end alone if interpolated; edm has none. Negative means more noise.
        shift_high: logSNR shift at the noisy end (interpolated only).
    """

    name: Literal["teacher", "cosine", "interpolated", "edm", "rectified_flow"] = "cosine"
    shift: float = 0.0
    shift_high: float = 0.0

    def build(self, teacher: NoiseSchedule | None = None) -> NoiseSchedule:
        """The schedule itself, given the teacher's if there is one."""
        if self.name == "teacher":
            if teacher is None:
                raise ConfigError(
                    "schedule.name is 'teacher'; a teacher needs a schedule of its own, such as cosine"
                )
            return teacher
        if self.name == "interpolated":
            try:
                return schedules.interpolated(self.shift, self.shift_high)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if self.name == "rectified_flow":
            return schedules.rectified_flow(math.exp(-self.shift / 2))
        return schedules.edm() if self.name == "edm" else schedules.cosine(self.shift)


@dataclass(frozen=True)
class WeightingConfig:
    """Which noise levels count how much.

    Attributes:
        name: w(s); see momatch.methods.weighting.
        maximum: cap of snr_clipped.
        density: p(s): "power" is s = u^exponent, "rho_grid" is EDM's test-time grid.
        exponent: of the power density; 1 is uniform, above 1 trains more at low noise.
        delta_exponent: t − s = u^delta_exponent / k; 1 is the paper, below 1 means longer steps.
    """

    name: Literal["flat", "edm", "v", "snr_clipped", "adaptive"] = "flat"
    maximum: float = 100.0
    density: Literal["power", "rho_grid"] = "power"
    exponent: float = 1.0
    delta_exponent: float = 1.0

    def build_weighting(self) -> Weighting:
        """w(s)."""
        if self.name == "snr_clipped":
            return weighting.snr_clipped(self.maximum)
        makers = {
            "flat": weighting.flat,
            "edm": weighting.edm_weight,
            "v": weighting.v_weight,
            "adaptive": weighting.adaptive,
        }
        return makers[self.name]()

    def build_density(self, schedule: NoiseSchedule) -> TimeDensity:
        """p(s), on the given schedule."""
        return weighting.rho_grid(schedule) if self.density == "rho_grid" else weighting.power(self.exponent)


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance of the teacher; what it does is distilled into the student.

    Attributes:
        scale: w in (1 + w) g(z, c) − w g(z, ∅); 0 is no guidance.
        logsnr_min: guidance acts where λ is at least this …
        logsnr_max: … and at most this.
        clip: keep the teacher's estimate in [−1, 1]: "static" clips, "dynamic" rescales (Imagen).
        percentile: of "dynamic".
    """

    scale: float = 0.0
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    clip: Literal["none", "static", "dynamic"] = "none"
    percentile: float = 0.995

    def apply(self, denoiser: Denoiser) -> Denoiser:
        """The guided (and clipped) denoiser; `denoiser` itself if nothing is asked for."""
        if self.scale:
            denoiser = Guided(denoiser, self.scale, (self.logsnr_min, self.logsnr_max))
        return denoiser if self.clip == "none" else Clipped(denoiser, self.clip, self.percentile)


@dataclass(frozen=True)
class InstantConfig:
    """What Algorithm 3 needs beyond the rest.

    Attributes:
        product: how (∂g_θ/∂θ) ν is computed: "forward" mode, central "difference", or "auto": forward where
            the network can.
        lambda_steps: minibatches of the teacher's loss on real data from which Λ is estimated; 0 takes the
            second moments saved with the teacher.
        lambda_eps: ε of Λ = 1/(√v̂ + ε·rms √v̂).
        centre: subtract the gradient that real data give the teacher.
    """

    product: Literal["auto", "forward", "difference"] = "auto"
    lambda_steps: int = 0
    lambda_eps: float = 0.1
    centre: bool = False


@dataclass(frozen=True)
class StoppingConfig:
    """When to end a run before its last step. The best student seen is kept then, not the last.

    Attributes:
        patience: looks at the samples without a better cheap Fréchet distance; 0 goes on to the end.
        window: logged values that the smoothed loss of Algorithm 3 is the mean of.
        within_noise: with Algorithm 3, stop when the smoothed loss is less than this many of its standard
            errors above 0, or has not fallen by as many for a whole window; 0 goes on to the end.
        held_back: share of the training pictures that a run with a stopping rule does not train on: its looks
            are compared with them, so that copying the training pictures does not count as better.
    """

    patience: int = 0
    window: int = 25
    within_noise: float = 0.0
    held_back: float = 0.1

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self.patience or self.within_noise)


@dataclass(frozen=True)
class MonitorConfig:
    """What is looked at while a run goes on.

    Attributes:
        every: steps between looks; 0 never looks.
        num_samples: samples for the cheap Fréchet distance (biased upwards, so compare it only with itself).
    """

    every: int = 250
    num_samples: int = 500


@dataclass(frozen=True)
class TeacherConfig:
    """Training a teacher by denoising.

    Attributes:
        data: "digits", or a folder or .npz of pictures.
        network: the network's shape; image_channels and num_classes follow the data.
        schedule: noise schedule.
        prediction: what the network's output stands for.
        cond_dropout: share of samples trained on the null label.
        weighting: w(t) and p(t) of the denoising loss.
        sampling_steps: network calls this teacher samples with unless told otherwise.
        train: length and rhythm.
        optim: optimizer.
        monitor: looks at the samples.
    """

    data: str = "digits"
    network: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: Prediction = "v"
    cond_dropout: float = 0.1
    weighting: WeightingConfig = field(default_factory=lambda: WeightingConfig(name="v"))
    sampling_steps: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, beta1=0.9, eps=1e-8, warmup_steps=200)
    )
    monitor: MonitorConfig = field(default_factory=lambda: MonitorConfig(every=1000))


@dataclass(frozen=True)
class DistillConfig:
    """Distilling a teacher by moment matching.

    Attributes:
        teacher: "digits" (shipped with the package), or the folder of a teacher or of a run that trained one.
        data: "digits", or a folder or .npz of pictures.
        steps: k, network calls of the student, 1 to 16.
        method: "alternating" (Algorithm 2) or "instant" (Algorithm 3: no auxiliary network).
        update: of alternating: "alternating", as the paper, or "joint" (both networks from one draw, 0.7 of
            the cost).
        weighting: w(s) and p(s).
        teacher_term: factor of the auxiliary's pull towards the teacher; 1 in the paper.
        instant: settings of Algorithm 3.
        guidance: of the teacher.
        schedule: the student's noise schedule.
        posterior: "conditional" draws z_s given z_t and x̃, the paper; "fresh" forgets z_t (its ablation).
        source: z_t from "data", the paper, or from a "rollout" of the student, which uses no pictures.
        student_dropout: dropout rate of the student; none in the paper.
        warm_start_steps: of the steps, how many come first that train the student by plain denoising, for a
            student whose schedule is not its teacher's; they count in train.num_steps.
        stopping: when to end early.
        train: length and rhythm; a pair of alternating updates counts as two steps. A step of Algorithm 3
            takes two minibatches of batch_size.
        optim: optimizer, the same for student and auxiliary.
        monitor: looks at the samples.
    """

    teacher: str = "digits"
    data: str = "digits"
    steps: int = 8
    method: Literal["alternating", "instant"] = "alternating"
    update: Literal["alternating", "joint"] = "alternating"
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    teacher_term: float = 1.0
    instant: InstantConfig = field(default_factory=InstantConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(name="teacher"))
    posterior: Posterior = "conditional"
    source: Source = "data"
    student_dropout: float = 0.0
    warm_start_steps: int = 0
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


RunConfig = TeacherConfig | DistillConfig
Config = TypeVar("Config", bound=RunConfig)


def check(config: RunConfig) -> None:
    """Refuse impossible values before any work.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
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
    for key in ("shift", "shift_high"):
        value = getattr(config.schedule, key)
        _require(abs(value) <= 30, f"schedule.{key}", value, "it must lie in [−30, 30]")
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
        widths = config.network.channels
        _require(
            bool(widths) and all(w > 0 and w % 8 == 0 for w in widths),
            "network.channels",
            widths,
            "use multiples of 8",
        )
        levels = range(len(widths))
        for level in config.network.attention_levels:
            if level in levels and widths[level] >= 64:
                _require(
                    widths[level] % 32 == 0,
                    "network.channels",
                    widths,
                    "levels with attention need multiples of 32",
                )
        fits = all(level in levels for level in config.network.attention_levels)
        _require(
            fits,
            "network.attention_levels",
            config.network.attention_levels,
            f"use levels 0 to {len(widths) - 1}",
        )
        dim = config.network.embedding_dim
        _require(dim >= 2 and dim % 2 == 0, "network.embedding_dim", dim, "use an even number, 2 or more")
        _require(
            config.network.blocks_per_level >= 1,
            "network.blocks_per_level",
            config.network.blocks_per_level,
            "use 1 or more",
        )
        _require(
            0 <= config.network.dropout < 1,
            "network.dropout",
            config.network.dropout,
            "it must lie in [0, 1)",
        )
        _require(0 <= config.cond_dropout < 1, "cond_dropout", config.cond_dropout, "it must lie in [0, 1)")
        _require(config.sampling_steps >= 1, "sampling_steps", config.sampling_steps, "it must be at least 1")


def _check_distillation(config: DistillConfig) -> None:
    _require(1 <= config.steps <= MAX_STUDENT_STEPS, "steps", config.steps, f"use 1 to {MAX_STUDENT_STEPS}")
    guidance, stopping, instant = config.guidance, config.stopping, config.instant
    at_least_0 = {
        "teacher_term": config.teacher_term,
        "guidance.scale": guidance.scale,
        "instant.lambda_steps": instant.lambda_steps,
        "instant.lambda_eps": instant.lambda_eps,
        "stopping.patience": stopping.patience,
        "stopping.within_noise": stopping.within_noise,
    }
    for key, value in at_least_0.items():
        _require(0 <= value < math.inf, key, value, "it must not be negative, and finite")
    _require(
        guidance.logsnr_min < guidance.logsnr_max,
        "guidance.logsnr_min",
        guidance.logsnr_min,
        f"it must be below guidance.logsnr_max, which is {guidance.logsnr_max}",
    )
    _require(0 < guidance.percentile < 1, "guidance.percentile", guidance.percentile, "it must lie in (0, 1)")
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


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON types, with the kind of run."""
    kind = "distill" if isinstance(config, DistillConfig) else "train-teacher"
    return json.loads(json.dumps({"kind": kind, **asdict(config)}))


def from_json(fields: dict[str, Any], config_type: type[Config]) -> Config:
    """The inverse of `to_json`; strict about unknown keys and types.

    Raises:
        ConfigError: naming the first offending key.
    """
    from pydantic import TypeAdapter, ValidationError

    rest = {key: value for key, value in fields.items() if key not in ("kind", "inputs")}
    _refuse_unknown(rest, to_json(config_type()), "")
    try:
        return TypeAdapter(config_type).validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"config key {key!r} has value {first['input']!r}: {first['msg'].lower()}"
        ) from None


def read(path: Path) -> RunConfig:
    """Read a run's config.json, of whichever kind it is.

    Raises:
        ConfigError: if it is missing, not JSON, or not the config of a run.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    kinds: dict[str, type[TeacherConfig] | type[DistillConfig]] = {
        "train-teacher": TeacherConfig,
        "distill": DistillConfig,
    }
    if not isinstance(fields, dict) or fields.get("kind") not in kinds:
        raise ConfigError(f"{path} is not the config of a run: its 'kind' is none of {', '.join(kinds)}")
    return from_json(fields, kinds[fields["kind"]])


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two JSON configs differ, dotted, each as "key: old there, new here"."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def _flatten(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in fields.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value}; {remedy}")


def _refuse_unknown(fields: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"unknown config key {prefix + key!r}; known here are {', '.join(known)}")
        if isinstance(value, dict) and isinstance(known[key], dict):
            _refuse_unknown(value, known[key], f"{prefix}{key}.")
