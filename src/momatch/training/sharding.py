"""Networks cut over processes (FSDP2), where weights, gradients and optimizer state do not fit one GPU.

Every process keeps an equal part of each tensor. A block's weights are gathered when it runs, and let go of
after; gradients are averaged and cut as they arise. On several machines the parts lie within each machine,
which hold copies of each other (hybrid sharding), so that only gradients pass between machines.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from momatch.config.schema import DistillConfig, RunConfig
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.denoiser import Wrapper as DenoiserWrapper
from momatch.methods.base import Method
from momatch.models.model import Model
from momatch.networks import registry
from momatch.training import distributed
from momatch.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

SHARE = 0.6  # of a GPU's memory that weights and what belongs to them may take; the rest is for activations


def wanted(config: RunConfig, teacher: nn.Module, learning: int) -> bool:
    """Whether a run is to be sharded, as it says, or, if it leaves that open, because it does not fit a GPU.

    Args:
        config: of the run.
        teacher: its network, or the one of its size.
        learning: how many networks of that size learn.

    Raises:
        ConfigError: if the run does something that sharded networks cannot.
    """
    if distributed.size() == 1 or config.parallel == "ddp":
        return False
    if config.parallel == "auto":
        device = next(teacher.parameters()).device
        if device.type != "cuda":
            return False
        frozen = 1 + config.method.teacher_copies if isinstance(config, DistillConfig) else 0
        learned = 4 if config.optim.beta1 else 3  # the weight itself, its gradient, Adam's moments
        numbers = (learning * learned + frozen) * sum(p.numel() for p in teacher.parameters())
        if 4 * numbers <= SHARE * torch.cuda.get_device_properties(device).total_memory:
            return False
    if isinstance(config, DistillConfig):
        _check(config)
    return True


def _check(config: DistillConfig) -> None:
    how = (
        f"parallel={config.parallel}" if config.parallel == "fsdp" else "these networks, too large for a GPU,"
    )
    if config.adapter.rank:
        raise ConfigError(
            f"{how} cannot share weights with an adapter; use --adapter.rank 0 or --parallel ddp"
        )
    if config.source == "rollout":
        raise ConfigError(f"{how} cannot make rollouts; use --source data or --parallel ddp")


def networks_of(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The networks inside denoisers, each once."""
    found: dict[int, nn.Module] = {}
    for module in modules:
        for part in module.modules():
            if isinstance(part, Denoiser) and not isinstance(part, DenoiserWrapper):
                found.setdefault(id(part.network), part.network)
    return iter(found.values())


def shard(method: Method) -> None:
    """Cut all networks of a method over the processes; in place, before there is any optimizer."""
    from torch.distributed.fsdp import fully_shard

    held = [*method.trainable.values(), *method.kept.values(), *method.frozen.values()]
    for network in networks_of(held):
        mesh = _mesh(next(network.parameters()).device.type)
        for parameter in network.parameters():  # FSDP2 takes no other memory format
            parameter.data = parameter.data.contiguous()
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _mesh(device_type: str) -> DeviceMesh:
    """All processes, or machines × the processes of each."""
    from torch.distributed.device_mesh import init_device_mesh

    local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.size()))
    if local == distributed.size():
        return init_device_mesh(device_type, (local,))
    shape = distributed.size() // local, local
    return init_device_mesh(device_type, shape, mesh_dim_names=("machines", "processes"))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: the outermost modules in lists; the rest is gathered with the network."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)


def _is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")  # not isinstance: importing DTensor takes a second


def is_sharded(network: nn.Module) -> bool:
    """Whether its weights are cut over processes."""
    return any(_is_cut(parameter) for parameter in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered on the CPU if it is cut; all processes must ask."""
    return tensor.full_tensor().cpu() if _is_cut(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process' part of a whole tensor, cut as `like` is, if it is; on its device."""
    tensor = tensor.to(like.device)
    if not _is_cut(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors, into a module that may be cut."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    for name, value in module.state_dict().items():
        value.copy_(part_of(state[name], value))


def gathered(model: Model) -> Model:
    """The model with a whole network of its own, on the CPU; itself if it is not cut. All must ask."""
    if not is_sharded(model.denoiser):
        return model
    state = {name: whole(value) for name, value in model.denoiser.unwrapped.network.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        network = registry.build(model.network)
    network.load_state_dict(state)
    denoiser = copy.copy(model.denoiser.unwrapped)
    denoiser._modules = {"network": network}  # a copy shares its modules
    return replace(model, denoiser=denoiser)
