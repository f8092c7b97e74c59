"""Everything a run can be told, as plain data: from recipes, the command line or a run's config.json."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser, Guided, Precision, Thresholded
from momatch.diffusion.process import Prediction
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods import weighting
from momatch.methods.transition import Posterior, Source
from momatch.methods.weighting import TimeDensity, Weighting
from momatch.networks import registry
from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.utils.devices import AUTO
from momatch.utils.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often.

    Attributes:
        num_steps: optimizer steps in all (for alternating matching: of both kinds together).
        batch_size: pictures a step.
        seed: of everything random.
        log_every: steps between records that carry metrics.
        checkpoint_every: steps between checkpoints.
    """

    num_steps: int = 3000
    batch_size: int = 128
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500


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


@dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule.

    Attributes:
        name: which; see momatch.schedules. "teacher" takes the teacher's, whatever it is (students only).
        shift: logSNR shift; of the clean end alone if interpolated; edm has none. Negative means more noise.
        shift_high: logSNR shift at the noisy end (interpolated only).
        logsnr_min: sampling begins at this λ, and what lies below is left out (not if interpolated); 0 leaves
            out nothing.
    """

    name: Literal["teacher", "cosine", "interpolated", "edm", "rectified_flow"] = "cosine"
    shift: float = 0.0
    shift_high: float = 0.0
    logsnr_min: float = 0.0

    def build(self, teacher: NoiseSchedule | None = None, steps: int = 1) -> NoiseSchedule:
        """The schedule itself, given the teacher's if there is one, and the steps to be taken on it."""
        whole = self._whole(teacher)
        if not self.logsnr_min:
            return whole
        try:
            return schedules.cut(whole, self.logsnr_min, steps)
        except ValueError as error:
            raise ConfigError(f"schedule.logsnr_min is {self.logsnr_min}: {error}; use 0") from None

    def _whole(self, teacher: NoiseSchedule | None) -> NoiseSchedule:
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
        name: w(s); see momatch.methods.weighting. "auto" is flat, or signal where the network predicts ε.
        maximum: cap of snr_clipped.
        density: p(s): "power" is s = u^exponent, "rho_grid" is EDM's test-time grid.
        exponent: of the power density; 1 is uniform, above 1 trains more at low noise.
        delta_exponent: t − s = u^delta_exponent / k; 1 is the paper, below 1 means longer steps, above 1
            shorter ones.
    """

    name: Literal["auto", "flat", "signal", "edm", "v", "snr_clipped", "adaptive"] = "auto"
    maximum: float = 100.0
    density: Literal["power", "rho_grid"] = "power"
    exponent: float = 1.0
    delta_exponent: float = 1.0

    def build_weighting(self, prediction: Prediction) -> Weighting:
        """w(s), for networks whose output stands for `prediction`."""
        if self.name == "snr_clipped":
            return weighting.snr_clipped(self.maximum)
        makers = {
            "auto": weighting.signal if prediction == "eps" else weighting.flat,
            "flat": weighting.flat,
            "signal": weighting.signal,
            "edm": weighting.edm_weight,
            "v": weighting.v_weight,
            "adaptive": weighting.adaptive,
        }
        return makers[self.name]()

    def build_density(self, schedule: NoiseSchedule) -> TimeDensity:
        """p(s), on the given schedule."""
        return weighting.rho_grid(schedule) if self.density == "rho_grid" else weighting.power(self.exponent)


Clip = Literal["none", "static", "dynamic"]


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance of the teacher; what it does is distilled into the student.

    Attributes:
        scale: w in (1 + w) g(z, c) − w g(z, ∅); 0 is no guidance. One less than diffusers' guidance_scale.
        logsnr_min: guidance acts where λ is at least this …
        logsnr_max: … and at most this.
        clip: keep the teacher's estimate in [−1, 1]: "static" clips, and so does the student; "dynamic"
            rescales (Imagen), and the student's outputs are left as they are.
        percentile: of "dynamic".
    """

    scale: float = 0.0
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    clip: Clip = "none"
    percentile: float = 0.995

    def apply(self, denoiser: Denoiser) -> Denoiser:
        """The guided (and clipped) denoiser; `denoiser` itself if nothing is asked for."""
        if self.clip == "static":
            denoiser = copy.copy(denoiser)  # the same weights
            denoiser.clip = 1.0
        if self.scale:
            denoiser = Guided(denoiser, self.scale, (self.logsnr_min, self.logsnr_max))
        return Thresholded(denoiser, self.percentile) if self.clip == "dynamic" else denoiser


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
class AdapterConfig:
    """A student that is the frozen teacher and a LoRA adapter, instead of a network of its own.

    Attributes:
        rank: of the adapter's matrices; 0 trains whole networks.
        alpha: the adapter's output is multiplied by alpha / rank; 0 means rank, a factor of 1.
        dropout: of the student's adapter, on its input.
        targets: layers that get adapters, each the end of a name ("to_q") or a regular expression for a whole
            name; none given means every linear layer and every convolution.
        auxiliary: "adapter" on the same frozen weights, or "full": a network of its own.
    """

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    auxiliary: Literal["adapter", "full"] = "adapter"


@dataclass(frozen=True)
class StoppingConfig:
    """When to end a run before its last step. The best student seen is kept then, not the last.

    Attributes:
        patience: looks at the samples without a better cheap Fréchet distance; 0 goes on to the end.
        window: logged values that the smoothed loss of Algorithm 3 is the mean of.
        within_noise: with Algorithm 3, stop when the smoothed loss has been less than this many of its
            standard errors above 0 for more than a whole window, or, having been at its highest, has not
            fallen by as many for a whole window; 0 goes on to the end.
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
        data: "digits", "emoji", a folder or .npz of pictures, a folder that momatch prepare wrote, and what
            else docs/data.md names.
        image_size: pictures of a folder are cut to their central square and reduced to this side; 0 takes
            them as they are.
        network: the network's shape; image_channels and num_classes follow the data.
        schedule: noise schedule.
        prediction: what the network's output stands for.
        cond_dropout: share of samples trained on the null label.
        weighting: w(t) and p(t) of the denoising loss.
        sampling_steps: network calls this teacher samples with unless told otherwise.
        train: length and rhythm.
        optim: optimizer.
        monitor: looks at the samples.
        device: where to train: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.
        precision: of the networks' arithmetic: "bfloat16" is quicker on most GPUs. Weights, the optimizer and
            everything around the networks stay float32.
    """

    data: str = "digits"
    image_size: int = 0
    network: UNetConfig | UViTConfig = field(default_factory=UNetConfig)
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
    device: str = AUTO
    precision: Precision = "float32"


@dataclass(frozen=True)
class DistillConfig:
    """Distilling a teacher by moment matching.

    Attributes:
        teacher: "digits" (shipped with the package), or the folder of a teacher or of a run that trained one;
            a diffusers pipeline's folder or name on the hub; package.module:function, which returns a Model.
        null_label: the label that means "no class" to a diffusers UNet2DModel; -1 if it knows none.
        teacher_size: side of what a diffusers teacher makes, where its files do not say; 0 means as they say.
        data: "digits", "emoji", a folder or .npz of pictures, a folder that momatch prepare wrote, and what
            else docs/data.md names.
        image_size: as in training a teacher.
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
        adapter: train LoRA adapters on the teacher's weights instead of whole networks.
        student_dropout: dropout rate of the student; none in the paper.
        warm_start_steps: of the steps, how many come first that train the student by plain denoising, for a
            student whose schedule is not its teacher's; they count in train.num_steps.
        stopping: when to end early.
        train: length and rhythm; a pair of alternating updates counts as two steps. A step of Algorithm 3
            takes two minibatches of batch_size.
        optim: optimizer, the same for student and auxiliary.
        monitor: looks at the samples.
        device: where to train: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.
        precision: of the networks' arithmetic, the teacher's too; as in training a teacher.
    """

    teacher: str = "digits"
    null_label: int = -1
    teacher_size: int = 0
    data: str = "digits"
    image_size: int = 0
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    student_dropout: float = 0.0
    warm_start_steps: int = 0
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    device: str = AUTO
    precision: Precision = "float32"


RunConfig = TeacherConfig | DistillConfig


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON types, with the kind of run."""
    if isinstance(config, DistillConfig):
        fields = {"kind": "distill", **asdict(config)}
    else:
        fields = {"kind": "train-teacher", **asdict(config), "network": registry.to_json(config.network)}
    return json.loads(json.dumps(fields))
