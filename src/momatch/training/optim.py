"""Adam as the paper sets it, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.training import sharding


def learning_rate_schedule(config: OptimConfig, step: int, train: TrainConfig) -> float:
    """Rate at `step` (0-based) of the run: linear up to the peak, then linear down to 0 at its end.

    The warm-up takes no more than half of the run. A run that was made longer does so anew after each of its
    former ends.
    """
    begin = max((end for end in train.extended_at if end <= step), default=0)
    end = min((end for end in train.extended_at if end > step), default=train.num_steps)
    step, num_steps = step - begin, end - begin
    warmup = max(min(config.warmup_steps, num_steps // 2), 1)
    rise = (step + 1) / warmup
    fall = (num_steps - step) / max(num_steps - warmup, 1)
    return config.learning_rate * min(rise, fall, 1.0)


class RoleOptimizer(Protocol):
    """What the loop and checkpoints ask of the optimizer of one role."""

    config: OptimConfig

    @property
    def gradients(self) -> list[Tensor]:
        """What has to be averaged over processes after `backward`."""
        ...

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        ...

    def clip(self) -> float:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before."""
        ...

    def step(self, learning_rate: float) -> None:
        """One step at the given rate."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Adam's state: "NAME.exp_avg", "NAME.exp_avg_sq" and one "step"; empty before the first step."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        ...


class Optimizer:
    """torch's Adam over one network, whose parameters it first moves into a single buffer.

    The network's parameters become views of one flat tensor, their gradients views of another. Zeroing,
    clipping and Adam are then one kernel each instead of one per parameter, which for small networks is most
    of their cost.

    Args:
        network: float parameters of one dtype on one device; each stays the same Parameter object, in its own
            memory format.
        config: Adam's settings and the clip.
    """

    def __init__(self, network: nn.Module, config: OptimConfig):
        self.config = config
        self.parameters = dict(network.named_parameters())
        values = list(self.parameters.values())
        self.flat = nn.Parameter(
            torch.empty(sum(p.numel() for p in values), dtype=values[0].dtype, device=values[0].device)
        )
        self.gradient = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.Adam(
            [self.flat], lr=config.learning_rate, betas=betas, eps=config.eps, fused=True
        )
        weights, gradients = self._views(self.flat), self._views(self.gradient)
        for name, parameter in self.parameters.items():
            weights[name].copy_(parameter.detach())
            parameter.data, parameter.grad = weights[name], gradients[name]

    @property
    def gradients(self) -> list[Tensor]:
        """All that `backward` fills, as few tensors as there are."""
        return [self.gradient]

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        self.gradient.zero_()

    def clip(self) -> float:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.gradient))
        if norm > self.config.clip_norm:
            self.gradient.mul_(self.config.clip_norm / norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One step of Adam at the given rate."""
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Adam's state: "NAME.exp_avg", "NAME.exp_avg_sq" and one "step"; empty before the first step."""
        state = self.adam.state.get(self.flat)
        if not state:
            return {}
        moments = {
            f"{name}.{key}": view
            for key in ("exp_avg", "exp_avg_sq")
            for name, view in self._views(state[key]).items()
        }
        return {"step": state["step"], **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: if a parameter's moments are missing.
        """
        if not state:
            return
        moments = {key: torch.zeros_like(self.flat) for key in ("exp_avg", "exp_avg_sq")}
        for key, flat in moments.items():
            for name, view in self._views(flat).items():
                view.copy_(state[f"{name}.{key}"])
        self.adam.state[self.flat] = {"step": state["step"].clone().to(self.flat.device), **moments}

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat tensor that belong to each parameter, in its shape and strides."""
        views, offset = {}, 0
        for name, parameter in self.parameters.items():
            views[name] = flat.detach().as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        return views


class ShardedOptimizer:
    """torch's Adam over a network that is cut over processes, each parameter by itself: a part of every one.

    Gradients are averaged as they arise (FSDP2). State goes in and out whole, as that of `Optimizer`, so that
    a checkpoint does not depend on how a run was spread; all processes must ask for it.

    Args:
        network: see `momatch.training.sharding`.
        config: Adam's settings and the clip.
    """

    def __init__(self, network: nn.Module, config: OptimConfig):
        self.config = config
        self.parameters = dict(network.named_parameters())
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate, betas=betas, eps=config.eps, fused=True
        )
        for parameter in self.parameters.values():  # one without a gradient is to be treated as with a zero
            parameter.grad = torch.zeros_like(parameter)

    @property
    def gradients(self) -> list[Tensor]:
        """None: they are averaged already."""
        return []

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        self.adam.zero_grad(set_to_none=False)

    def clip(self) -> float:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(sharding.whole(nn.utils.get_total_norm(gradients)))
        if norm > self.config.clip_norm:
            for gradient in gradients:
                gradient.mul_(self.config.clip_norm / norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One step of Adam at the given rate."""
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer`'s."""
        state = {name: self.adam.state.get(p) for name, p in self.parameters.items()}
        found = {}
        for key in ("exp_avg", "exp_avg_sq"):
            found |= {f"{name}.{key}": sharding.whole(each[key]) for name, each in state.items() if each}
        steps = [each["step"] for each in state.values() if each]
        return {"step": sharding.whole(steps[0]), **found} if steps else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Optimizer`'s.

        Raises:
            KeyError: if a parameter's moments are missing.
        """
        if not state:
            return
        for name, parameter in self.parameters.items():
            moments = {
                key: sharding.part_of(state[f"{name}.{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")
            }
            self.adam.state[parameter] = {"step": state["step"].clone().to(parameter.device), **moments}


def optimizer_of(network: nn.Module, config: OptimConfig) -> RoleOptimizer:
    """The optimizer for a network, cut over processes or not."""
    return (ShardedOptimizer if sharding.is_sharded(network) else Optimizer)(network, config)
