"""Adam as the paper sets it, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from momatch.config.schema import OptimConfig


def learning_rate_schedule(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate at `step` (0-based) of `num_steps`: linear up to the peak, then linear down to 0.

    The warm-up takes no more than half of the run.
    """
    warmup = max(min(config.warmup_steps, num_steps // 2), 1)
    rise = (step + 1) / warmup
    fall = (num_steps - step) / max(num_steps - warmup, 1)
    return config.learning_rate * min(rise, fall, 1.0)


def moments_kept(config: OptimConfig) -> int:
    """How many moments Adam keeps for every parameter: with β₁ = 0 the first is the gradient itself."""
    return 2 if config.beta1 else 1


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
