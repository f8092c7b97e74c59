"""Adam as the paper sets it, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from momatch.config.schema import OptimConfig
from momatch.training import sharding


def learning_rate_schedule(
    config: OptimConfig, step: int, num_steps: int, extended_at: tuple[int, ...] = ()
) -> float:
    """Rate at `step` (0-based) of `num_steps`: linear up to the peak, then linear down to 0.

    The warm-up takes no more than half of the run. A run that was made longer begins anew at each of its
    former ends, `extended_at`.
    """
    begin = max((end for end in extended_at if end <= step), default=0)
    end = min((end for end in extended_at if end > step), default=num_steps)
    step, num_steps = step - begin, end - begin
    warmup = max(min(config.warmup_steps, num_steps // 2), 1)
    rise = (step + 1) / warmup
    fall = (num_steps - step) / max(num_steps - warmup, 1)
    return config.learning_rate * min(rise, fall, 1.0)


def moments_kept(config: OptimConfig) -> int:
    """How many moments Adam keeps for every parameter: with β₁ = 0 the first is the gradient itself."""
    return 2 if config.beta1 else 1


class RoleOptimizer(Protocol):
    """What the loop and checkpoints ask of the optimizer of one role; see `Optimizer`."""

    config: OptimConfig

    @property
    def gradients(self) -> list[Tensor]:
        """What has to be averaged over processes after `backward`."""
        ...

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that Adam keeps for every parameter, by torch's names."""
        ...

    def skip_where(self, failed: Tensor) -> None:
        """From now on a step changes nothing where this scalar is 1."""
        ...

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        ...

    def clip(self) -> Tensor:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before, ()."""
        ...

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the steps to come."""
        ...

    def step(self) -> None:
        """One step of Adam."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Adam's state; empty before the first step."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        ...


class Optimizer:
    """torch's Adam over one network, whose parameters it first moves into a single buffer.

    The network's parameters become views of one flat tensor, their gradients views of another. Zeroing,
    clipping and Adam are then one kernel each instead of one per parameter, which for small networks is most
    of their cost.

    On a GPU nothing here waits for the device, so that a whole update can be recorded and replayed: the norm
    stays a tensor, the clip multiplies by 1 where there is nothing to clip, the rate is read from the device.

    Args:
        network: float parameters of one dtype on one device; each stays the same Parameter object, in its own
            memory format.
        config: Adam's settings and the clip.
        waits: whether it may look at values, and so wait for the device; None: on a CPU, where that is free.
    """

    def __init__(self, network: nn.Module, config: OptimConfig, waits: bool | None = None):
        self.config = config
        self.parameters = dict(network.named_parameters())
        values = list(self.parameters.values())
        dtype, self.device = values[0].dtype, values[0].device
        self.flat = nn.Parameter(torch.empty(sum(p.numel() for p in values), dtype=dtype, device=self.device))
        self.gradient = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        self.waits = self.device.type == "cpu" if waits is None else waits
        rate = config.learning_rate
        self.adam = torch.optim.Adam(
            [self.flat],
            lr=rate if self.waits else torch.tensor(rate, device=self.device),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
            capturable=not self.waits,
        )
        self._begin(torch.zeros((), device=self.device))
        weights, gradients = self._views(self.flat), self._views(self.gradient)
        for name, parameter in self.parameters.items():
            weights[name].copy_(parameter.detach())
            parameter.data, parameter.grad = weights[name], gradients[name]

    def _begin(self, step: Tensor) -> None:
        """Adam's state with moments of 0.

        With β₁ = 0 the first moment is the gradient itself. Adam is then given the gradient's buffer for it,
        and writes there what stands there already: bit-identical to a moment of its own, without the memory.
        """
        first = torch.zeros_like(self.flat) if self.config.beta1 else self.gradient
        second = torch.zeros_like(self.flat)
        self.adam.state[self.flat] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    @property
    def gradients(self) -> list[Tensor]:
        """All that `backward` fills, as few tensors as there are."""
        return [self.gradient]

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that Adam keeps for every parameter, by torch's names."""
        return ("exp_avg", "exp_avg_sq")[-moments_kept(self.config) :]

    def skip_where(self, failed: Tensor) -> None:
        """From now on a step changes nothing where this scalar is 1, which is looked at on the device."""
        self.adam.found_inf = failed  # pyright: ignore[reportAttributeAccessIssue] (for torch's GradScaler)

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        self.gradient.zero_()

    def clip(self) -> Tensor:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before, ()."""
        norm, most = torch.linalg.vector_norm(self.gradient), self.config.clip_norm
        if not self.waits:
            self.gradient.mul_((most / norm.double()).clamp(max=1))
        elif norm > most:  # a pass over the gradient saved
            self.gradient.mul_(most / float(norm))
        return norm

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the steps to come."""
        group = self.adam.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def step(self) -> None:
        """One step of Adam."""
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Adam's state: "NAME.exp_avg_sq", "NAME.exp_avg" unless β₁ = 0, and one "step".

        Empty before the first step.
        """
        state = self.adam.state[self.flat]
        if state["step"] == 0:
            return {}
        moments = {
            f"{name}.{key}": view for key in self.moments for name, view in self._views(state[key]).items()
        }
        return {"step": state["step"], **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: if a parameter's moments are missing.
        """
        if not state:
            return
        self._begin(state["step"].clone().to(self.device))
        for key in self.moments:
            for name, view in self._views(self.adam.state[self.flat][key]).items():
                view.copy_(state[f"{name}.{key}"])

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
    a checkpoint does not depend on how a run was spread; all processes must ask for it. The norm is waited
    for, at every step.

    Args:
        network: see `momatch.training.sharding`.
        config: Adam's settings and the clip.
    """

    def __init__(self, network: nn.Module, config: OptimConfig):
        self.config = config
        self.parameters = dict(network.named_parameters())
        self.adam = torch.optim.Adam(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for parameter in self.parameters.values():  # one without a gradient is to be treated as with a zero
            parameter.grad = torch.zeros_like(parameter)
        self._begin(torch.zeros(()))

    def _begin(self, step: Tensor) -> None:
        """As `Optimizer`'s."""
        for p in self.parameters.values():
            first = torch.zeros_like(p) if self.config.beta1 else p.grad
            moments = {"exp_avg": first, "exp_avg_sq": torch.zeros_like(p)}
            self.adam.state[p] = {"step": step.clone().to(p.device), **moments}

    @property
    def gradients(self) -> list[Tensor]:
        """None: they are averaged already."""
        return []

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that Adam keeps for every parameter, by torch's names."""
        return ("exp_avg", "exp_avg_sq")[-moments_kept(self.config) :]

    def skip_where(self, failed: Tensor) -> None:
        """Not for networks cut over processes, whose gradients are looked at in every step."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Zero all gradients, in place."""
        self.adam.zero_grad(set_to_none=False)

    def clip(self) -> Tensor:
        """Scale the gradient to a global norm of at most `config.clip_norm`; returns the norm before, ()."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = sharding.whole(nn.utils.get_total_norm(gradients))
        if norm > self.config.clip_norm:
            for gradient in gradients:
                gradient.mul_(self.config.clip_norm / float(norm))
        return norm

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the steps to come."""
        self.adam.param_groups[0]["lr"] = rate

    def step(self) -> None:
        """One step of Adam."""
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer`'s."""
        state = {name: self.adam.state[p] for name, p in self.parameters.items()}
        step = next(iter(state.values()))["step"]
        if step == 0:
            return {}
        whole = {f"{n}.{key}": sharding.whole(s[key]) for n, s in state.items() for key in self.moments}
        return {"step": step, **whole}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Optimizer`'s.

        Raises:
            KeyError: if a parameter's moments are missing.
        """
        if not state:
            return
        self._begin(state["step"])
        for name, p in self.parameters.items():
            for key in self.moments:
                self.adam.state[p][key].copy_(sharding.part_of(state[f"{name}.{key}"], p))


def optimizer_of(network: nn.Module, config: OptimConfig) -> RoleOptimizer:
    """The optimizer for a network, cut over processes or not."""
    return (ShardedOptimizer if sharding.is_sharded(network) else Optimizer)(network, config)
