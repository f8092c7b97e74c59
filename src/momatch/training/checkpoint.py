"""Checkpoints: one safetensors file each, written whole or not at all.

A file is written under a temporary name, forced to disk and renamed, so at every moment the newest complete
checkpoint survives whatever happens. It holds the weights of every role, the state of every optimizer, and a
fingerprint of both, by which damage on the disk is noticed: the checkpoint before is then taken. There is no
random state to keep, since all randomness is a function of (seed, step).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from momatch.training import distributed, sharding
from momatch.training.optim import RoleOptimizer
from momatch.utils.errors import Notice, UsageError
from momatch.utils.files import DamagedFileError, read_tensors, write_tensors
from momatch.utils.run_folder import make_inside

FORMAT = "momatch-checkpoint-1"


class CheckpointError(UsageError):
    """A checkpoint that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps done, and pictures seen in them."""

    step: int = 0
    images_seen: int = 0


@dataclass(frozen=True)
class State:
    """All that a run has learned.

    Attributes:
        networks: what learns, by role.
        optimizers: of each role.
        kept: what else has to be kept, by name, without an optimizer.
    """

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, RoleOptimizer]
    kept: Mapping[str, nn.Module] = field(default_factory=dict)


def save(directory: Path, progress: Progress, state: State, keep: int = 2) -> None:
    """Write `directory/step-00001234.safetensors` and drop all but the newest `keep`.

    All processes must call it, and the main one writes.

    Raises:
        OSError: if it cannot be written; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    for role, network in state.networks.items():
        tensors |= _tensors(role, network, state.optimizers[role])
    for name, module in state.kept.items():
        tensors |= _copies(module.state_dict(prefix=f"kept.{name}."))
    distributed.on_main(lambda: _write(directory, progress, tensors, keep))


def _write(directory: Path, progress: Progress, tensors: dict[str, Tensor], keep: int) -> None:
    make_inside(directory)
    path = directory / f"step-{progress.step:08d}.safetensors"
    write_tensors(path, tensors, format=FORMAT, progress=json.dumps(vars(progress)))
    for old in paths(directory)[:-keep]:
        old.unlink()


def paths(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    return sorted(directory.glob("step-*.safetensors"))


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in `directory`; 0 without any."""
    return max((int(path.stem.removeprefix("step-")) for path in paths(directory)), default=0)


def restore(directory: Path, state: State) -> Progress:
    """Load the newest checkpoint that is whole into `state`, in place; without any, start afresh.

    The main process reads, and tells the others.

    Raises:
        CheckpointError: if there are checkpoints, but none is whole, or the newest whole one is of other
            networks; nothing is loaded then.
    """
    found: list[_File] = []

    def read() -> list[str]:
        found.extend(_newest_whole(directory))
        return [str(found[0].path), json.dumps(vars(found[0].progress)), found[0].remedy] if found else []

    told = distributed.on_main(read)
    if not told:
        return Progress()
    path, progress, remedy = told[0], Progress(**json.loads(told[1])), told[2]
    tensors = distributed.tensors_on_main(lambda: found[0].tensors)
    shapes = {key: value.shape for key, value in tensors.items()}
    wanted: dict[str, torch.Size] = {}
    begun = False
    for role, network in state.networks.items():
        wanted |= {key: value.shape for key, value in network.state_dict(prefix=f"{role}.").items()}
        moments = _moment_shapes(role, network, state.optimizers[role])
        if shapes.keys() & moments.keys():  # a role that has not learned yet has none
            wanted, begun = wanted | moments, True
    for name, module in state.kept.items():
        wanted |= {key: value.shape for key, value in module.state_dict(prefix=f"kept.{name}.").items()}
    if {key: shapes.get(key) for key in wanted} != wanted or begun != (progress.step > 0):
        raise CheckpointError(f"checkpoint {path} belongs to networks of another shape; {remedy}")
    if not all(bool(tensors[key].isfinite().all()) for key in wanted):
        raise CheckpointError(f"checkpoint {path} holds values that are not finite; {remedy}")
    for role, network in state.networks.items():
        sharding.load(network, _part(tensors, f"{role}."))
        state.optimizers[role].load_state(_part(tensors, f"optimizer.{role}."))
    for name, module in state.kept.items():
        sharding.load(module, _part(tensors, f"kept.{name}."))
    return progress


@dataclass(frozen=True)
class _File:
    """What a whole checkpoint file holds, and what to do where it does not fit the run."""

    path: Path
    progress: Progress
    tensors: dict[str, Tensor]
    remedy: str


def _newest_whole(directory: Path) -> list[_File]:
    """The newest checkpoint that is not damaged; none if there are no checkpoints."""
    existing = paths(directory)
    damage: list[str] = []
    for i, path in reversed(list(enumerate(existing))):
        remedy = "delete it to go on from the one before" if i else "delete it to start again"
        try:
            file = _read(path, remedy)
        except _DamageError as error:
            damage.append(f"checkpoint {path} is damaged ({error})")
            continue
        if damage:
            warnings.warn(
                f"{'; '.join(damage)}; going on from {path.name}, the last good one", Notice, stacklevel=2
            )
        return [file]
    if damage:
        raise CheckpointError(
            f"{'; '.join(damage)}; delete {'it' if len(damage) == 1 else 'them'} to start again"
        )
    return []


class _DamageError(Exception):
    """What is wrong with a file, in a few words."""


def _read(path: Path, remedy: str) -> _File:
    try:
        tensors, metadata = read_tensors(path)
    except DamagedFileError as error:
        raise _DamageError(error.reason) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program; {remedy}")
    try:
        progress = Progress(**json.loads(metadata["progress"]))
    except (KeyError, TypeError, ValueError):
        raise _DamageError("it does not say how far it is") from None
    if f"step-{progress.step:08d}" != path.stem:  # the fingerprint is of the tensors alone
        raise _DamageError(f"it says step {progress.step}, unlike its name")
    return _File(path, progress, tensors, remedy)


def second_moments(directory: Path, role: str, beta2: float) -> dict[str, Tensor]:
    """Adam's bias-corrected second moments v̂ of every parameter of `role`, from the newest checkpoint."""
    with safe_open(paths(directory)[-1], framework="pt") as file:
        prefix, suffix = f"optimizer.{role}.", ".exp_avg_sq"
        correction = 1 - beta2 ** float(file.get_tensor(f"{prefix}step"))
        names = [k.removeprefix(prefix).removesuffix(suffix) for k in file.keys() if k.endswith(suffix)]  # noqa: SIM118
        return {name: file.get_tensor(f"{prefix}{name}{suffix}") / correction for name in names}


def _tensors(role: str, network: nn.Module, optimizer: RoleOptimizer) -> dict[str, Tensor]:
    state = {f"optimizer.{role}.{key}": value for key, value in optimizer.state().items()}
    return _copies(state | network.state_dict(prefix=f"{role}."))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since safetensors refuses tensors that share memory; for the main process, which writes."""
    found = {}
    for key, value in tensors.items():
        gathered = sharding.whole(value)  # which needs all processes
        if distributed.is_main():
            found[key] = gathered.clone(memory_format=torch.contiguous_format)
    return found


def _moment_shapes(role: str, network: nn.Module, optimizer: RoleOptimizer) -> dict[str, torch.Size]:
    """Names and shapes of the optimizer state of a role that has begun to learn."""
    moments = {
        f"optimizer.{role}.{name}.{key}": parameter.shape
        for name, parameter in network.named_parameters()
        for key in optimizer.moments
    }
    return {f"optimizer.{role}.step": torch.Size([]), **moments}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is named PREFIX…, without the prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
