"""A teacher of random weights and random pictures, for tests that only need something to distil."""

from __future__ import annotations

import torch

from momatch.data.images import ImageSet, Split
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.models.model import Model
from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.networks.registry import NetworkConfig, build

UNET = UNetConfig(channels=(8, 16), attention_levels=(1,), num_classes=3, embedding_dim=16)
UVIT = UViTConfig(channels=(8,), width=16, depth=1, num_classes=3, embedding_dim=16)


def make_teacher(network: NetworkConfig = UNET) -> Model:
    """8×8, one channel, three classes; every weight matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(network)
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    denoiser = Denoiser(net, "v", {"label": 3})
    return Model(denoiser, network, schedules.cosine(), (1, 8, 8), 64, 3, {"role": "teacher"})


def random_pictures() -> Split:
    """90 of them, for training and for evaluation alike."""
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = ImageSet(images, torch.arange(90) % 3, 3, "random")
    return Split(pictures, pictures)
