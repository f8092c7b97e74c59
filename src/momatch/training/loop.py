"""The training loop: a generator that knows no losses.

    for record in train(method, batches, config, directory):
        ...

It yields after every step. Whoever consumes it adds progress bars, logs, pictures; leaving the loop early
(break, or `close()`) saves a checkpoint, and the same call later goes on from there, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.methods.base import Method
from momatch.training import checkpoint, distributed
from momatch.training.batches import Batches, Prefetched
from momatch.training.optim import learning_rate_schedule, optimizer_of
from momatch.utils.errors import RunError
from momatch.utils.seeding import derive_seed


class NonFiniteLossError(RunError):
    """A loss or gradient was not finite; the message names the step and the last good checkpoint."""


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
    if prefetch:
        device = next(p.device for network in networks.values() for p in network.parameters())
        batches = Prefetched(batches, config.num_steps, device)
    try:
        for step in range(progress.step, config.num_steps):
            if uses_dropout:  # nn.Dropout takes no generator; what is dropped differs between processes
                torch.manual_seed(derive_seed(config.seed, "dropout", step, *other_rank))
            batch = batches(step)
            update = method.step(step, batch)
            norms, rates = {}, {}
            for role, loss in update.losses.items():
                optimizers[role].zero_grad()
                loss.backward()
                distributed.average(optimizers[role].gradients)
                norms[role] = optimizers[role].clip()
                rates[role] = learning_rate_schedule(optimizers[role].config, step, config)
                if not norms[role] < float("inf"):
                    raise NonFiniteLossError(_non_finite(role, step, loss, directory))
            for role, rate in rates.items():
                optimizers[role].step(rate)
            method.after_update(step)
            progress = checkpoint.Progress(step + 1, progress.images_seen + len(batch.x) * distributed.size())
            metrics = {}
            if progress.step % config.log_every == 0 or progress.step == config.num_steps:
                metrics = distributed.numbers_of(update.metrics())
                metrics |= {f"gradient_norm_{role}": norm for role, norm in norms.items()}
                metrics["learning_rate"] = max(rates.values())
            # First the record, then the checkpoint: what a checkpoint covers has been logged by then.
            yield Record(progress.step, progress.images_seen, time.monotonic() - start, metrics)
            if directory and (
                progress.step % config.checkpoint_every == 0 or progress.step == config.num_steps
            ):
                checkpoint.save(directory, progress, state, config.keep)
                saved = progress.step
    except GeneratorExit:
        if directory and saved != progress.step:
            checkpoint.save(directory, progress, state, config.keep)
        raise
    finally:
        if isinstance(batches, Prefetched):
            batches.close()


def state_of(method: Method, optim: OptimConfig) -> checkpoint.State:
    """All that a method learns and keeps, with an optimizer for each role, before its first step."""
    overrides = method.optimizer_overrides
    optimizers = {
        role: optimizer_of(network, replace(optim, **overrides.get(role, {})))
        for role, network in method.trainable.items()
    }
    return checkpoint.State(method.trainable, optimizers, method.kept)


def _non_finite(role: str, step: int, loss: torch.Tensor, directory: Path | None) -> str:
    good = checkpoint.paths(directory)[-1:] if directory else []
    where = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
    return (
        f"the {role}'s loss or gradient is not finite at step {step} (loss {loss.item():.4g}); {where}; "
        "lower the learning rate, or choose a weighting that is bounded (flat, snr_clipped)"
    )
