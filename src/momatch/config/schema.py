"""Everything a run can be told, as plain data: from recipes, the command line or a run's config.json.

Bounds stand at the fields, so that a config is checked the moment it is made; see `momatch.utils.settings`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import asdict, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, Strict
from tyro.conf import arg

from momatch.data.reading import Reading
from momatch.diffusion import schedules
from momatch.diffusion.categorical import Prior
from momatch.diffusion.compilation import Compile
from momatch.diffusion.denoiser import Denoiser, Guided, Thresholded
from momatch.diffusion.precision import Precision
from momatch.diffusion.process import Prediction
from momatch.diffusion.schedules import NoiseSchedule
from momatch.methods import registry as registry_of_methods
from momatch.methods import weighting
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.base import MethodConfig
from momatch.methods.denoising import DenoisingConfig
from momatch.methods.transition import Posterior, Source
from momatch.methods.weighting import TimeDensity, Weighting
from momatch.models.model import Model
from momatch.models.request import MAX_SEED, MAX_STUDENT_STEPS
from momatch.networks import registry
from momatch.networks.configs import MLPConfig, TokenTransformerConfig, UNetConfig, UViTConfig
from momatch.utils.devices import AUTO
from momatch.utils.errors import ConfigError
from momatch.utils.settings import Remedy, require, settings, shown

MOST_GUIDANCE = 1000.0
FLAT = arg(name="")  # on the command line its settings stand without a name before them, as prepare has them
Count = Annotated[int, Field(gt=0)]
AtLeast0 = Annotated[int, Field(ge=0), Remedy("it must not be negative")]
Positive = Annotated[float, Field(gt=0), Remedy("it must be above 0 and finite")]
NotNegative = Annotated[float, Field(ge=0), Remedy("it must not be negative, and finite")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Parallel = Literal["auto", "ddp", "fsdp"]
Device = Annotated[str, Remedy('give its name, such as "cuda:0"', of_types=True)]
ImageSize = Annotated[int, Field(ge=0), Remedy("it must be 0 (as they are) or more")]


def _read_network(value: Any) -> registry.TrainableConfig:
    """A network's shape, checked; from itself or from {"family": …, …}."""
    try:
        found = registry.from_json(value) if isinstance(value, dict) else value
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(found, registry.TrainableConfig):
        raise ConfigError(
            f"network is {shown(value)}; give the shape of a unet, a uvit, an mlp or a transformer of tokens"
        )
    return registry.checked(found)


def _read_steps(value: Any) -> int | tuple[int, ...]:
    """K, or the several k of an elastic student in order; a list of one is one."""
    several = isinstance(value, list | tuple | range)
    counts = tuple(value) if several else (value,)
    wrong = [count for count in counts if type(count) is not int or count < 1]
    if wrong or not counts:
        also = ", or a list of such" if several else ""
        raise ConfigError(f"steps is {shown(value)}; use 1 to {MAX_STUDENT_STEPS}{also}")
    ordered = tuple(sorted(set(counts)))
    return ordered[0] if len(ordered) == 1 else ordered


Steps = int | tuple[int, ...]


@settings("train")
class TrainConfig:
    """How long and how often.

    Attributes:
        num_steps: optimizer steps in all (for alternating matching: of both kinds together).
        batch_size: pictures a step.
        seed: of everything random.
        log_every: steps between records that carry metrics.
        checkpoint_every: steps between checkpoints.
        prefetch: read the next minibatch in a thread while a step runs, where rows come from files; data in
            memory need none. The numbers are the same without.
        compile: how updates run: "none" runs operation by operation, "default" compiles the networks by
            torch.compile, "graph" records whole updates as CUDA graphs and replays them, which small networks
            gain most from; "auto" takes what fits the networks on a GPU, and none on a CPU.
        accumulate: parts into which each minibatch is cut, one after another, to hold the activations of one
            at a time; the numbers are those of the whole, but for rounding.
        checkpointing: networks that learn keep what enters their blocks, and compute the rest of their
            activations again for the backward pass: less memory, a third more time.
        keep: checkpoints that stay, the newest ones.
        noise_slices: generators that a minibatch's noise comes from, each for a slice of its rows, so that
            one of several processes draws only what it needs. The numbers depend on it, not on the number of
            processes; 1 is a single generator, from which every process draws the whole minibatch's noise.
        extended_at: steps at which the run had ended before it was made longer; the learning rate rose anew
            after each. Set by --extend.
    """

    num_steps: Count = 3000
    batch_size: Count = 128
    seed: Annotated[int, Field(ge=0, lt=MAX_SEED), Remedy(f"use 0 to {MAX_SEED - 1}")] = 0
    log_every: Count = 50
    checkpoint_every: Count = 500
    prefetch: bool = True
    compile: Compile = "none"
    accumulate: Count = 1
    checkpointing: bool = False
    keep: Count = 2
    noise_slices: Count = 1
    extended_at: Annotated[tuple[int, ...], Strict(False)] = ()

    def __post_init__(self) -> None:
        """The minibatch can be cut, and an extended run goes on after its former ends."""
        require(
            self.batch_size % self.noise_slices == 0,
            "train.noise_slices",
            self.noise_slices,
            f"it must divide train.batch_size, which is {self.batch_size}",
        )
        require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"it must divide train.batch_size, which is {self.batch_size}",
        )
        ends = (0, *self.extended_at, self.num_steps)
        require(
            all(a < b for a, b in itertools.pairwise(ends)),
            "train.extended_at",
            self.extended_at,
            f"it must rise, and end below train.num_steps, which is {self.num_steps}",
        )


@settings("optim")
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

    learning_rate: Positive = 3e-4
    warmup_steps: AtLeast0 = 100
    beta1: Fraction = 0.0
    beta2: Fraction = 0.99
    eps: NotNegative = 1e-12
    clip_norm: Positive = 1.0


@settings("schedule")
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
    shift: Annotated[float, Field(ge=-30, le=30)] = 0.0
    shift_high: Annotated[float, Field(ge=-30, le=30)] = 0.0
    logsnr_min: Annotated[float, Field(ge=-30, le=0), Remedy("it must lie in [−30, 0], 0 to cut nothing")] = (
        0.0
    )

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


@settings("weighting")
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
    maximum: Positive = 100.0
    density: Literal["power", "rho_grid"] = "power"
    exponent: Positive = 1.0
    delta_exponent: Positive = 1.0

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


@settings("guidance")
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

    scale: Annotated[
        float, Field(ge=0, le=MOST_GUIDANCE), Remedy(f"use 0 to {MOST_GUIDANCE:g}", of_types=True)
    ] = 0.0
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    clip: Clip = "none"
    percentile: Annotated[float, Field(gt=0, lt=1)] = 0.995

    def __post_init__(self) -> None:
        """The interval is not empty."""
        require(
            self.logsnr_min < self.logsnr_max,
            "guidance.logsnr_min",
            self.logsnr_min,
            f"it must be below guidance.logsnr_max, which is {self.logsnr_max}",
        )

    def apply(self, denoiser: Denoiser) -> Denoiser:
        """The guided (and clipped) denoiser; `denoiser` itself if nothing is asked for."""
        if self.clip == "static":
            denoiser = copy.copy(denoiser)  # the same weights
            denoiser.clip = 1.0
        if self.scale:
            denoiser = Guided(denoiser, self.scale, (self.logsnr_min, self.logsnr_max))
        return Thresholded(denoiser, self.percentile) if self.clip == "dynamic" else denoiser


@settings("adapter")
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

    rank: Annotated[int, Field(ge=0), Remedy("use 0 (whole networks) or more, such as 8")] = 0
    alpha: Annotated[float, Field(ge=0), Remedy("use 0 (the rank) or more")] = 0.0
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], Strict(False)] = ()
    auxiliary: Literal["adapter", "full"] = "adapter"

    def __post_init__(self) -> None:
        """Nothing is asked of an adapter that is not there."""
        if self.rank:
            return
        for key in ("alpha", "dropout", "targets"):
            value = getattr(self, key)
            require(not value, f"adapter.{key}", value, "it needs adapter.rank above 0")
        require(
            self.auxiliary == "adapter", "adapter.auxiliary", self.auxiliary, "it needs adapter.rank above 0"
        )


@settings("stopping")
class StoppingConfig:
    """When to end a run before its last step. The best student seen is kept then, not the last.

    Attributes:
        patience: previews without a better cheap Fréchet distance; 0 goes on to the end.
        window: logged values that the smoothed loss of Algorithm 3 is the mean of.
        within_noise: with Algorithm 3, stop when the smoothed loss has been less than this many of its
            standard errors above 0 for more than a whole window, or, having been at its highest, has not
            fallen by as many for a whole window; 0 goes on to the end.
        held_back: share of the training pictures that a run with a stopping rule does not train on: its looks
            are compared with them, so that copying the training pictures does not count as better.
    """

    patience: AtLeast0 = 0
    window: Annotated[int, Field(ge=2)] = 25
    within_noise: NotNegative = 0.0
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self.patience or self.within_noise)


@settings("monitor")
class MonitorConfig:
    """What is looked at while a run goes on.

    Attributes:
        every: steps between looks; a run's last step has one too. 0 never looks.
        num_samples: samples for the cheap Fréchet distance (biased upwards, so compare it only with itself).
    """

    every: Annotated[int, Field(ge=0), Remedy("it must be 0 (never) or more")] = 250
    num_samples: Annotated[int, Field(ge=100), Remedy("use 100 or more")] = 500


@settings("ema")
class EmaConfig:
    """An exponential moving average of the student's weights, which is then sampled and saved in its place.

    Attributes:
        decay: β in average ← β average + (1 − β) weights, after every step; 0 keeps no average, as the paper.
    """

    decay: Fraction = 0.0


@settings()
class TeacherConfig:
    """Training a teacher by denoising.

    Attributes:
        data: "digits", "emoji", "fashion-mnist", a folder or .npz of pictures, a folder that momatch prepare
            wrote, and what else docs/data.md names.
        image_size: pictures of a folder are cut to their central square and reduced to this side; 0 takes
            them as they are.
        reading: how data are read, where their files alone do not say it.
        network: the network's shape; image_channels and num_classes follow the data, of an MLP dim and
            conditions too.
        schedule: noise schedule.
        prediction: what the network's output stands for.
        process: of tokens: "mask" covers them one by one, "uniform" replaces them by random ones.
        cond_dropout: share of samples trained on the null label.
        weighting: w(t) and p(t) of the denoising loss.
        sampling_steps: network calls this teacher samples with unless told otherwise.
        train: length and rhythm.
        optim: optimizer.
        monitor: previews of the samples.
        device: where to train: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.
        parallel: of several processes (torchrun): "ddp" gives each all weights, "fsdp" cuts them over the
            processes; "auto" cuts what does not fit a GPU. One process ignores it.
        precision: of the networks' arithmetic: "bfloat16" is quicker on most GPUs, and so is "tf32", float32
            whose products are rounded to 10 bits. Weights, the optimizer and everything around the networks
            stay float32.
    """

    method: ClassVar[MethodConfig] = DenoisingConfig()

    data: str = "digits"
    image_size: ImageSize = 0
    reading: Annotated[Reading, FLAT] = field(default_factory=Reading)
    network: Annotated[
        UNetConfig | UViTConfig | MLPConfig | TokenTransformerConfig, PlainValidator(_read_network)
    ] = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: Prediction = "v"
    process: Prior = "mask"
    cond_dropout: Fraction = 0.1
    weighting: WeightingConfig = field(default_factory=lambda: WeightingConfig(name="v"))
    sampling_steps: Count = 256
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, beta1=0.9, eps=1e-8, warmup_steps=200)
    )
    monitor: MonitorConfig = field(default_factory=lambda: MonitorConfig(every=1000))
    device: Device = AUTO
    parallel: Parallel = "auto"
    precision: Precision = "float32"


@settings()
class DistillConfig:
    """Distilling a teacher by moment matching.

    Attributes:
        teacher: "digits" (shipped with the package), or the folder of a teacher or of a run that trained one;
            a diffusers pipeline's folder or name on the hub, or a single .safetensors of weights with
            `scheduler`; package.module:function, which returns a Model.
        null_label: the label that means "no class" to a diffusers UNet2DModel; -1 if it knows none.
        teacher_size: side of what a diffusers teacher makes, where its files do not say; 0 means as they say.
        scheduler: folder with the scheduler_config.json that a diffusers teacher was trained with, where its
            own has none; for a single file of weights the folder of a pipeline of its kind.
        teacher_sides: instead of that, all its sides: 48 64 of an image, 21 60 104 of a video's latents.
        teacher_family: where the record of the class of a diffusers teacher's network is,
            package.module:NAME, if momatch has none (docs/teachers.md).
        teacher_adapter: folder of a LoRA adapter that is merged into a diffusers teacher.
        data: "digits", "emoji", "fashion-mnist", a folder or .npz of pictures, a folder that momatch prepare
            wrote, and what else docs/data.md names.
        image_size: as in training a teacher.
        reading: as in training a teacher.
        steps: k, network calls of the student, 1 to 16, of tokens 64. Several (1,2,4,8 or 1..16 on the
            command line, a list in Python) make one elastic student, which is sampled with any of them.
        method: the algorithm and its own settings: `AlternatingConfig` (Algorithm 2), `InstantConfig`
            (Algorithm 3: no auxiliary network), …; in Python a name, such as "instant", will do.
        weighting: w(s) and p(s).
        guidance: of the teacher.
        schedule: the student's noise schedule.
        posterior: "conditional" draws z_s given z_t and x̃, the paper; "fresh" forgets z_t (its ablation).
        source: z_t from "data", the paper, or from a "rollout" of the student, which uses no pictures.
        adapter: train LoRA adapters on the teacher's weights instead of whole networks.
        student_dropout: dropout rate of the student; none in the paper.
        warm_start_steps: of the steps, how many come first that train the student by plain denoising, for a
            student whose schedule is not its teacher's; they count in train.num_steps.
        ema: an average of the student's weights.
        stopping: when to end early.
        keep_auxiliary: keep the auxiliary's weights beside the student, for momatch reward, which otherwise
            takes them from the newest checkpoint.
        train: length and rhythm; a pair of alternating updates counts as two steps. A step of Algorithm 3
            takes two minibatches of batch_size.
        optim: optimizer, the same for student and auxiliary.
        monitor: previews of the samples.
        device: where to train: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.
        parallel: of several processes; as in training a teacher.
        precision: of the networks' arithmetic, the teacher's too; as in training a teacher.
    """

    teacher: str = "digits"
    null_label: int = -1
    teacher_size: AtLeast0 = 0
    scheduler: str = ""
    teacher_sides: tuple[AtLeast0, ...] = ()
    teacher_family: str = ""
    teacher_adapter: str = ""
    data: str = "digits"
    image_size: ImageSize = 0
    reading: Annotated[Reading, FLAT] = field(default_factory=Reading)
    steps: Annotated[Steps, PlainValidator(_read_steps)] = 8
    method: Annotated[MethodConfig, PlainValidator(registry_of_methods.read)] = field(
        default_factory=AlternatingConfig
    )
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(name="teacher"))
    posterior: Posterior = "conditional"
    source: Source = "data"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    student_dropout: Fraction = 0.0
    warm_start_steps: AtLeast0 = 0
    ema: EmaConfig = field(default_factory=EmaConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    keep_auxiliary: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    device: Device = AUTO
    parallel: Parallel = "auto"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Settings that must fit each other."""
        method, stopping = self.method, self.stopping
        require(
            self.warm_start_steps < self.train.num_steps,
            "warm_start_steps",
            self.warm_start_steps,
            f"it must be below train.num_steps, which is {self.train.num_steps}",
        )
        most = method.most_steps
        require(self.step_counts[-1] <= most, "steps", self.steps, f"use 1 to {most}")
        elastic = len(self.step_counts) > 1
        require(
            not elastic or method.elastic,
            "steps",
            self.steps,
            f"method={method.name} trains a student for one number of steps: give one",
        )
        require(
            not elastic or not self.adapter.rank,
            "steps",
            self.steps,
            "an adapter has no place for the number of steps: give one, or leave out adapter.rank",
        )
        if stopping.active:
            require(self.monitor.every > 0, "monitor.every", 0, "a stopping rule needs previews")
        require(
            not stopping.within_noise or method.vanishing is not None,
            "stopping.within_noise",
            stopping.within_noise,
            f"method={method.name} logs nothing that falls to 0; use stopping.patience here",
        )
        require(
            "auxiliary" in method.learning or self.adapter.auxiliary == "adapter",
            "adapter.auxiliary",
            self.adapter.auxiliary,
            f"leave it out with method={method.name}",
        )
        require(
            self.posterior == "conditional" or method.draws_posterior,
            "posterior",
            self.posterior,
            f"leave it out with method={method.name}, which draws no z_s from a posterior",
        )
        require(
            "auxiliary" in method.learning or not self.keep_auxiliary,
            "keep_auxiliary",
            self.keep_auxiliary,
            f"method={method.name} has no auxiliary: leave it out",
        )
        require(
            self.train.accumulate == 1 or not method.whole_batch,
            "train.accumulate",
            self.train.accumulate,
            f"method={method.name} needs its minibatch as a whole: leave it at 1",
        )
        require(
            self.source == "data" or not method.needs_data,
            "source",
            self.source,
            f"method={method.name}, as it is set, needs source=data",
        )

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps that the student is for, in order."""
        return (self.steps,) if isinstance(self.steps, int) else self.steps


RunConfig = TeacherConfig | DistillConfig


def distilled_guidance(student: Model) -> GuidanceConfig:
    """How its teacher was guided while it was distilled."""
    return GuidanceConfig(**student.provenance.config.get("guidance", {}))


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON types, with the kind of run."""
    if isinstance(config, DistillConfig):
        fields = {"kind": "distill", **asdict(config), "method": registry_of_methods.to_json(config.method)}
    else:
        fields = {"kind": "train-teacher", **asdict(config), "network": registry.to_json(config.network)}
    return json.loads(json.dumps(fields))


Kind = type[TeacherConfig] | type[DistillConfig]
KINDS: dict[str, Kind] = {"train-teacher": TeacherConfig, "distill": DistillConfig}
