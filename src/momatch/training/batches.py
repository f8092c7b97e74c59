"""Minibatches as a function of the step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait

import torch
from torch import Tensor

from momatch.data.paraphrases import Wordings
from momatch.data.rows import Rows
from momatch.methods.base import Batch
from momatch.training import distributed
from momatch.utils.errors import Notice
from momatch.utils.seeding import Generator, RowsGenerator, generator

Batches = Callable[[int], Batch]
PATIENCE = 60.0  # seconds that a batch may take before somebody is told


def image_batches(
    images: Tensor | Rows,
    labels: Tensor | None,
    batch_size: int,
    seed: int,
    conditions: Mapping[str, Tensor | Rows] | None = None,
    device: torch.device | str = "cpu",
    noise_slices: int = 1,
    minibatches: int = 1,
    part: int = 0,
    parts: int = 1,
) -> Batches:
    """Step → `batch_size` pictures drawn with replacement, and the generator for that step's noise.

    With `parts`, one equal part of each minibatch: all parts together are the batch of one process, with the
    same noise for every picture.

    Args:
        images: (N, …) all pictures or latents.
        labels: (N,) their labels, given as cond["label"]; None for a model without classes.
        batch_size: size of the whole batch.
        seed: the run's seed.
        conditions: (N, …) each, given in cond under their own names; of several wordings one is drawn.
        device: where to train. Which pictures are drawn is the same everywhere; noise is drawn there, and a
            GPU has other random numbers than the CPU.
        noise_slices: generators that the noise of a minibatch comes from, each for a slice of its rows; which
            numbers they are depends on it. 1 is a single generator.
        minibatches: that the method will cut the batch into.
        part: which part of each minibatch is wanted, 0 … parts − 1.
        parts: how many there are; a process each.
    """
    asked: dict[str, Tensor | Rows] = {**({} if labels is None else {"label": labels}), **(conditions or {})}
    worded = {key: rows for key, rows in asked.items() if isinstance(rows, Wordings)}

    on_cpu = torch.device(device).type == "cpu"
    own = torch.arange(batch_size).view(minibatches, parts, -1)[:, part].flatten() if parts > 1 else None

    def noise_of(step: int, single: torch.Generator | None) -> Generator:
        """Slices only where there are more than one, or others hold some of the rows."""
        if noise_slices == 1:
            single = single or generator(seed, "train", step, device=device)
            return single if parts == 1 else RowsGenerator([single], part, parts, minibatches)
        slices = [generator(seed, "train", step, i, device=device) for i in range(noise_slices)]
        return RowsGenerator(slices, part, parts, minibatches)

    def batch(step: int) -> Batch:
        rng = generator(seed, "train", step)
        index = torch.randint(len(images), (batch_size,), generator=rng)
        u = torch.rand(batch_size, generator=rng) if worded else None
        if own is not None:  # of the whole batch's numbers, which every process draws
            index, u = index[own], None if u is None else u[own]
        cond = {key: rows[index] for key, rows in asked.items() if not isinstance(rows, Wordings)}
        if u is not None:
            cond |= {key: rows.draw(index, u) for key, rows in worded.items()}
        if on_cpu:
            return Batch(images[index], cond or None, noise_of(step, rng), index)
        x, *rest = (_sent(value, device) for value in (images[index], *cond.values()))
        return Batch(x, dict(zip(cond, rest, strict=True)) or None, noise_of(step, None), index)

    return batch


class Prefetched:
    """The same batches, each made by a thread while the step before it runs.

    A batch is a function of its step, so nothing depends on when it is made: numbers are the same with and
    without. On a GPU the copy runs beside the step's kernels, on a stream of its own, from pinned memory.

    Args:
        batches: step → batch.
        last: the number of steps; nothing is made for those after.
        device: where the batches go.
        patience: seconds of waiting for a batch after which a `Notice` says so, again and again.
    """

    def __init__(
        self, batches: Batches, last: int, device: torch.device | str = "cpu", patience: float = PATIENCE
    ):
        self.batches, self.last, self.patience = batches, last, patience
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._next: tuple[int, Future[Batch]] | None = None
        self._stalled = False

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; that of the next step is begun.

        Raises:
                Whatever making the batch raised.
        """
        known, future = self._next or (None, None)
        if future is None or known != step:
            future = self._begin(step)
        batch = self._come(step, future)
        self._next = None
        if self.stream is not None:  # before the next copy is begun, which need not be waited for
            here = torch.cuda.current_stream(self.stream.device)
            here.wait_stream(self.stream)
            for tensor in (batch.x, *(batch.cond or {}).values()):
                tensor.record_stream(here)  # or its memory could be given away while the step still reads it
        if step + 1 < self.last:
            self._next = step + 1, self._begin(step + 1)
        return batch

    def _begin(self, step: int) -> Future[Batch]:
        """Make a batch in a thread, which does not keep a process that gives up on it."""
        future: Future[Batch] = Future()

        def make() -> None:
            try:
                future.set_result(self._make(step))
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=make, name="batches", daemon=True)
        self._thread.start()
        return future

    def _come(self, step: int, future: Future[Batch]) -> Batch:
        """What the thread made; while it does not come, whoever waits is told, in every process."""
        seconds = 0.0
        while not wait([future], self.patience).done:
            self._stalled, seconds = True, seconds + self.patience
            who = f"process {distributed.rank()}: " if distributed.size() > 1 else ""
            with warnings.catch_warnings():
                warnings.simplefilter("always", Notice)
                warnings.warn(
                    f"{who}step {step + 1} has waited for its data for {seconds:.0f} s; is the disk or the "
                    "network that they lie on still there? To give up, press Ctrl-C twice; the same command "
                    "goes on from the last checkpoint",
                    Notice,
                    stacklevel=2,
                )
        self._stalled = False
        return future.result()

    def _make(self, step: int) -> Batch:
        with torch.cuda.stream(self.stream):  # does nothing without one
            return self.batches(step)

    def close(self) -> None:
        """Let the thread go; a batch under way is still made, and dropped."""
        if self._thread is not None and not self._stalled:
            self._thread.join()


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a GPU; the copy from pinned memory needs no waiting."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
