"""Which settings make a run fit the memory of its GPUs, and what each takes of it.

Weights, gradients and optimizer state take what they take, or a part of it where they are cut over GPUs. All
else is linear in the images that a GPU works on at a time; two plans give both coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from momatch.config.schema import DistillConfig, RunConfig, TeacherConfig
from momatch.training.plan import Plan
from momatch.utils.errors import ConfigError
from momatch.utils.text import count_of, format_bytes

USUAL_PART = 8  # images at a time below which a GPU is badly used: activations are computed again first
RECOMPUTED = 4 / 3  # time of a step with activations computed again: forward 1, backward 2, forward 1 more
SHARE = 0.9  # of the memory; the rest is for kernels' own workspace and for what the allocator cannot use

Config = TypeVar("Config", TeacherConfig, DistillConfig)


@dataclass(frozen=True)
class Choice:
    """Settings that leave the numbers as they are, and what a run needs with them.

    Attributes:
        parallel: "fsdp" cuts weights and all that belongs to them over the GPUs.
        accumulate: see `TrainConfig`.
        checkpointing: see `TrainConfig`.
        part: images that a GPU works on at a time.
        memory: of a GPU, in bytes, at the peak of a step.
        time: of a step, as a multiple of that without checkpointing.
    """

    parallel: Literal["ddp", "fsdp"]
    accumulate: int
    checkpointing: bool
    part: int
    memory: int
    time: float

    def apply(self, config: Config) -> Config:
        """The config with these settings."""
        train = replace(config.train, accumulate=self.accumulate, checkpointing=self.checkpointing)
        parallel = "fsdp" if self.parallel == "fsdp" else config.parallel
        return replace(config, train=train, parallel=parallel)

    def options(self) -> str:
        """As words of a command line; empty if it is what runs are by themselves."""
        words = ["--parallel fsdp"] if self.parallel == "fsdp" else []
        words += [f"--train.accumulate {self.accumulate}"] if self.accumulate > 1 else []
        words += ["--train.checkpointing"] if self.checkpointing else []
        return " ".join(words)


def choices(config: RunConfig, plan: Callable[[RunConfig], Plan], gpus: int = 1) -> Iterator[Choice]:
    """What can be tried, the quickest first; each takes less memory than most before it.

    Args:
        config: the run.
        plan: what a config needs on one GPU, its whole minibatch at a time.
        gpus: how many share each minibatch.

    Raises:
        ConfigError: if they cannot share it equally.
    """
    batch = config.train.batch_size
    if batch % gpus:
        raise ConfigError(f"train.batch_size is {batch}, for {gpus} GPUs; make it a multiple of {gpus}")
    parts = [batch // gpus] if config.method.whole_batch else _halvings(batch // gpus)
    wide, narrow = [size for size in parts if size >= USUAL_PART], [s for s in parts if s < USUAL_PART]
    needs = {lean: _Linear(config, plan, lean) for lean in (False, True)}
    for parallel in ("ddp", "fsdp") if gpus > 1 and _can_be_cut(config) else ("ddp",):
        tries = [*((False, s) for s in wide), *((True, s) for s in (*wide, *narrow))]
        tries = tries or [(False, parts[0]), *((True, s) for s in parts)]
        for checkpointing, part in tries:
            memory = needs[checkpointing].memory(part, gpus if parallel == "fsdp" else 1)
            time = RECOMPUTED if checkpointing else 1.0
            yield Choice(parallel, batch // gpus // part, checkpointing, part, memory, time)


def first_that_fits(found: Sequence[Choice], memory: int) -> Choice:
    """The first that leaves a tenth of `memory`, in bytes, free.

    Raises:
        ConfigError: if none does.
    """
    for choice in found:
        if choice.memory <= SHARE * memory:
            return choice
    least = min(found, key=lambda choice: choice.memory)
    raise ConfigError(
        f"this does not fit {format_bytes(memory)}: with {least.options() or 'nothing to save it'} and "
        f"{count_of(least.part, 'image')} at a time it takes {format_bytes(least.memory)}, and a tenth is to "
        "stay free; use more GPUs (--parallel fsdp cuts all weights over them), adapters (--adapter.rank 16) "
        "or a smaller network"
    )


class _Linear:
    """Memory as a function of the images at a time, measured at two sizes when first asked for."""

    def __init__(self, config: RunConfig, plan: Callable[[RunConfig], Plan], checkpointing: bool):
        self.config, self.plan, self.checkpointing = config, plan, checkpointing
        self.found: tuple[Plan, Plan] | None = None

    def memory(self, part: int, cut: int) -> int:
        """With `part` images at a time, weights cut over so many GPUs."""
        if self.found is None:
            size = min(self.config.train.batch_size, 2 * USUAL_PART)
            self.found = self._planned(size), self._planned(max(1, size // 2))
        large, small = self.found
        weights = sum(network.memory for network in large.networks)
        if cut > 1:  # and the largest network's own are gathered, at the most
            weights = weights // cut + max(network.weights for network in large.networks)
        others = [each.activations + each.workspace for each in (large, small)]
        step = (others[0] - others[1]) / max(large.batch_size - small.batch_size, 1)
        return int(weights + max(others[1] + step * (part - small.batch_size), 0))

    def _planned(self, batch: int) -> Plan:
        train = replace(
            self.config.train,
            batch_size=batch,
            checkpointing=self.checkpointing,
            accumulate=1,
            noise_slices=1,
        )
        return self.plan(replace(self.config, train=train))


def _halvings(size: int) -> list[int]:
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def _can_be_cut(config: RunConfig) -> bool:
    return not isinstance(config, DistillConfig) or not (config.adapter.rank or config.source == "rollout")
