"""A module that somebody else might have written; tests name it as "tiny_teacher:make"."""

from __future__ import annotations

import torch
from torch import nn

import momatch
from momatch.networks.configs import CustomConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, z, time, cond=None):
        hidden = self.first(z) + self.time(time[:, None] / 1000)[:, :, None, None]
        return self.last(torch.tanh(hidden))


def make() -> momatch.Model:
    betas = torch.linspace(1e-4, 0.02, 1000).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = momatch.Denoiser(Net(), "eps", time=momatch.conventions.timesteps(betas), clip=1.0)
    return momatch.Model(
        denoiser,
        CustomConfig("tiny_teacher:make"),
        momatch.schedules.tabulated(betas),
        (1, 8, 8),
        steps=16,
    )


def no_model() -> momatch.Model:
    return 3


def unmarked():
    raise AssertionError("it was called")
