"""Updates recorded once and replayed: what a small network's step costs a GPU is mostly its launching.

An update is a function of (step, batch, weights). Its weights stay where they are; its batch is copied to
where the recording reads it, with the state of its generator. Then a replay does what the update would have
done, and draws what it would have drawn. A method says which of its steps run the same operations
(`Method.variant`); each such kind is recorded on its own, after some steps that run as they always do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from momatch.methods.base import Batch
from momatch.training.update import Outcome, Updater
from momatch.utils.errors import Notice
from momatch.utils.text import first_line

WARMUP_STEPS = 3  # of each kind: libraries choose kernels and allocate at the first ones
MOST_KINDS = 8  # recordings hold memory; captions of many lengths could make any number

Result = TypeVar("Result")


class Recorder(Protocol):
    """What records and replays on a device."""

    def aside(self) -> AbstractContextManager[object]:
        """Inside, work runs where a recording would run it, and is waited for."""
        ...

    def record(
        self, work: Callable[[], Result], generator: torch.Generator
    ) -> tuple[Callable[[], None], Result]:
        """Record what `work` does, without doing it.

        Args:
            work: calls operations on the device; nothing in it may wait for them.
            generator: the source of all its random numbers, read anew by every replay.

        Returns:
            What replays it, and `work`'s result, whose tensors every replay fills anew.
        """
        ...


class CudaGraphs:
    """Records CUDA graphs. All share their memory, since one replay ends before the next begins."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self) -> AbstractContextManager[object]:
        """On the stream that recordings are made on."""
        return _Aside(self.stream)

    def record(
        self, work: Callable[[], Result], generator: torch.Generator
    ) -> tuple[Callable[[], None], Result]:
        """As `Recorder`. Other threads, such as one that reads batches, may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class _Aside:
    """Enters a stream after what came before, and leaves it with its work in order before what follows."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.entered = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.entered.__enter__()

    def __exit__(self, *error: object) -> None:
        self.entered.__exit__(*error)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@dataclass(frozen=True)
class _Recording:
    """A recorded update, and the batch that it reads."""

    batch: Batch
    replay: Callable[[], None]
    outcome: Outcome


class Captured:
    """The same updates as `updater`'s, recorded at the fourth of a kind and replayed from then on.

    Args:
        updater: runs what is not recorded yet, or cannot be.
        recorder: of the device.
    """

    def __init__(self, updater: Updater, recorder: Recorder):
        self.updater, self.recorder = updater, recorder
        self.seen: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, _Recording] = {}
        self.refused = False

    def __call__(self, step: int, batch: Batch) -> Outcome:
        """Update `step`, on its batch."""
        variant = self.updater.method.variant(step)
        if variant is None or self.refused:
            return self.updater(step, batch)
        kind = variant, _shapes(batch)
        if kind not in self.recordings:
            seen = self.seen[kind] = self.seen.get(kind, 0) + 1
            if seen <= WARMUP_STEPS or len(self.recordings) >= MOST_KINDS:
                with self.recorder.aside():
                    return self.updater(step, batch)
            try:
                self.recordings[kind] = self._record(step, batch)
            except RuntimeError as error:
                self.refused = True
                warnings.warn(
                    f"updates cannot be recorded ({first_line(error)}); they run one operation at a time",
                    Notice,
                    stacklevel=2,
                )
                return self.updater(step, batch)
        recording = self.recordings[kind]
        for own, value in zip(_tensors(recording.batch), _tensors(batch), strict=True):
            own.copy_(value)
        _generator(recording.batch).set_state(_generator(batch).get_state())
        recording.replay()
        return recording.outcome

    def _record(self, step: int, batch: Batch) -> _Recording:
        cond = None if batch.cond is None else {key: value.clone() for key, value in batch.cond.items()}
        own = Batch(batch.x.clone(), cond, torch.Generator(batch.x.device))
        replay, outcome = self.recorder.record(lambda: self.updater(step, own), _generator(own))
        return _Recording(own, replay, outcome)


def _generator(batch: Batch) -> torch.Generator:
    assert isinstance(batch.generator, torch.Generator)  # `train` records nothing else
    return batch.generator


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.x, *(batch.cond or {}).values()]


def _shapes(batch: Batch) -> Hashable:
    named = {"x": batch.x, **(batch.cond or {})}
    return tuple((name, value.shape, value.dtype) for name, value in named.items())
