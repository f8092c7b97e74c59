"""Several processes that train as one: what they say to each other. Nothing else knows of ranks.

    torchrun --nproc-per-node 8 -m -- momatch distill RECIPE --out DIR

torch.distributed is the engine: gloo between CPUs, nccl between GPUs. The batch is global, and every process
holds an equal part of it; losses are means, so the mean of the parts' gradients is that of the whole batch.
In one process every function here does nothing, or what its name says without asking anybody.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from momatch.config.schema import DistillConfig
from momatch.diffusion.denoiser import Wrapper
from momatch.diffusion.interface import Cond, cond_rows
from momatch.methods.base import Deviation, Metric
from momatch.models.model import Model
from momatch.utils.errors import ConfigError, Interrupted, Notice, RunError, UsageError

Told = TypeVar("Told")
Held = TypeVar("Held", bound=Model)
SECONDS_TO_REPORT = 2.0  # in which processes that live say so, once one is gone
BUCKET = 2**25  # numbers that are averaged at a time, where they lie in many tensors


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that were launched together; see `launched`.

    On GPUs each takes that of its LOCAL_RANK. An error that all of them make is told by one alone; if one of
    them is gone, a survivor says which.

    Raises:
        UsageError: if there are more processes on this machine than GPUs.
        RunError: if another process is gone.
    """
    if torch.cuda.is_available():
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    store, here, count = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("momatch", store), rank=here, world_size=count)
    said = PrefixStore("said", store)
    with warnings.catch_warnings():
        if here:
            warnings.simplefilter("ignore", Notice)
        try:
            yield
            dist.barrier()
        except (UsageError, RunError, OSError, Interrupted) as error:
            _say_once(said, str(error))
            raise
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            sentence = _who_is_gone(said, here, count)
            _say_once(said, sentence, again=False)
            raise RunError(sentence) from error
    dist.destroy_process_group()


def _take_gpu(local_rank: int, count: int) -> None:
    if local_rank >= count:
        raise UsageError(
            f"process {local_rank} of this machine has no GPU of its own, there are {count}; "
            f"start it with --nproc-per-node {count}, or hide the GPUs to use CPUs (CUDA_VISIBLE_DEVICES=)"
        )
    torch.cuda.set_device(local_rank)


def _say_once(store: Store, sentence: str, again: bool = True) -> None:
    """Keep this process from printing what another one prints; `again`: only if it is the same sentence."""
    try:
        first = store.compare_set("sentence", "", f"{rank()} {sentence}").decode()
        heard = store.add("heard", 1)
        deadline = time.monotonic() + SECONDS_TO_REPORT
        while is_main() and heard < size() and time.monotonic() < deadline:  # it may keep the store for all
            time.sleep(0.01)
            heard = store.add("heard", 0)
    except RuntimeError:  # gone with the process that kept it
        return
    who, _, told = first.partition(" ")
    if int(who) != rank() and (told == sentence or not again):
        sys.stdout = sys.stderr = open(os.devnull, "w")


def _lost_connection(error: RuntimeError) -> bool:
    """Whether it is how torch.distributed says that another process does not answer any more."""
    words = ("gloo", "connection", "nccl", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _who_is_gone(store: Store, here: int, count: int) -> str:
    """The processes that do not report within a moment, as a sentence."""
    try:
        store.set(f"alive {here}", "")
        time.sleep(SECONDS_TO_REPORT)
        gone = [str(i) for i in range(count) if not store.check([f"alive {i}"])]
    except RuntimeError:  # the one that keeps the store
        gone = ["0"]
    who = f"process {' and '.join(gone)} of {count} is gone" if gone else f"one of {count} processes failed"
    return f"{who}; see what it printed, then run the same command again to go on from the last checkpoint"


def average(tensors: Iterable[Tensor]) -> None:
    """Make each tensor, in place, its mean over all processes: the same to the last bit in every one.

    The flat gradient of `Optimizer` is one tensor, and so one message; others are sent many at a time.
    """
    if size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        while group:
            bucket, numbers = [group.pop()], 0
            while group and (numbers := numbers + bucket[-1].numel()) + group[-1].numel() < BUCKET:
                bucket.append(group.pop())
            _average(bucket)


def _average(bucket: list[Tensor]) -> None:
    whole = bucket[0].detach()
    if len(bucket) > 1 or not whole.is_contiguous():
        whole = torch.cat([tensor.detach().flatten() for tensor in bucket])
    dist.all_reduce(whole)
    whole /= size()
    if whole.data_ptr() != bucket[0].data_ptr():
        parts = whole.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.detach().copy_(part.view(tensor.shape))


def numbers_of(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What was measured on the parts of a batch, as numbers of the whole batch."""
    if size() == 1:
        return {name: float(value) for name, value in metrics.items()}
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Deviation):
            values = value.values.detach().double()
            sums = torch.stack([values.sum(), values.square().sum()])
            average([sums])
            n, total = values.numel() * size(), sums * size()
            found[name] = float(((total[1] - total[0] ** 2 / n) / (n - 1)).sqrt())
        else:
            mean = torch.as_tensor(value).detach().double()
            average([mean])
            found[name] = float(mean)
    return found


def any_of(flag: bool) -> bool:
    """Whether it holds in any of the processes; all ask at the same step, and get the same answer."""
    if size() == 1:
        return flag
    found = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def on_main(make: Callable[[], Told]) -> Told:
    """Call `make` in the main process alone; all get what it returned, which must be of JSON types.

    Raises:
            What `make` raised, in every process; there an OSError is a RunError.
    """
    if size() == 1:
        return make()
    kinds = {"usage": UsageError, "config": ConfigError, "run": RunError}
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if is_main():
        try:
            answer = {"value": make()}
        except (UsageError, RunError, OSError) as error:
            failure = error
            name = "config" if isinstance(error, ConfigError) else "usage"
            answer = {"kind": name if isinstance(error, UsageError) else "run", "message": str(error)}
    answer = json.loads(_from_main(json.dumps(answer).encode()))
    if failure is not None:
        raise failure
    if "kind" in answer:
        raise kinds[answer["kind"]](answer["message"])
    return answer["value"]


def tensors_on_main(make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As `on_main`, for tensors by name; they arrive on the CPU."""
    if size() == 1:
        return dict(make())
    made: dict[str, Tensor] = {}

    def describe() -> list[list[Any]]:
        made.update(make())
        return [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in made.items()]

    found = {}
    for name, dtype, shape in on_main(describe):
        tensor = (
            made[name].detach().cpu().contiguous()
            if is_main()
            else torch.empty(shape, dtype=getattr(torch, dtype))
        )
        if tensor.numel():
            dist.broadcast(tensor, 0)
        found[name] = tensor
    return found


def check_same(what: str, value: str) -> None:
    """Refuse to go on where processes start from different things.

    Args:
        what: those things, as in "the settings or the data".
        value: anything that tells them apart.

    Raises:
        RunError: naming a process that differs from the first.
    """
    if size() == 1:
        return
    digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest())
    mine = torch.tensor([digest])
    all_of_them = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(all_of_them, mine)
    other = next((i for i, found in enumerate(all_of_them) if int(found) != int(all_of_them[0])), None)
    if other is not None:
        raise RunError(
            f"process {other} has not the same as process 0 in {what}; give all of them the same files and "
            "command"
        )


def wait() -> None:
    """Until all processes have come here."""
    if size() > 1:
        dist.barrier()


class Split(Wrapper):
    """Another denoiser, whose batches are cut into parts, one for each process, and put together again.

    All processes must call it, with the same arguments: what a sampler does, whose noise is that of all rows.
    """

    @torch.no_grad()
    def forward(self, z: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, …), the same in every process."""
        length = -(-len(z) // size())
        rows = torch.arange(rank() * length, (rank() + 1) * length, device=z.device).clamp(max=len(z) - 1)
        own = self.denoiser(z[rows], logsnr[rows], cond_rows(cond, rows)).contiguous()
        parts = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)[: len(z)]

    def fitting(self, count: int) -> int:
        """As many as each process can take a part of."""
        least = torch.tensor([count])
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least) * size()


def split(model: Held) -> Held:
    """The same model, whose sampling all processes share; the model itself in a single one."""
    if size() == 1:
        return model
    return replace(model, denoiser=Split(model.denoiser))


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Refuse a minibatch that the processes cannot share equally, each in so many parts.

    Raises:
        ConfigError: naming both numbers.
    """
    if batch_size % (size() * accumulate):
        raise ConfigError(
            f"train.batch_size is {batch_size}, of all {size()} processes together; make it a multiple of "
            f"{size() * accumulate}"
        )


def check_source(config: DistillConfig) -> None:
    """Refuse rollouts whose noise depends on which rows other processes choose.

    Raises:
        ConfigError: naming the remedy.
    """
    if size() > 1 and config.source == "rollout" and config.train.noise_slices == 1:
        raise ConfigError(
            "source is 'rollout' and train.noise_slices is 1, whose numbers are those of one process alone; "
            f"set train.noise_slices to {size()}"
        )


def _from_main(message: bytes) -> bytes:
    length = torch.tensor([len(message)])
    dist.broadcast(length, 0)
    data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    if not is_main():
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.numpy().tobytes())
