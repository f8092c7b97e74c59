"""Random numbers from (seed, step): no stream runs on across steps, so resuming needs no stored state."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *path: int | str) -> int:
    """63 bits for one purpose, such as the seed, "train" and the step; well mixed for neighbouring inputs."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *path))
