"""What a step of training holds in memory, measured while it runs.

`Live` sees every storage that an operation reads or makes, and when it goes, on any device. What operations
use inside themselves it does not see.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.methods.base import Method
from momatch.training.batches import Batches
from momatch.training.loop import train

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


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind all tensors, those that several share counted once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


class Live(TorchDispatchMode):
    """Inside `with Live() as live`, every storage that an operation touches is counted until it is freed.

    Args:
        aside: tensors not to count.

    Attributes:
        now: bytes alive at present, of storages seen so far.
        most: the most so far.
    """

    def __init__(self, aside: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = 0
        self._aside = {_storage(tensor) for tensor in aside}
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        # Forward mode's zero tensors have no storage, and kernels called from here crash on them.
        if any(isinstance(value, Tensor) and value._is_zerotensor() for value in given):
            args, kwargs = tree_map_only(Tensor, _with_storage, (args, kwargs))
            given = tree_leaves((args, kwargs))
        self.add(*given)
        result = func(*args, **kwargs)
        self.add(*tree_leaves(result))
        return result

    def add(self, *values: Any) -> None:
        """Count these tensors from now on; what is no tensor is passed over."""
        for value in values:
            if isinstance(value, Tensor) and not value._is_zerotensor():
                self._watch(value.untyped_storage())
        self.most = max(self.most, self.now)

    def forget_most(self) -> None:
        """Begin the search for the most anew."""
        self.most = self.now

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched or key in self._aside:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, gone)
        self.now += size


class _Kept:
    """Bytes of the storages that graphs hold at present, each counted once, and the most so far."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if not self.holders.get(key):
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)
        self.holders[key] = self.holders.get(key, 0) + 1

    def remove(self, tensor: Tensor) -> None:
        key = _storage(tensor)
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
    own = {_storage(t) for network in networks.values() for t in (*network.parameters(), *network.buffers())}
    kept = _Kept()

    def keep(tensor: Tensor) -> Tensor | _Holder:
        return tensor.detach() if _storage(tensor) in own else _Holder(tensor.detach(), kept)

    def give(held: Tensor | _Holder) -> Tensor:
        return held.tensor if isinstance(held, _Holder) else held

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _with_storage(tensor: Tensor) -> Tensor:
    if not tensor._is_zerotensor():
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
