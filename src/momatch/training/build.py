"""From a config to a run: the method with its networks, its weights and its minibatches.

run = distillation(teacher, data, config, directory)    # or teacher_training(data, config, directory)
student = distill(teacher, data, config, directory)     # start to end
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from momatch.config.schema import AdapterConfig, DistillConfig, TeacherConfig, TrainConfig, to_json
from momatch.data.emoji import MASK, TOKENS
from momatch.data.images import KINDS, ImageSet, Split, stratified_split
from momatch.data.rows import Rows
from momatch.data.tokens import with_mask
from momatch.diffusion.categorical import CategoricalDenoiser, CategoricalProcess
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Process
from momatch.diffusion.process import GAUSSIAN
from momatch.diffusion.schedules import NoiseSchedule
from momatch.evaluation.rewards import reward_function
from momatch.interop import compatibility as fit
from momatch.interop.load import load_teacher
from momatch.methods import weighting
from momatch.methods.average import Averaged
from momatch.methods.base import Method
from momatch.methods.context import Context
from momatch.methods.denoising import Denoising
from momatch.methods.discrete import DiscreteDenoising
from momatch.methods.instant import estimate_second_moments
from momatch.methods.transition import Transition
from momatch.methods.warm_start import WarmStart
from momatch.models.model import Model, Student
from momatch.models.provenance import Inputs, Provenance
from momatch.networks import registry
from momatch.networks.configs import MLPConfig, TokenTransformerConfig, UViTConfig
from momatch.networks.lora import AdaptedNetwork, share
from momatch.training import distributed, sharding
from momatch.training.batches import Batches, image_batches
from momatch.training.claims import alone_in, claim
from momatch.training.finished import finished
from momatch.training.run import Best, Run
from momatch.utils import devices
from momatch.utils.errors import ConfigError
from momatch.utils.files import as_path, read_tensors, write_tensors
from momatch.utils.run_folder import SECOND_MOMENTS
from momatch.utils.seeding import derive_seed
from momatch.utils.settings import shown


def distillation(
    teacher: Model, data: Split, config: DistillConfig, directory: str | Path | None = None
) -> Run:
    """A run that distils `teacher` into a student of `config.steps` steps; the teacher moves to its device.

    Raises:
        ConfigError: if a value is impossible, or teacher and data do not fit each other.
        UsageError: if there is no such device.
    """
    _check_types(teacher, data, config)
    data = fit.in_space_of(teacher, data)
    fit.check_fit(teacher, data.train)
    _check_method(teacher, config)
    teacher = fit.with_null_condition(teacher.to(devices.resolve(config.device)), data.train.null_condition)
    teacher = replace(teacher, denoiser=teacher.denoiser.in_precision(config.precision))
    if config.guidance.scale:
        fit.check_null_condition(teacher, data.train, config.guidance.scale)
    path = _path(directory)
    distributed.check_source(config)
    inputs = Inputs(teacher.fingerprint(), data.train.fingerprint())
    images = reference = data.train
    if config.stopping.active:
        parts = stratified_split(data.train, config.stopping.held_back, config.train.seed)
        images, reference = parts.train, parts.heldout
        if len(reference) < 2:
            raise ConfigError(
                f"stopping.held_back {config.stopping.held_back} keeps {len(reference)} of {len(data.train)} "
                "pictures; it must keep 2 or more, and hundreds to tell much"
            )
    schedule = config.schedule.build(teacher.schedule, config.step_counts[-1])
    student, network = _student(teacher, config)
    learning = len(config.method.learning) + bool(config.ema.decay)
    sharded = sharding.wanted(config, teacher.denoiser, learning)
    method = _method(teacher, student, schedule, images, config, path, inputs, sharded)
    if config.warm_start_steps:
        method = WarmStart(_denoising(student, schedule), method, config.warm_start_steps)
    shown = student
    if config.ema.decay:
        method = Averaged(method, config.ema.decay)
        shown = method.denoiser
    pipeline, text_encoder = _encoders(data.train, teacher)
    origin = Provenance(
        "student",
        teacher=config.teacher,
        data=config.data,
        config=to_json(config),
        inputs=inputs,
        pipeline=pipeline,
        text_encoder=text_encoder,
        latent=teacher.provenance.latent,
        class_names=tuple(data.train.class_names),
        vocabulary=teacher.provenance.vocabulary,
    )
    if sharded:
        sharding.shard(method)
    model = Student(
        shown,
        network,
        schedule,
        teacher.sample_shape,
        config.step_counts[-1],
        teacher.num_classes,
        origin,
        cond_shapes=teacher.cond_shapes,
        sampler=config.method.sampler,
        process=teacher.process,
    )
    batches = _shared_batches(images, teacher, config.train, config.method.minibatches)
    return Run(config, method, batches, model, images, path, reference, Best(path), inputs)


def _check_types(teacher: object, data: object, config: object) -> None:
    """The command line takes names for these; here each is a sentence instead of an AttributeError."""
    if not isinstance(teacher, Model):
        raise ConfigError(f"teacher is {shown(teacher)}; give a model, as momatch.load_teacher returns it")
    if not isinstance(data, Split):
        raise ConfigError(f"data is {shown(data)}; give what momatch.load_data returns")
    if not isinstance(config, DistillConfig):
        kind = type(config).__name__
        raise ConfigError(
            f"config is a {kind}; give a DistillConfig, as momatch.recipe('digits-8') returns it"
        )


def _check_method(teacher: Model, config: DistillConfig) -> None:
    """Tokens have a method of their own, which knows neither guidance nor adapters."""
    name = config.method.name
    if teacher.of_tokens != config.method.of_tokens:
        makes, right = ("tokens", "discrete") if teacher.of_tokens else ("no tokens", "alternating")
        raise ConfigError(f"method is {name}, and the teacher makes {makes}; use --method {right}")
    if not teacher.of_tokens:
        return
    for key, value in (
        ("guidance.scale", config.guidance.scale),
        ("guidance.clip", "" if config.guidance.clip == "none" else config.guidance.clip),
        ("adapter.rank", config.adapter.rank),
        ("warm_start_steps", config.warm_start_steps),
    ):
        if value:
            remedy = "; a teacher is made surer by --method.temperature" if "guidance" in key else ""
            raise ConfigError(f"{key} is {value}, which tokens have not: leave it out{remedy}")
    if registry.noise_dim(teacher.network):
        raise ConfigError(
            f"teacher {config.teacher} is a student that is given noise; take the teacher it had"
        )


def teacher_of(config: DistillConfig) -> Model:
    """The teacher that a config names.

    Raises:
        UsageError: if there is none, or something about it has to be told.
    """
    null_label = config.null_label if config.null_label >= 0 else None
    size = config.teacher_sides or config.teacher_size or None
    return load_teacher(
        config.teacher,
        null_label,
        size,
        config.scheduler or None,
        config.teacher_family,
        config.teacher_adapter or None,
    )


def _student(teacher: Model, config: DistillConfig) -> tuple[Denoiser, registry.NetworkConfig]:
    """η as the config says, and its network's shape."""
    if not config.adapter.rank:
        return _learner(teacher, config, config.student_dropout, noise=config.method.student_noise)
    denoiser, shape = _learner(teacher, config, config.student_dropout, shared=True)
    return _with_adapter(denoiser, config.adapter, config.train.seed, "student"), shape


def _auxiliary(teacher: Model, config: DistillConfig, told: bool) -> Denoiser:
    """φ, told the number of steps or not; nothing is dropped out in it."""
    if not config.adapter.rank or config.adapter.auxiliary == "full":
        return _learner(teacher, config, dropout=0.0, told=told)[0]
    denoiser, _ = _learner(teacher, config, dropout=0.0, shared=True)
    return _with_adapter(denoiser, replace(config.adapter, dropout=0.0), config.train.seed, "auxiliary")


def _with_adapter(denoiser: Denoiser, adapter: AdapterConfig, seed: int, role: str) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, f"adapter of the {role}", 0))
        denoiser.network = AdaptedNetwork(
            denoiser.network, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets
        )
    return denoiser


def _learner(
    teacher: Model,
    config: DistillConfig,
    dropout: float,
    shared: bool = False,
    told: bool = True,
    noise: int = 0,
) -> tuple[Denoiser, registry.NetworkConfig]:
    """A copy of the teacher with its own rate of dropout, and its network's shape.

    Unguided, but kept in range where the guided teacher is. Its weights are its own and can learn; if
    `shared`, they are the teacher's. If it is `told` and there are several numbers of steps, it has a branch
    for them, which starts at zero; so has one that is given `noise`.
    """
    plain = config.guidance.apply(teacher.denoiser).unwrapped
    denoiser = share(plain) if shared else copy.deepcopy(plain).requires_grad_(True)
    assert isinstance(denoiser, Denoiser)
    counts = config.step_counts if told and len(config.step_counts) > 1 else ()
    found = registry.dropout(teacher.network)
    same = counts == registry.step_counts(teacher.network) and noise == registry.noise_dim(teacher.network)
    if dropout == (found or 0.0) and same:
        return denoiser, teacher.network
    if dropout and found is None:
        raise ConfigError(
            f"student_dropout is {dropout}, but a network of type "
            f"{type(teacher.network).__name__} has no dropout; use student_dropout 0"
        )
    shape = teacher.network if found is None else registry.with_dropout(teacher.network, dropout)
    if counts or registry.step_counts(shape):
        shape = _elastic(shape, counts, config)
    if isinstance(shape, TokenTransformerConfig):
        shape = replace(shape, noise_dim=noise)
    with torch.random.fork_rng(devices=[]):
        network = registry.build(shape).to(teacher.device)
    weights = denoiser.network.state_dict(keep_vars=shared)
    if counts or noise:  # the branch that tells them apart, or takes noise, is new
        weights = {**network.state_dict(), **weights}
    network.load_state_dict(weights, assign=shared)
    denoiser.network = network if shared else network.requires_grad_(True)
    return denoiser, shape


def _elastic(
    shape: registry.NetworkConfig, counts: tuple[int, ...], config: DistillConfig
) -> registry.NetworkConfig:
    """The shape with a branch for the number of steps.

    Raises:
        ConfigError: if it has no place for one, or the teacher has one itself.
    """
    if registry.step_counts(shape):
        raise ConfigError(
            f"teacher {config.teacher} is a student for several numbers of steps, which cannot teach; take "
            "the teacher it had"
        )
    found = registry.with_step_counts(shape, counts)
    if found is None:
        raise ConfigError(
            f"steps is {shown(counts)}, but a network of type {type(shape).__name__} cannot be told the "
            "number of steps: give one"
        )
    return found


def _method(
    teacher: Model,
    student: Denoiser,
    schedule: NoiseSchedule,
    data: ImageSet,
    config: DistillConfig,
    directory: Path | None,
    inputs: Inputs,
    sharded: bool,
) -> Method:
    """The algorithm that the config names, on these networks and data."""
    guided = config.guidance.apply(teacher.denoiser)
    transition = Transition(
        schedule,
        config.steps,
        config.weighting.build_density(schedule),
        weighting.power(config.weighting.delta_exponent),
        config.posterior,
        config.source,
        teacher.process,
    )

    def second_moments(steps: int) -> dict[str, Tensor]:
        with alone_in(directory if steps else None):  # or another run could take this estimate for its own
            moments = _second_moments(teacher, data, config, steps, directory, inputs)
        # The guided denoiser names the same parameters otherwise.
        name_of = {id(p): name for name, p in teacher.denoiser.unwrapped.named_parameters()}
        return {name: moments[name_of[id(p)]] for name, p in guided.named_parameters()}

    context = Context(
        teacher=guided,
        student=student,
        transition=transition,
        weighting=config.weighting.build_weighting(teacher.denoiser.prediction),
        auxiliary=lambda told: _auxiliary(teacher, config, told),
        second_moments=second_moments,
        finished=lambda run: finished(run, teacher),
        reward=lambda name: reward_function(name, data, teacher.device),
        minibatch=lambda size: _batches(data, teacher, config.train.seed, size)(0),
        average=distributed.average,
        sharded=sharded,
    )
    return config.method.build(context)


def _denoising(denoiser: Denoiser, schedule: NoiseSchedule) -> Denoising:
    """The loss that a diffusion model is usually trained with: a mean square in ε, or in v."""
    weight = weighting.eps_weight() if denoiser.prediction == "eps" else weighting.v_weight()
    return Denoising(denoiser, schedule, weight, cond_dropout=0.0)


def _second_moments(
    teacher: Model,
    data: ImageSet,
    config: DistillConfig,
    steps: int,
    directory: Path | None,
    inputs: Inputs,
) -> dict[str, Tensor]:
    """v̂ for Λ: the run's own if it has been estimated, an estimate if one is asked for, or the teacher's.

    On the teacher's device.
    """
    own = directory / SECOND_MOMENTS if directory else None
    estimated = False
    if steps and directory and own:
        claim(directory, config, inputs)  # first, since it drops an estimate that belongs to another run
        estimated = distributed.on_main(own.is_file)
    if not steps:
        moments = teacher.second_moments()
        if moments is None:
            raise ConfigError(
                "this teacher comes without second-moments.safetensors, and method.lambda_steps is 0; "
                "set method.lambda_steps to 300, to estimate them on the data"
            )
    elif own and estimated:
        moments = distributed.tensors_on_main(lambda: read_tensors(own)[0])
    else:
        batches = _shared_batches(data, teacher, config.train, config.method.minibatches)
        loss = _denoising(teacher.denoiser.unwrapped, teacher.schedule)
        moments = estimate_second_moments(loss, batches, steps, distributed.average)
        if directory and distributed.is_main():
            write_tensors(directory / SECOND_MOMENTS, moments)
    wanted = {name: p.shape for name, p in teacher.denoiser.unwrapped.named_parameters()}
    if {name: v.shape for name, v in moments.items()} != wanted:
        raise ConfigError(
            "the second moments belong to a network of another shape; set method.lambda_steps to 300, to "
            "estimate them on the data"
        )
    return {name: v.to(teacher.device) for name, v in moments.items()}


def teacher_training(data: Split, config: TeacherConfig, directory: str | Path | None = None) -> Run:
    """A run that trains a teacher on `data` by denoising.

    Raises:
        ConfigError: if a value is impossible, or the network does not fit the pictures.
        UsageError: if there is no such device.
    """
    images = data.train
    tokens = images.space == "tokens"
    if tokens:
        images = with_mask(images, config.process)
    shape = _shape_for(images, config.network)
    conditions = _conditions_for(images, shape)
    num_classes = images.num_classes if images.num_classes > 1 else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        network = registry.build(shape).to(devices.resolve(config.device))
    nulls = {"label": num_classes} if num_classes else {}
    nulls |= {name: images.null_condition[name] for name in conditions}
    schedule = config.schedule.build()
    density = config.weighting.build_density(schedule)
    if tokens:
        process: Process = CategoricalProcess(config.process)
        denoiser = CategoricalDenoiser(network, config.process).in_precision(config.precision)
        method: Method = DiscreteDenoising(denoiser, schedule, CategoricalProcess(config.process), density)
    else:
        process = GAUSSIAN
        denoiser = Denoiser(network, config.prediction, nulls).in_precision(config.precision)
        weight = config.weighting.build_weighting(config.prediction)
        method = Denoising(denoiser, schedule, weight, density, config.cond_dropout)
    if sharding.wanted(config, denoiser, 1):
        sharding.shard(method)
    inputs = Inputs(data=images.fingerprint())
    pipeline, text_encoder = _encoders(images)
    origin = Provenance(
        "teacher",
        data=config.data,
        config=to_json(config),
        inputs=inputs,
        pipeline=pipeline,
        text_encoder=text_encoder,
        class_names=tuple(images.class_names),
        vocabulary=tuple(images.vocabulary),
    )
    model = Model(
        denoiser,
        shape,
        schedule,
        tuple(images.images.shape[1:2] if tokens else images.images.shape[1:]),
        config.sampling_steps,
        num_classes,
        origin,
        cond_shapes={name: _cond_shape(rows, shape) for name, rows in conditions.items()},
        process=process,
    )
    batches = _shared_batches(images, model, config.train)
    path = _path(directory)
    return Run(config, method, batches, model, images, path, images, Best(None), inputs)


def _shape_for(images: ImageSet, network: registry.TrainableConfig) -> registry.TrainableConfig:
    """The network's shape, fitted to the data's channels, classes and conditions.

    Raises:
        ConfigError: if it is a network for other data.
    """
    sides = tuple(images.images.shape[1:])
    num_classes = images.num_classes if images.num_classes > 1 else 0
    of = {MLPConfig: "vectors", TokenTransformerConfig: "tokens"}.get(type(network), "pictures")
    kind = images.space if images.space in ("vectors", "tokens") else "pictures"
    if of != kind:
        right = {"vectors": "the recipe vectors-teacher", "tokens": "the recipe text-teacher"}
        raise ConfigError(
            f"the data ({images.name}) are {KINDS[images.space]}, and network is the shape of a "
            f"{type(network).__name__.removesuffix('Config')}; use "
            + right.get(kind, "a recipe for pictures, such as digits-teacher")
        )
    if isinstance(network, TokenTransformerConfig):
        return replace(network, length=sides[0], num_tokens=sides[1], num_classes=0)
    if isinstance(network, MLPConfig):
        taken = _conditions_for(images, network)
        numbers = sum(math.prod(rows.shape[1:]) for rows in taken.values())
        return replace(
            network,
            dim=math.prod(sides),
            num_classes=num_classes,
            conditions=tuple(taken),
            cond_dim=numbers,
        )
    divisor = registry.divisor(network)
    if any(size % divisor for size in sides[1:]):
        raise ConfigError(
            f"network.channels has {len(network.channels)} levels, too many for {sides[1]}×{sides[2]} "
            "pictures; each level halves them: name fewer widths"
        )
    fitted = replace(network, image_channels=sides[0], num_classes=num_classes)
    if isinstance(fitted, UViTConfig) and TOKENS in images.conditions:
        fitted = replace(fitted, text_dim=images.conditions[TOKENS].shape[2])
    return fitted


def _conditions_for(images: ImageSet, network: registry.TrainableConfig) -> Mapping[str, Tensor | Rows]:
    """What a network of that shape takes of the data's conditions, besides labels.

    Raises:
        ConfigError: if there is no null condition for something.
    """
    if isinstance(network, MLPConfig):
        return dict(sorted(images.conditions.items()))
    if not isinstance(network, UViTConfig) or TOKENS not in images.conditions:
        return {}
    taken = {name: images.conditions[name] for name in (TOKENS, MASK) if name in images.conditions}
    if missing := set(taken) - set(images.null_condition):
        raise ConfigError(f"the data ({images.name}) have no null condition for {', '.join(missing)}; add it")
    return taken


def _cond_shape(rows: Tensor | Rows, network: registry.TrainableConfig) -> tuple[int, ...]:
    """Of one row; of text, any number of tokens will do."""
    shape = tuple(rows.shape[1:])
    return shape if isinstance(network, MLPConfig) else (-1, *shape[1:])


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


def _encoders(images: ImageSet, teacher: Model | None = None) -> tuple[str | None, str | None]:
    """Pipeline whose autoencoder makes images of a model's samples, and text encoder of its prompts."""
    known = teacher.provenance if teacher else Provenance()
    encoded = images.space == "latents" or (images.conditions and images.space != "vectors")
    pipeline = known.pipeline or (images.origin.get("pipeline") if encoded else None)
    text = known.text_encoder or (None if pipeline else images.origin.get("text_encoder"))
    return pipeline, text


def _path(directory: str | Path | None) -> Path | None:
    return None if directory is None else as_path(directory, "the run's folder")


def _batches(images: ImageSet, model: Model, seed: int, size: int, **sharing: int) -> Batches:
    labels = images.labels if model.num_classes else None
    conditions = {name: images.conditions[name] for name in model.cond_shapes if name in images.conditions}
    return image_batches(images.images, labels, size, seed, conditions, model.device, **sharing)


def _shared_batches(images: ImageSet, model: Model, train: TrainConfig, minibatches: int = 1) -> Batches:
    """This process' part of the run's batches, of so many minibatches each."""
    distributed.check_batch(train.batch_size, train.accumulate)
    parts = {"part": distributed.rank(), "parts": distributed.size()}
    sharing = {"noise_slices": train.noise_slices, "minibatches": minibatches, **parts}
    return _batches(images, model, train.seed, train.batch_size * minibatches, **sharing)
