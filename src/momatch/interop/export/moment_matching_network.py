"""A network of momatch's own, called as diffusers calls its own.

`export.standalone` puts this file and the networks' together into the one that travels with a student.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.networks.unet import UNet
from momatch.networks.uvit import UViT

FAMILIES: dict[str, tuple[Any, Any]] = {"unet": (UNetConfig, UNet), "uvit": (UViTConfig, UViT)}
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"


class MomentMatchingNetwork(ModelMixin, ConfigMixin):
    """A U-Net or U-ViT, told the noise level as logSNR.

    Args:
        family: "unet" or "uvit".
        shape: the fields of its `UNetConfig` or `UViTConfig`.
        in_channels: of one sample.
        sample_size: its side in pixels, or height and width.
        null_shapes: of one sample's part of the text conditions that ask for nothing, which are saved beside
            the weights: {"encoder_hidden_states": [L, D], "encoder_attention_mask": [L]}; none if unknown.
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        shape: dict[str, Any],
        in_channels: int,
        sample_size: int | list[int],
        null_shapes: dict[str, list[int]] | None = None,
    ):
        super().__init__()
        shape_type, network_type = FAMILIES[family]
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}
        self.network = network_type(shape_type(**fields))
        for name, size in (null_shapes or {}).items():
            self.register_buffer(f"null_{name}", torch.zeros(size))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved one; see `ModelMixin.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.to(memory_format=torch.channels_last)  # as the networks are made; files know no such thing
        return loaded

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        steps: int | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Run the network.

        Args:
            sample: (B, C, H, W).
            timestep: logSNR, one number or (B,).
            class_labels: (B,) int64, for a network with classes.
            encoder_hidden_states: (B, L, D) tokens of encoded text, for a network that takes any; None means
                the saved ones that ask for nothing.
            encoder_attention_mask: (B, L), 1 for a token and 0 for padding; None means no padding.
            return_dict: an object with `sample`, or else a tuple of it.
            steps: network calls of the sample that is being made, for a network made for several numbers.

        Raises:
            ValueError: if it is given a condition that it does not take, or lacks one.
        """
        logsnr = torch.as_tensor(timestep, device=sample.device).to(sample.dtype).expand(len(sample))
        label = self._label(class_labels)
        text = self._text(sample, encoder_hidden_states, encoder_attention_mask)
        told = self._steps(steps, logsnr)
        output = self.network(sample, logsnr, {**label, **text, **told} or None)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _label(self, labels: Tensor | None) -> dict[str, Tensor]:
        classes = self.network.config.num_classes
        if labels is None and classes:
            raise ValueError(f"this network must be given class_labels, of 0 to {classes}")
        if labels is not None and not classes:
            raise ValueError("this network knows no classes; leave class_labels out")
        return {} if labels is None else {"label": labels}

    def _steps(self, steps: int | None, logsnr: Tensor) -> dict[str, Tensor]:
        counts = self.network.config.step_counts
        if not counts:
            return {}
        if steps is None or steps not in counts:
            raise ValueError(f"this network must be told its steps, one of {', '.join(map(str, counts))}")
        return {"steps": torch.full_like(logsnr, float(steps))}

    def _text(self, sample: Tensor, text: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        width = getattr(self.network.config, "text_dim", 0)
        if not width:
            if text is not None or mask is not None:
                raise ValueError(f"this network takes no text; leave {TEXT} and {MASK} out")
            return {}
        if text is None:
            if mask is not None:
                raise ValueError(f"{MASK} is of no use without {TEXT}; give both")
            nulls: dict[str, Any] = {name: getattr(self, f"null_{name}", None) for name in (TEXT, MASK)}
            if nulls[TEXT] is None:
                raise ValueError(f"this network must be given {TEXT}, (B, L, {width})")
            text, mask = (
                null if null is None else null.expand(len(sample), *null.shape) for null in nulls.values()
            )
        assert text is not None
        given = {TEXT: text.to(sample.dtype)}
        return given if mask is None else {**given, MASK: mask}
