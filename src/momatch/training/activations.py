"""Activation checkpointing: a block keeps its input alone, and runs again for its backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

from momatch.networks import mlp, unet, uvit
from momatch.utils.errors import ConfigError

BLOCKS = (  # of momatch's own networks; diffusers' know theirs
    mlp.ResidualBlock,
    unet.ResidualBlock,
    unet.SelfAttention,
    uvit.TransformerBlock,
)


@contextlib.contextmanager
def checkpointed(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the blocks of these networks recompute their activations; numbers stay the same.

    Raises:
        ConfigError: for a network whose blocks are not known.
    """
    blocks = []
    theirs = []
    for network in networks:
        own = [module for module in network.modules() if isinstance(module, BLOCKS)]
        foreign = [m for m in network.modules() if getattr(m, "_supports_gradient_checkpointing", False)]
        if not own and not foreign:
            raise ConfigError(
                "train.checkpointing is on, but this network's blocks are not known; switch it off, or let "
                "the network checkpoint itself"
            )
        blocks += own
        theirs += foreign
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for module in theirs:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again
        for module in theirs:
            module.disable_gradient_checkpointing()
