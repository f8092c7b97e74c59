"""The training loop: a generator that knows no losses.

    for record in train(method, batches, config, directory):
        ...

It yields after every step. Whoever consumes it adds progress bars, logs, pictures; leaving the loop early
(break, or `close()`) saves a checkpoint, and the same call later goes on from there, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion.compilation import compiled, resolved
from momatch.diffusion.denoiser import denoisers
from momatch.diffusion.precision import tf32
from momatch.methods.base import Batch, Method
from momatch.training import checkpoint, distributed
from momatch.training.activations import checkpointed
from momatch.training.batches import Batches, Prefetched
from momatch.training.capture import Captured, CudaGraphs
from momatch.training.optim import RoleOptimizer, ShardedOptimizer, learning_rate_schedule, optimizer_of
from momatch.training.update import (
    Deferred,
    Failure,
    Guard,
    Immediate,
    NonFiniteLossError,
    Outcome,
    Updater,
)
from momatch.utils.errors import UsageError
from momatch.utils.seeding import derive_seed


@dataclass(frozen=True)
class Record:
    """State of the run after a step.

    Attributes:
        step: steps done so far.
        images_seen: pictures seen so far, over all resumptions.
        seconds: since this process began to train.
        metrics: numbers by name, at every `log_every`-th step; empty otherwise.
    """

    step: int
    images_seen: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    method: Method,
    batches: Batches,
    config: TrainConfig,
    optim: OptimConfig,
    directory: Path | None = None,
    prefetch: bool = False,
) -> Generator[Record, None, None]:
    """Run `method` from the newest checkpoint in `directory` (if any) to `config.num_steps`.

    Args:
        method: the algorithm; its `trainable` networks get an optimizer each.
        batches: step → batch.
        config: length and rhythm.
        optim: optimizer settings.
        directory: where checkpoints live; None keeps none.
        prefetch: make the next batch in a thread while a step runs.

    Yields:
        A `Record` after every step.

    Raises:
        NonFiniteLossError: before a non-finite gradient could touch any weight.
        CheckpointError: if the newest checkpoint cannot be used.
    """
    state = state_of(method, optim)
    networks, optimizers = state.networks, state.optimizers
    progress = checkpoint.restore(directory, state) if directory else checkpoint.Progress()
    uses_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for n in networks.values() for m in n.modules())
    other_rank = (distributed.rank(),) if distributed.rank() else ()
    saved = progress.step
    for network in networks.values():
        network.train()
    start = time.monotonic()
    device = next(p.device for network in networks.values() for p in network.parameters())
    around = contextlib.ExitStack()
    if prefetch:
        batches = around.enter_context(contextlib.closing(Prefetched(batches, config.num_steps, device)))
    if config.checkpointing:
        around.enter_context(checkpointed(networks.values()))
    in_tf32 = any(each.precision == "tf32" for each in denoisers(networks.values()))
    sharded = any(isinstance(optimizer, ShardedOptimizer) for optimizer in optimizers.values())
    guard = Immediate() if device.type != "cuda" or sharded else Deferred(optimizers, device)
    update = _updater(method, optimizers, guard, config, device)
    try:
        for step in range(progress.step, config.num_steps):
            if uses_dropout:  # nn.Dropout takes no generator; what is dropped differs between processes
                torch.manual_seed(derive_seed(config.seed, "dropout", step, *other_rank))
            rates = {
                role: learning_rate_schedule(optimizer.config, step, config.num_steps, config.extended_at)
                for role, optimizer in optimizers.items()
            }
            for role, optimizer in optimizers.items():
                optimizer.set_learning_rate(rates[role])
            batch = batches(step)
            guard.begin(step)
            with tf32(in_tf32):
                outcome = update(step, batch)
            last = step + 1 == config.num_steps
            logs, saves = (
                last or (step + 1) % every == 0 for every in (config.log_every, config.checkpoint_every)
            )
            if (isinstance(guard, Immediate) or logs or saves) and (failure := guard.failure()):
                raise NonFiniteLossError(_non_finite(failure, directory))
            method.after_update(step)
            progress = checkpoint.Progress(step + 1, progress.images_seen + len(batch.x) * distributed.size())
            metrics = {}
            if logs:
                metrics = distributed.numbers_of(outcome.metrics())
                metrics |= {f"gradient_norm_{role}": float(norm) for role, norm in outcome.norms.items()}
                metrics["learning_rate"] = max(rates[role] for role in outcome.norms)
            # First the record, then the checkpoint: what a checkpoint covers has been logged by then.
            yield Record(progress.step, progress.images_seen, time.monotonic() - start, metrics)
            if directory and saves:
                checkpoint.save(directory, progress, state, config.keep)
                saved = progress.step
    except GeneratorExit:
        if directory and saved != progress.step and not guard.failure():
            checkpoint.save(directory, progress, state, config.keep)
        raise
    finally:
        around.close()


def state_of(method: Method, optim: OptimConfig) -> checkpoint.State:
    """All that a method learns and keeps, with an optimizer for each role, before its first step."""
    overrides = method.optimizer_overrides
    optimizers = {
        role: optimizer_of(network, replace(optim, **overrides.get(role, {})))
        for role, network in method.trainable.items()
    }
    return checkpoint.State(method.trainable, optimizers, method.kept)


def _updater(
    method: Method,
    optimizers: Mapping[str, RoleOptimizer],
    guard: Guard,
    config: TrainConfig,
    device: torch.device,
) -> Callable[[int, Batch], Outcome]:
    """What runs the updates, in the way that `config.compile` names."""
    networks = [*method.trainable.values(), *method.frozen.values()]
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    how = resolved(config.compile, device, parameters)
    if how == "graph" and (distributed.size() > 1 or config.noise_slices > 1 or config.accumulate > 1):
        if config.compile == "graph":
            raise UsageError(
                "train.compile is 'graph', which records the updates of one process, whose noise has one "
                "generator; with several, or train.noise_slices or train.accumulate above 1, use none or "
                "default"
            )
        how = "none"
    if how == "default":
        for network in networks:
            compiled(network)
    updater = Updater(method, optimizers, guard, distributed.average, config.accumulate)
    return Captured(updater, CudaGraphs(device)) if how == "graph" else updater


def _non_finite(failure: Failure, directory: Path | None) -> str:
    good = checkpoint.paths(directory)[-1:] if directory else []
    where = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
    return (
        f"the {failure.role}'s loss or gradient is not finite at step {failure.step} (loss "
        f"{failure.loss:.4g}); {where}; lower the learning rate, or choose a weighting that is bounded "
        "(flat, snr_clipped)"
    )
