"""What a step of training holds in memory, measured while it runs.

By `momatch.utils.memory.Live`: what operations use inside themselves is not seen.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.methods.base import Method
from momatch.training.batches import Batches
from momatch.training.loop import train
from momatch.utils.memory import Live, storage_bytes, storage_id

__all__ = ["Live", "StepMemory", "activation_bytes", "storage_bytes", "training_memory"]

WARMUP_STEPS = 2  # they allocate the optimizer state, and leave what the step before leaves
MEASURED_STEPS = 2  # one of each kind, where two kinds alternate


@dataclass(frozen=True)
class StepMemory:
    """Of a step of training, in bytes.

    Attributes:
        peak: most that is alive at a time: weights, gradients, optimizer state and all that the step makes.
        activations: most that autograd keeps for backward passes at a time, the networks' weights left out.
    """

    peak: int
    activations: int


def training_memory(
    method: Method,
    batches: Batches,
    settings: TrainConfig,
    optim: OptimConfig,
    networks: Mapping[str, nn.Module],
    aside: Iterable[Tensor] = (),
) -> StepMemory:
    """Measure the training loop, over a step of each kind once it runs evenly.

    Args:
        method: the algorithm; its networks are trained a little.
        batches: step → batch.
        settings: of the loop.
        optim: of the optimizers.
        networks: all that the method holds.
        aside: tensors not to count, such as the training pictures.
    """
    endless = replace(settings, num_steps=10**9)
    records = train(method, batches, endless, optim)
    with contextlib.closing(records), Live(aside) as live:
        for _ in range(WARMUP_STEPS):
            next(records)
        gc.collect()  # what only waits for the collector is no need of the run's
        live.forget_most()
        with _kept_for_backward(networks) as kept:
            for _ in range(MEASURED_STEPS):
                next(records)
        return StepMemory(live.most, kept.most)


def activation_bytes(method: Method, batches: Batches, step: int, networks: Mapping[str, nn.Module]) -> int:
    """Most memory that one step keeps for backward passes at a time, the networks' weights left out."""
    with _kept_for_backward(networks) as kept:
        update = method.step(step, batches(step))
    del update
    return kept.most


class _Kept:
    """Bytes of the storages that graphs hold at present, each counted once, and the most so far."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, tensor: Tensor) -> None:
        key = storage_id(tensor)
        if not self.holders.get(key):
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)
        self.holders[key] = self.holders.get(key, 0) + 1

    def remove(self, tensor: Tensor) -> None:
        key = storage_id(tensor)
        self.holders[key] -= 1
        if not self.holders[key]:
            self.now -= tensor.untyped_storage().nbytes()


class _Holder:
    """A saved tensor; gone as soon as its graph is."""

    def __init__(self, tensor: Tensor, kept: _Kept):
        self.tensor, self.kept = tensor, kept
        kept.add(tensor)

    def __del__(self) -> None:
        self.kept.remove(self.tensor)


@contextlib.contextmanager
def _kept_for_backward(networks: Mapping[str, nn.Module]) -> Iterator[_Kept]:
    """Counts what graphs made inside keep, the networks' own tensors left out."""
    tensors = (t for network in networks.values() for t in (*network.parameters(), *network.buffers()))
    own = {storage_id(t) for t in tensors}
    kept = _Kept()

    def keep(tensor: Tensor) -> Tensor | _Holder:
        return tensor.detach() if storage_id(tensor) in own else _Holder(tensor.detach(), kept)

    def give(held: Tensor | _Holder) -> Tensor:
        return held.tensor if isinstance(held, _Holder) else held

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield kept
