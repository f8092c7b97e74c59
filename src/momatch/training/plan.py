"""What a run will need, before it is begun: parameters, memory and time.

Everything comes from a short probe of real steps on throw-away copies of the networks; no folder is touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from momatch.config.schema import DistillConfig, OptimConfig, RunConfig, TeacherConfig
from momatch.data.emoji import TOKENS
from momatch.data.images import Split
from momatch.data.rows import held_bytes
from momatch.methods.base import Method, Wrapper
from momatch.models.model import Model
from momatch.networks import registry
from momatch.networks.configs import MLPConfig, TokenTransformerConfig
from momatch.networks.lora import AdaptedNetwork
from momatch.training.activations import BLOCKS
from momatch.training.build import distillation, teacher_of, teacher_training
from momatch.training.loop import train
from momatch.training.memory import StepMemory, training_memory
from momatch.training.monitor import TEACHER_LOOK_STEPS
from momatch.training.optim import moments_kept
from momatch.training.run import Run
from momatch.utils.memory import storage_bytes, storage_id

PROBE_SECONDS = 10.0
WARMUP_STEPS = 2  # of the probe, left out of its time: they allocate the optimizer state and choose kernels
MIN_TIMED_STEPS = 2  # one of each kind, where two kinds alternate
ENDLESS = 10**9
ASSUMED_TOKENS = 128  # of a caption, where there are no data to look at
ASSUMED_OPERATIONS = 1e14  # a second, where nothing can be measured: one fast GPU, well used


@dataclass(frozen=True)
class NetworkCost:
    """One network and the memory that belongs to it, in bytes.

    Attributes:
        role: "teacher", "student" or "auxiliary".
        parameters: how many.
        weights: of the parameters themselves.
        gradients: of their gradients; 0 for a frozen network.
        optimizer_state: Adam's moments, one or two; 0 for a frozen network.
    """

    role: str
    parameters: int
    weights: int
    gradients: int
    optimizer_state: int

    @property
    def memory(self) -> int:
        """All three together."""
        return self.weights + self.gradients + self.optimizer_state


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is in bytes.

    Attributes:
        networks: one entry each.
        activations: most that autograd keeps for backward passes at a time.
        workspace: what else is alive at the peak of a step: what is being worked on, with Algorithm 3 the
            tangents, and what the step has made and not yet let go; 0 if nothing ran.
        data: the training pictures and conditions, as held in memory; shards are mapped, and not counted.
        device: where the probe ran; "none" if nothing ran.
        threads: CPU threads that it used.
        batch_size: pictures a step.
        num_steps: of the whole run.
        forward_units: cost of a step: forward pass 1, backward pass 2, of one network on one batch.
        probe_steps: steps that were timed; 0 if nothing ran.
        seconds_per_step: mean over the probe, or operations over `ASSUMED_OPERATIONS` if nothing ran.
        look_seconds: expected time for all previews during the run.
    """

    networks: list[NetworkCost]
    activations: int
    workspace: int
    data: int
    device: str
    threads: int
    batch_size: int
    num_steps: int
    forward_units: int
    probe_steps: int
    seconds_per_step: float
    look_seconds: float

    @property
    def memory(self) -> int:
        """The peak of a training step; kernels' own workspace and previews are not in it."""
        held = sum(n.memory for n in self.networks) + self.activations + self.workspace
        return held + (0 if self.on_gpu else self.data)

    @property
    def on_gpu(self) -> bool:
        """Whether the probe ran on one; pictures stay in main memory then."""
        return self.device not in ("cpu", "none")

    @property
    def images_per_second(self) -> float:
        """Training pictures a second."""
        return self.batch_size / self.seconds_per_step

    @property
    def seconds(self) -> float:
        """Of the whole run, looks included; the final evaluation is not."""
        return self.num_steps * self.seconds_per_step + self.look_seconds


def plan(
    config: RunConfig,
    teacher: Model | None = None,
    data: Split | None = None,
    probe_seconds: float = PROBE_SECONDS,
) -> Plan:
    """Measure what a run of `config` will need.

    Args:
        config: the run.
        teacher: the model to distil; loaded from `config.teacher` if None.
        data: loaded from `config.data` if None.
        probe_seconds: how long to train for the estimate of time; a few steps are done in any case.

    Raises:
        UsageError: if the run itself would be refused: an impossible value, no teacher, data that do not fit.
    """
    run, pictures, networks = _build(config, teacher, data)
    memory = training_memory(
        _main_part(run.method), run.batches, config.train, config.optim, networks, pictures
    )
    overrides = run.method.optimizer_overrides
    optims = {role: replace(config.optim, **overrides.get(role, {})) for role in run.method.trainable}
    costs = [network_cost(role, network, optims.get(role)) for role, network in networks.items()]
    costs = _with_copies(config, costs)
    seconds_per_step, probe_steps = probe(run, probe_seconds)
    tables = [run.data.images, *run.data.conditions.values()]
    units = forward_units(config)
    return Plan(
        networks=costs,
        activations=memory.activations,
        workspace=_workspace(memory, costs),
        data=sum(map(held_bytes, tables)),
        device=str(run.model.device),
        threads=torch.get_num_threads(),
        batch_size=config.train.batch_size,
        num_steps=config.train.num_steps,
        forward_units=units,
        probe_steps=probe_steps,
        seconds_per_step=seconds_per_step,
        look_seconds=_look_units(config) * seconds_per_step / (units * config.train.batch_size),
    )


def outline(config: RunConfig, teacher: TeacherConfig) -> Plan:
    """What a run will need, from shapes alone: no network is built in memory, nothing is run.

    Args:
        config: the run.
        teacher: the recipe of its teacher (of the run itself, if it trains one), which says how large
            networks and pictures are.
    """
    # No recipe of vectors or tokens says how long they are.
    assert not isinstance(teacher.network, MLPConfig | TokenTransformerConfig)
    shape = (teacher.network.image_channels, teacher.image_size, teacher.image_size)
    with torch.device("meta"):
        network = registry.build(teacher.network)
        z, logsnr = torch.zeros(1, *shape), torch.zeros(1)
        width = getattr(teacher.network, "text_dim", 0)
        cond = {TOKENS: torch.zeros(1, ASSUMED_TOKENS, width)} if width else None
    learner = _learning_part(config, network)
    kept = _Saved([*network.parameters(), *learner.parameters()], config.train.checkpointing)
    with FlopCounterMode(display=False) as counter, kept.inside(learner):
        learner(z, logsnr, cond)
    activations = kept.bytes
    batch, units = config.train.batch_size, forward_units(config)
    learning = config.method.learning
    parts = {"teacher": network, **{role: learner for role in learning}}
    if isinstance(config, DistillConfig) and config.adapter.auxiliary == "full":
        parts["auxiliary"] = network
    if isinstance(config, DistillConfig) and config.ema.decay:
        parts["average of the student"] = learner
    costs = [
        network_cost(role, part, config.optim if role in learning else None) for role, part in parts.items()
    ]
    return Plan(
        networks=_with_copies(config, costs),
        activations=activations * batch * config.method.learning_at_once,
        workspace=0,
        data=0,
        device="none",
        threads=0,
        batch_size=batch,
        num_steps=config.train.num_steps,
        forward_units=units,
        probe_steps=0,
        seconds_per_step=units * batch * counter.get_total_flops() / ASSUMED_OPERATIONS,
        look_seconds=_look_units(config) * counter.get_total_flops() / ASSUMED_OPERATIONS,
    )


class _Saved:
    """What autograd saves for the backward pass of one call.

    Args:
        weights: not to be counted.
        checkpointing: of blocks their inputs alone, and the most that one of them saves while it runs again.
    """

    def __init__(self, weights: Iterable[Tensor], checkpointing: bool):
        self.weights = {storage_id(weight) for weight in weights}
        self.checkpointing = checkpointing
        self.outside: dict[int, Tensor] = {}
        self.most = 0

    @property
    def bytes(self) -> int:
        """At the most at a time."""
        return storage_bytes(self.outside.values()) + self.most

    @contextlib.contextmanager
    def inside(self, network: nn.Module) -> Iterator[None]:
        """Count what calls of the network save."""
        blocks: list[nn.Module] = (
            [m for m in network.modules() if isinstance(m, BLOCKS)] if self.checkpointing else []
        )
        for block in blocks:
            block.forward = partial(self._run, block.forward)
        try:
            with self._noting(self.outside):
                yield
        finally:
            for block in blocks:
                del block.forward

    def _run(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        for tensor in filter(torch.is_tensor, inputs):
            self._note(self.outside, tensor)
        saved: dict[int, Tensor] = {}
        with self._noting(saved):
            output = forward(*inputs)
        self.most = max(self.most, storage_bytes(saved.values()))
        return output

    def _noting(self, saved: dict[int, Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(partial(self._note, saved), lambda tensor: tensor)

    def _note(self, saved: dict[int, Tensor], tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in self.weights:
            saved[storage_id(tensor)] = tensor
        return tensor


def _learning_part(config: RunConfig, network: nn.Module) -> nn.Module:
    """What a student learns: an adapter of the network, or all of it."""
    if not isinstance(config, DistillConfig) or not config.adapter.rank:
        return network
    adapter = config.adapter
    with torch.device("meta"):
        return AdaptedNetwork(network, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets)


def _workspace(memory: StepMemory, costs: list[NetworkCost]) -> int:
    """What neither networks nor activations account for."""
    return max(memory.peak - memory.activations - sum(cost.memory for cost in costs), 0)


def _main_part(method: Method) -> Method:
    """Without a warm start, which is the lesser part, or an average, which is counted as a network."""
    while isinstance(method, Wrapper):
        method = method.method
    return method


def _with_copies(config: RunConfig, costs: list[NetworkCost]) -> list[NetworkCost]:
    """What a method holds in the shape of the teacher's weights: first a gradient, then the rest."""
    copies = config.method.teacher_copies
    teacher, *others = costs
    if not copies:
        return costs
    own = replace(teacher, gradients=teacher.weights, optimizer_state=(copies - 1) * teacher.weights)
    return [own, *others]


def forward_units(config: RunConfig) -> int:
    """Cost of a step in forward passes of one network on one batch; a backward pass counts as two.

    What the method says, k for each sample in all steps, and (k − 1)/2 of the student's forwards for each
    minibatch that is rolled out; of an elastic student the mean of that.
    """
    if not isinstance(config, DistillConfig):
        return config.method.forward_units(guided=False)
    rollouts = config.method.minibatches if config.source == "rollout" else 0
    units = config.method.forward_units(guided=config.guidance.scale > 0)
    mean_steps = sum(config.step_counts) / len(config.step_counts)
    whole = config.method.full_rollouts * mean_steps
    return units + math.ceil(whole + rollouts * (mean_steps - 1) / 2)


def network_cost(role: str, network: nn.Module, optim: OptimConfig | None = None) -> NetworkCost:
    """Parameters and memory of one network, in the precision that its weights have.

    Args:
        role: what it is to the method.
        network: the network.
        optim: how it is trained; None for a frozen one.
    """
    parameters = list(network.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return NetworkCost(
        role=role,
        parameters=sum(p.numel() for p in parameters),
        weights=weights,
        gradients=weights if optim else 0,
        optimizer_state=moments_kept(optim) * weights if optim else 0,
    )


def probe(run: Run, seconds: float) -> tuple[float, int]:
    """Train for about so long. Returns the mean time of a step, and how many were timed."""
    settings = replace(run.config.train, num_steps=ENDLESS)
    started = 0.0
    records = train(run.method, run.batches, settings, run.config.optim)
    with contextlib.closing(records):
        for record in records:
            if record.step == WARMUP_STEPS:
                started = record.seconds
            timed = record.step - WARMUP_STEPS
            if record.seconds >= seconds and timed >= MIN_TIMED_STEPS and timed % MIN_TIMED_STEPS == 0:
                return (record.seconds - started) / timed, timed
    raise AssertionError("the probe's loop ended by itself")


def _build(
    config: RunConfig, teacher: Model | None, data: Split | None
) -> tuple[Run, list[Tensor], dict[str, nn.Module]]:
    """The run, without a folder; all pictures and labels in memory; all networks that it holds, by role."""
    if data is None:
        from momatch.data.sources import load_data

        data = load_data(config.data, config.image_size, config.reading)
    if isinstance(config, DistillConfig):
        teacher = teacher or teacher_of(config)
        run = distillation(teacher, data, config, None)
        networks = {"teacher": teacher.denoiser, **run.method.trainable, **run.method.kept}
    else:
        run = teacher_training(data, config, None)
        networks = dict(run.method.trainable)
    sets = (data.train, data.heldout, run.data, run.reference)
    tables = [table for part in sets for table in (part.images, part.labels, *part.conditions.values())]
    return run, [table for table in tables if isinstance(table, Tensor)], networks


def _look_units(config: RunConfig) -> float:
    """Single-picture forward passes that the previews take in a whole run."""
    if not config.monitor.every:
        return 0.0
    steps = (
        config.step_counts[-1]
        if isinstance(config, DistillConfig)
        else min(config.sampling_steps, TEACHER_LOOK_STEPS)
    )
    return math.ceil(config.train.num_steps / config.monitor.every) * config.monitor.num_samples * steps
