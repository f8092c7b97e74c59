"""The sampler of a student distilled by moment matching, in the form that diffusers pipelines call.

This file needs torch and diffusers alone: it travels with every exported student.

At each of its k network calls the student returns x̃, and the next z is drawn from q(z_s | z_t, x̃), the
posterior of the Gaussian process (Algorithm 1 of "Multistep Distillation of Diffusion Models via Moment
Matching", Salimans et al., NeurIPS 2024). The last x̃ is the sample; no noise comes after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class MomentMatchingSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: (B, …) z_s, what the network is to see next; after the last call the finished sample.
        pred_original_sample: (B, …) x̃.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MomentMatchingScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling on the few noise levels that a student was trained for.

    Args:
        logsnrs: log(α²/σ²) at each of the k network calls, the noisiest first.
        native_timesteps: what the network is told at each of them.
        prediction_type: what the network returns: "x", "eps", "v", "flow" (ε − x), "edm", "score" (−ε over
            its timestep), or "-" and one of them: that with the other sign.
        space: what the pipeline's sample is: "vp" α x + σ ε with α² + σ² = 1, "flow" (1 − t) x + t ε, or
            "edm" x + ς ε; "ve" is "vp", but the network sees x + ς ε, x in data_range.
        sigma_data: of EDM's preconditioning.
        clip: x̃ is kept in ± this; None does not clip.
        data_range: of the data that a network of "ve" was trained with; the sample's is [−1, 1].
        num_train_timesteps: for pipelines that ask.
        use_dynamic_shifting: for pipelines that ask; the grid is fixed.
        other_grids: of a student made for several numbers of steps: [logsnrs, native_timesteps] for each of
            its other numbers.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        logsnrs: list[float] = (0.0,),  # type: ignore (diffusers saves lists)
        native_timesteps: list[float] = (0.0,),  # type: ignore
        prediction_type: str = "v",
        space: str = "vp",
        sigma_data: float = 0.5,
        clip: float | None = None,
        num_train_timesteps: int = 1000,
        use_dynamic_shifting: bool = False,
        other_grids: list[list[list[float]]] | None = None,
        data_range: list[float] = (-1.0, 1.0),  # type: ignore
    ):
        self.set_timesteps()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """For pipelines that call it; a sample always begins at the first noise level."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """Begin a sample on the student's own grid.

        Args:
            num_inference_steps: None, or the student's own k; any of them, if it is made for several.
            device: of the timesteps.
            timesteps: refused: the grid is part of the student.
            sigmas: what some pipelines pass; only their number is looked at.
            mu: ignored.

        Raises:
            ValueError: if another number of steps is asked for, or another grid.
        """
        grids = [[self.config["logsnrs"], self.config["native_timesteps"]]]
        grids += self.config.get("other_grids") or []
        known = {len(logsnrs): (logsnrs, times) for logsnrs, times in grids}
        own = len(self.config["logsnrs"])
        asked = len(sigmas) if sigmas is not None else own
        asked = num_inference_steps if num_inference_steps is not None else asked
        if asked not in known or timesteps is not None:
            what = "timesteps of its own" if timesteps is not None else f"{asked} steps"
            *first, last = map(str, sorted(known))
            counts = f"{', '.join(first)} or {last}" if first else last
            raise ValueError(
                f"this student was distilled for {counts} steps and was asked for {what}; "
                f"call the pipeline with num_inference_steps={own}"
            )
        self.num_inference_steps = asked
        self._logsnrs, times = known[asked]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        ratios = [math.exp(-value / 2) for value in self._logsnrs] + [0.0]
        self.sigmas = torch.tensor(ratios, dtype=torch.float32)
        self._step_index: int | None = None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample, at the pipeline's scale."""
        return self._scale(0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the network sees of the sample (B, …)."""
        if self.config["space"] not in ("edm", "ve"):
            return sample
        alpha, sigma = self._alpha_sigma(self._index(timestep))
        if self.config["space"] == "ve":
            low, high = self.config["data_range"]
            return sample * ((high - low) / 2 / alpha) + (low + high) / 2
        return sample / math.sqrt((sigma / alpha) ** 2 + self.config["sigma_data"] ** 2)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **_: Any,
    ) -> MomentMatchingSchedulerOutput | tuple[torch.Tensor, ...]:
        """Draw z_s ~ q(z_s | z_t, x̃).

        Args:
            model_output: (B, …) the network's.
            timestep: at which it was called.
            sample: (B, …) z_t, at the pipeline's scale.
            generator: of the noise.
            return_dict: give a tuple if False.
        """
        index = self._index(timestep)
        z = sample.float() / self._scale(index)
        if model_output.shape[1] == 2 * sample.shape[1]:  # a learned variance is of no use here
            model_output = model_output[:, : sample.shape[1]]
        x = self._estimate(model_output.float(), z, index)
        after = x
        if index + 1 < len(self._logsnrs):
            mean_z, mean_x, std = self._posterior(index)
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=torch.float32
            )
            after = (mean_z * z + mean_x * x + std * noise) * self._scale(index + 1)
        self._step_index = index + 1
        after, x = after.to(sample.dtype), x.to(sample.dtype)
        return MomentMatchingSchedulerOutput(after, x) if return_dict else (after, x)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _index(self, timestep: Any) -> int:
        """Which call this is: the next one, once the first timestep has been looked up."""
        if self._step_index is None:
            wanted = torch.as_tensor(timestep, dtype=torch.float32, device="cpu").flatten()[0]
            self._step_index = int((self.timesteps.cpu() - wanted).abs().argmin())
        return self._step_index

    def _alpha_sigma(self, index: int) -> tuple[float, float]:
        value = self._logsnrs[index]
        return 1 / math.sqrt(1 + math.exp(-value)), 1 / math.sqrt(1 + math.exp(value))

    def _scale(self, index: int) -> float:
        """The pipeline's sample is this times α x + σ ε."""
        alpha, sigma = self._alpha_sigma(index)
        return {"vp": 1.0, "ve": 1.0, "flow": 1 / (alpha + sigma), "edm": 1 / alpha}[self.config["space"]]

    def _estimate(self, output: torch.Tensor, z: torch.Tensor, index: int) -> torch.Tensor:
        """x̃ from what the network returned."""
        alpha, sigma = self._alpha_sigma(index)
        kind, data = self.config["prediction_type"], self.config["sigma_data"]
        if kind.startswith("-"):
            kind, output = kind[1:], -output
        if kind == "score":
            kind, output = "eps", -self.config["native_timesteps"][index] * output
        total = sigma**2 + (alpha * data) ** 2
        x = {
            "x": lambda: output,
            "eps": lambda: (z - sigma * output) / alpha,
            "v": lambda: alpha * z - sigma * output,
            "flow": lambda: (z - sigma * output) / (alpha + sigma),
            "edm": lambda: alpha * data**2 / total * z + sigma * data / math.sqrt(total) * output,
        }[kind]()
        return x if self.config["clip"] is None else x.clamp(-self.config["clip"], self.config["clip"])

    def _posterior(self, index: int) -> tuple[float, float, float]:
        """Of q(z_s | z_t, x) = N(a z_t + b x, c²): a = √r σ_s/σ_t, b = (1 − r) α_s, c² = (1 − r) σ_s²."""
        (alpha_s, sigma_s), (_, sigma_t) = self._alpha_sigma(index + 1), self._alpha_sigma(index)
        log_r = min(self._logsnrs[index] - self._logsnrs[index + 1], 0.0)
        rest = -math.expm1(log_r)
        return math.exp(log_r / 2) * sigma_s / sigma_t, rest * alpha_s, math.sqrt(rest) * sigma_s
