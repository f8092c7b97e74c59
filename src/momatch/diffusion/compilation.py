"""How networks run on a device: operation by operation, compiled, or recorded and replayed."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import nn

from momatch.diffusion.denoiser import Denoiser
from momatch.utils.errors import UsageError

Compile = Literal["none", "default", "graph", "auto"]
LARGE = 50_000_000  # parameters in all from which a step is bound by arithmetic, not by launching

Module = TypeVar("Module", bound=nn.Module)


def resolved(how: Compile, device: torch.device, parameters: int) -> Compile:
    """What "auto" means here, and whether the device can do what was asked for.

    Args:
        how: as in `TrainConfig.compile`.
        device: where the networks are.
        parameters: of all of them together.

    Raises:
        UsageError: for graphs without a CUDA GPU.
    """
    cuda = device.type == "cuda"
    if how == "auto":
        return ("default" if parameters > LARGE else "graph") if cuda else "none"
    if how == "graph" and not cuda:
        raise UsageError(
            f"compile is 'graph', which records CUDA graphs; on {device.type} use none, or default "
            "(torch.compile)"
        )
    return how


def compiled(module: Module, mode: str = "default") -> Module:
    """The same module, its network compiled by torch.compile at its first call; names of weights stay.

    What stands around a network, in float64 or with a clock of its own, is little and is left as it is.
    """
    network = module.unwrapped.network if isinstance(module, Denoiser) else module
    network.compile(mode=mode)
    return module
