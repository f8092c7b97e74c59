"""Networks of the diffusers library, called our way: (z, time, cond) → tensor.

Entries of cond carry the names of diffusers' own arguments, but for `label`, which is its `class_labels`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from momatch.networks.configs import DiffusersConfig

Cond = dict[str, Tensor]


class DiffusersNetwork(nn.Module):
    """One of diffusers' networks, freshly initialised, as `model`."""

    def __init__(self, config: DiffusersConfig):
        super().__init__()
        import diffusers

        self.config = config
        self.model: nn.Module = getattr(diffusers, config.class_name).from_config(config.config)

    def forward(self, z: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, H, W), at the network's own scale.
            time: (B,), the network's own.
            cond: its conditions.

        Returns:
            (B, C, H, W); a learned variance beside the prediction is dropped.
        """
        output = _CALLS[self.config.class_name](self.model, z, time, cond or {})
        return output[:, : z.shape[1]] if output.shape[1] == 2 * z.shape[1] else output


def _unet(model: nn.Module, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return model(z, time, class_labels=cond.get("label"), return_dict=False)[0]


def _conditional_unet(model: nn.Module, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
    added = {key: cond[key] for key in ("text_embeds", "time_ids") if key in cond}
    return model(
        z,
        time,
        cond["encoder_hidden_states"],
        class_labels=cond.get("label"),
        encoder_attention_mask=cond.get("encoder_attention_mask"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


_CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
}
FAMILIES = tuple(_CALLS)
