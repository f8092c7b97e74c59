"""A run: a method, its batches, its monitor and its folder, put together from a config.

    run = distillation(teacher, data, config, directory)
    for record in run:            # trains; resumes from the folder's newest checkpoint
        ...
    student = run.finish()        # the artifact, saved as directory/student

A run's folder holds config.json, metrics.jsonl, checkpoints/, samples/, in the end student/ (or teacher/).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from momatch import config as configs
from momatch.config import ConfigError, DistillConfig, RunConfig, TeacherConfig
from momatch.data.images import ImageSet, Split
from momatch.denoiser import Denoiser
from momatch.evaluation.builtin import feature_extractor
from momatch.methods import weighting
from momatch.methods.alternating import Alternating
from momatch.methods.base import Method
from momatch.methods.denoising import Denoising
from momatch.methods.instant import Instant, adam_preconditioner, estimate_second_moments
from momatch.methods.products import choose_product
from momatch.methods.transition import Transition
from momatch.methods.warm_start import WarmStart
from momatch.model import SECOND_MOMENTS, Model, Student
from momatch.monitoring import Look, Monitor
from momatch.networks import registry
from momatch.schedules import NoiseSchedule
from momatch.training import checkpoint
from momatch.training.batches import Batches, image_batches
from momatch.training.loop import Record, train


@dataclass(frozen=True)
class Event:
    """What a run yields after every step.

    Attributes:
        record: the training loop's record.
        look: a look at the samples, when there was one at this step.
        alarms: sentences about what left sane bounds.
    """

    record: Record
    look: Look | None
    alarms: list[str]


@dataclass(frozen=True)
class Run:
    """A run ready to go: iterate over it to train, then call `finish`.

    Attributes:
        config: all settings.
        method: the algorithm.
        batches: step → batch.
        model: what is being trained; shares its weights with the method.
        data: the training pictures.
        directory: the run's folder, or None to keep nothing.
    """

    config: RunConfig
    method: Method
    batches: Batches
    model: Model
    data: ImageSet
    directory: Path | None

    def __iter__(self) -> Iterator[Event]:
        """As `events`."""
        return self.events()

    def events(self) -> Generator[Event, None, None]:
        """Train to the end from wherever the folder's newest checkpoint stands.

        Leaving the iteration early saves a checkpoint.

        Raises:
            ConfigError: if the folder holds a run of another config.
            CheckpointError, NonFiniteLossError, OSError: see `momatch.training`.
        """
        log = _Log(self.directory, self.config)
        settings = self.config.monitor
        extractor = feature_extractor(self.data.name)
        monitor = Monitor(
            self.model, self.data, extractor, settings.num_samples, self.directory, self.config.train.seed
        )
        folder = self.directory / "checkpoints" if self.directory else None
        records = train(self.method, self.batches, self.config.train, self.config.optim, folder)
        try:
            for record in records:
                look, alarms = None, monitor.check(record.metrics)
                if settings.every and record.step % settings.every == 0:
                    look, worse = monitor.look(record.step)
                    alarms += worse
                event = Event(record, look, alarms)
                log.write(event, monitor)
                yield event
        finally:
            records.close()

    def finish(self) -> Model:
        """The trained model; saved as `student/` or `teacher/` in the run's folder.

        A teacher's second moments (Adam's v̂ for every weight) are saved beside it, as
        second-moments.safetensors: parameter-space moment matching needs them.
        """
        if self.directory:
            role = "student" if isinstance(self.config, DistillConfig) else "teacher"
            self.model.save(self.directory / role)
            if role == "teacher":
                moments = checkpoint.second_moments(
                    self.directory / "checkpoints", "teacher", self.config.optim.beta2
                )
                checkpoint.save_tensors(self.directory / role / SECOND_MOMENTS, moments)
        return self.model


def distillation(
    teacher: Model, data: Split, config: DistillConfig, directory: str | Path | None = None
) -> Run:
    """A run that distils `teacher` into a student of `config.steps` steps.

    Raises:
        ConfigError: if a value is impossible, or teacher and data do not fit each other.
    """
    configs.check(config)
    check_fit(teacher, data.train)
    if config.guidance.scale and not teacher.denoiser.null_values:
        raise ConfigError(
            f"guidance.scale is {config.guidance.scale}, but this teacher has no null condition to guide "
            "away from; use guidance.scale 0, or a teacher trained with cond_dropout"
        )
    path = _path(directory)
    schedule = config.schedule.build(teacher.schedule)
    student, network = _student(teacher, config)
    method = _method(teacher, student, schedule, data.train, config, path)
    if config.warm_start_steps:
        method = WarmStart(Denoising(student, schedule, cond_dropout=0.0), method, config.warm_start_steps)
    info = {
        "role": "student",
        "teacher": config.teacher,
        "data": config.data,
        "config": configs.to_json(config),
    }
    model = Student(student, network, schedule, teacher.sample_shape, config.steps, teacher.num_classes, info)
    return Run(config, method, _batches(data.train, teacher.num_classes, config), model, data.train, path)


def _student(teacher: Model, config: DistillConfig) -> tuple[Denoiser, registry.NetworkConfig]:
    """A copy of the teacher that can learn, with the student's dropout, and its network's shape."""
    denoiser = copy.deepcopy(teacher.denoiser).requires_grad_(True)
    if not config.student_dropout:
        return denoiser, teacher.network
    if not hasattr(teacher.network, "dropout"):
        raise ConfigError(
            f"student_dropout is {config.student_dropout}, but a network of type "
            f"{type(teacher.network).__name__} has no dropout; use student_dropout 0"
        )
    shape = replace(teacher.network, dropout=config.student_dropout)
    with torch.random.fork_rng(devices=[]):
        network = registry.build(shape)
    network.load_state_dict(denoiser.network.state_dict())
    return Denoiser(network, denoiser.prediction, denoiser.null_values), shape


def _method(
    teacher: Model,
    student: Denoiser,
    schedule: NoiseSchedule,
    data: ImageSet,
    config: DistillConfig,
    directory: Path | None,
) -> Method:
    """Algorithm 2 or 3, as the config says."""
    guided = config.guidance.apply(teacher.denoiser)
    transition = Transition(
        schedule,
        config.steps,
        config.weighting.build_density(schedule),
        weighting.power(config.weighting.delta_exponent),
        config.posterior,
        config.source,
    )
    weight = config.weighting.build_weighting()
    if config.method == "alternating":
        auxiliary = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        return Alternating(guided, student, auxiliary, transition, weight, config.update, config.teacher_term)
    moments = _second_moments(teacher, data, config, directory)
    scale = adam_preconditioner(moments, config.instant.lambda_eps)
    # The guided denoiser names the same parameters otherwise.
    name_of = {id(p): name for name, p in teacher.denoiser.named_parameters()}
    scale = {name: scale[name_of[id(p)]] for name, p in guided.named_parameters()}
    probe = _batches(data, teacher.num_classes, replace(config, train=replace(config.train, batch_size=1)))(0)
    _, product = choose_product(
        config.instant.product, guided, probe.x, schedule(torch.full((len(probe.x),), 0.5)), probe.cond
    )
    return Instant(guided, student, transition, scale, weight, product, config.instant.centre)


def _second_moments(
    teacher: Model, data: ImageSet, config: DistillConfig, directory: Path | None
) -> dict[str, Tensor]:
    """v̂ for Λ: the run's own if it has been estimated, an estimate if one is asked for, or the teacher's."""
    steps = config.instant.lambda_steps
    if not steps:
        moments = teacher.second_moments()
        if moments is None:
            raise ConfigError(
                "this teacher comes without second-moments.safetensors, and instant.lambda_steps is 0; "
                "set instant.lambda_steps to 300, to estimate them on the data"
            )
    elif directory and (directory / SECOND_MOMENTS).is_file():
        moments = checkpoint.load_tensors(directory / SECOND_MOMENTS)
    else:
        batches = _batches(data, teacher.num_classes, config)
        moments = estimate_second_moments(
            Denoising(teacher.denoiser, teacher.schedule, cond_dropout=0.0), batches, steps
        )
        if directory:
            claim(directory, config)
            checkpoint.save_tensors(directory / SECOND_MOMENTS, moments)
    wanted = {name: p.shape for name, p in teacher.denoiser.named_parameters()}
    if {name: v.shape for name, v in moments.items()} != wanted:
        raise ConfigError(
            "the second moments belong to a network of another shape; set instant.lambda_steps to 300, to "
            "estimate them on the data"
        )
    return moments


def teacher_training(data: Split, config: TeacherConfig, directory: str | Path | None = None) -> Run:
    """A run that trains a teacher on `data` by denoising.

    Raises:
        ConfigError: if a value is impossible, or the network does not fit the pictures.
    """
    configs.check(config)
    images = data.train
    num_classes = images.num_classes if images.num_classes > 1 else 0
    shape = tuple(images.images.shape[1:])
    if any(size % 2 ** (len(config.network.channels) - 1) for size in shape[1:]):
        raise ConfigError(
            f"network.channels has {len(config.network.channels)} levels, "
            f"too many for {shape[1]}×{shape[2]} pictures; each level halves them"
        )
    network_config = replace(config.network, image_channels=shape[0], num_classes=num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        network = registry.build(network_config)
    denoiser = Denoiser(network, config.prediction, {"label": num_classes} if num_classes else {})
    schedule = config.schedule.build()
    method = Denoising(
        denoiser,
        schedule,
        config.weighting.build_weighting(),
        config.weighting.build_density(schedule),
        config.cond_dropout,
    )
    info = {"role": "teacher", "data": config.data, "config": configs.to_json(config)}
    model = Model(denoiser, network_config, schedule, shape, config.sampling_steps, num_classes, info)
    return Run(config, method, _batches(images, num_classes, config), model, images, _path(directory))


def distill(
    teacher: Model, data: Split, config: DistillConfig | None = None, directory: str | Path | None = None
) -> Student:
    """Distil `teacher` on `data`, start to end: the whole of momatch in one call.

    Args:
        teacher: from `load_teacher`.
        data: from `load_data`.
        config: settings; a recipe, or `DistillConfig()`.
        directory: where to keep checkpoints, logs and the student; None keeps nothing.

    Returns:
        The student, ready to `sample` and `save`.

    Raises:
        ConfigError: if a value is impossible, or teacher and data do not fit each other.
    """
    run = distillation(teacher, data, config or DistillConfig(), directory)
    for _ in run:
        pass
    student = run.finish()
    assert isinstance(student, Student)
    return student


def check_fit(model: Model, images: ImageSet) -> None:
    """Refuse pictures that a model cannot make.

    Raises:
        ConfigError: if their shapes differ, or the pictures have more classes.
    """
    shape = tuple(images.images.shape[1:])
    if shape != model.sample_shape:
        raise ConfigError(f"the data are pictures of shape {shape}, the model makes {model.sample_shape}")
    if model.num_classes and images.num_classes > model.num_classes:
        raise ConfigError(f"the data have {images.num_classes} classes, the model knows {model.num_classes}")


class _Log:
    """metrics.jsonl and config.json of a run's folder; does nothing without a folder."""

    def __init__(self, directory: Path | None, config: RunConfig):
        self.path = directory / "metrics.jsonl" if directory else None
        self.started = False
        if directory:
            claim(directory, config)

    def write(self, event: Event, monitor: Monitor) -> None:
        if self.path is None:
            return
        record = event.record
        rows: list[dict] = []
        if not self.started:
            self._drop_from(record.step)
            rows.append(
                dict(event="start", step=record.step, data_mean=monitor.data_mean, data_std=monitor.data_std)
            )
            self.started = True
        if record.metrics:
            rows.append(
                dict(
                    step=record.step, images_seen=record.images_seen, seconds=record.seconds, **record.metrics
                )
            )
        if event.look:
            rows.append({"event": "look", **asdict(event.look)})
        rows += [dict(event="alarm", step=record.step, message=message) for message in event.alarms]
        if rows:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _drop_from(self, step: int) -> None:
        """Forget lines at or after `step`: steps that a crash took back are about to be done again."""
        assert self.path is not None
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
            self.path.write_text("".join(line + "\n" for line in lines))


def claim(directory: Path, config: RunConfig) -> None:
    """Make `directory` this config's run folder; a folder that is so already is fine.

    Raises:
        ConfigError: if it belongs to a run of another config, or cannot be written.
    """
    path, wanted = directory / "config.json", configs.to_json(config)
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); choose another --out or delete the folder"
            ) from None
        changed = configs.differences(found, wanted)
        if changed:
            raise ConfigError(
                f"{directory} holds a run of another config ({'; '.join(changed[:3])}); "
                "choose another --out, or delete that folder"
            )
        return
    if checkpoint.paths(directory / "checkpoints"):
        raise ConfigError(
            f"{directory} holds checkpoints but no config.json; choose another --out, or delete that folder"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(
            path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        )
    except OSError as error:
        raise ConfigError(
            f"cannot write into {directory}: {error.strerror or error}; choose another --out"
        ) from None


def _path(directory: str | Path | None) -> Path | None:
    return None if directory is None else Path(directory)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a crash
        return float("inf")


def _batches(images: ImageSet, num_classes: int, config: RunConfig) -> Batches:
    labels = images.labels if num_classes else None
    instant = isinstance(config, DistillConfig) and config.method == "instant"  # it takes two minibatches
    size = config.train.batch_size * (2 if instant else 1)
    return image_batches(images.images, labels, size, config.train.seed)
