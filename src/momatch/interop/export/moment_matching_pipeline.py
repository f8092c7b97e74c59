"""A pipeline for what no stock one of diffusers makes: labels, other scales of noise, momatch's networks.

This file stands alone: it needs torch and diffusers, and is copied into the folders that use it. Older
diffusers look at the annotations of __init__, and know classes and Optional alone: no strings, no `X | None`.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


class MomentMatchingPipeline(DiffusionPipeline):
    """Noise to samples, in as many calls of the network as the student was trained for (any, if several).

    Args:
        unet: the student's network.
        scheduler: its sampler.
        steps: network calls that the student was trained for; of several, the most.
        null_label: the class label that asks for nothing in particular; None if there is none.
        told_steps: whether the network is told the number of steps, as one trained for several is.
        vae: one of diffusers' autoencoders, if samples are its latents.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        steps: int = 1,
        null_label: Optional[int] = None,  # noqa: UP045
        vae: Optional[torch.nn.Module] = None,  # noqa: UP045
        told_steps: bool = False,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(steps=steps, null_label=null_label, told_steps=told_steps)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """Draw samples.

        Args:
            batch_size: how many, unless latents, class_labels or encoder_hidden_states say it.
            class_labels: a label for each sample; None asks for nothing in particular.
            num_inference_steps: what the student was trained for, if None.
            generator: of all noise.
            latents: (B, …) initial noise of variance 1; drawn from the generator if None.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": as the
                student made them, nominally in [−1, 1], not clipped.
            return_dict: an object with `images`, or else a tuple of them.
            encoder_hidden_states: (B, L, D) tokens of encoded text, for a student that takes any; None asks
                for nothing in particular.
            encoder_attention_mask: (B, L), 1 for a token and 0 for padding; None means no padding.

        Raises:
            ValueError: if what it is given is not for one and the same number of samples.
        """
        device = self._execution_device
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=device)
        text = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        given = {"latents": latents, "class_labels": class_labels, **text}
        sizes = {name: len(rows) for name, rows in given.items() if rows is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"give as many rows of each, not {sizes}")
        shape = (next(iter(sizes.values()), batch_size), *self.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        condition = self._condition(class_labels, len(latents), device)
        condition |= {name: rows.to(device) for name, rows in text.items() if rows is not None}
        self.scheduler.set_timesteps(num_inference_steps or self._settings.steps, device=device)
        if self._settings.told_steps:
            condition["steps"] = len(self.scheduler.timesteps)
        z = latents.to(device) * self.scheduler.init_noise_sigma
        progress_bar: Any = self.progress_bar
        for t in progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(z, t)
            output = self.unet(seen, t.expand(len(z)), return_dict=False, **condition)[0]
            z = self.scheduler.step(output, t, z, generator=generator, return_dict=False)[0]
        images = self._finish(z, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _settings(self) -> Any:
        """The config, whose entries are attributes too, which its type does not tell."""
        return self.config

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        config = self.unet.config
        size = config.sample_size
        if type(self.unet).__name__ == "UNet1DModel":
            return (config.in_channels, size)
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _condition(self, labels: torch.Tensor | None, size: int, device: torch.device) -> dict[str, Any]:
        if labels is None and self._settings.null_label is not None:
            labels = torch.full((size,), self._settings.null_label, device=device)
        return {} if labels is None else {"class_labels": labels}

    def _finish(self, z: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent" or z.ndim != 4:
            return z
        if self.vae is not None:
            z = self._decode(z)
        pixels = (z / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, c, h, w) to pictures, by what the autoencoder says of its latents' scale."""
        config = self.vae.config
        shift: Any = config.get("shift_factor") or 0.0
        spread: Any = 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, spread = (
                torch.tensor(config[name], device=latents.device).view(1, -1, 1, 1)
                for name in ("latents_mean", "latents_std")
            )
        inner = latents.float() / (config.get("scaling_factor") or 1.0) * spread + shift
        return self.vae.decode(inner.to(self.vae.dtype), return_dict=False)[0].float()
