"""How many samples a network is given at a time: from the memory that one of them needs, and what is free."""

from __future__ import annotations

import torch
from torch import Tensor

from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.interface import Cond, cond_rows
from momatch.utils import memory

SMALL = 64 * 64 * 3  # numbers in a sample up to which nothing is measured
SHARE = 0.5  # of the free memory that a batch may take: kernels need space that `Live` does not see
CARRIED = 3  # tensors as large as z that the sampler makes for all samples, beside z itself


def fitting(denoiser: Denoiser, z: Tensor, logsnr: Tensor, cond: Cond | None) -> int:
    """Samples of z that the denoiser can be given at a time: 1 … B.

    All of them if they are small; otherwise as many as free memory holds, by two calls on the first.

    Args:
        denoiser: in the mode in which it will be used.
        z: (B, …) on the denoiser's device.
        logsnr: (B,).
        cond: of all B samples, or None.
    """
    if len(z) == 1 or z[0].numel() <= SMALL:
        return len(z)
    room = SHARE * memory.free_bytes(z.device) - CARRIED * z.numel() * z.element_size()
    return min(len(z), denoiser.fitting(max(1, int(room // _bytes_of_one(denoiser, z, logsnr, cond)))))


@torch.no_grad()
def _bytes_of_one(denoiser: Denoiser, z: Tensor, logsnr: Tensor, cond: Cond | None) -> int:
    """Most that a call on the first sample has alive beside weights and inputs."""
    one = slice(0, 1)
    with memory.Live() as live:
        for _ in range(2):
            # After the first call everything that outlives a call has been seen: weights, wherever they hide.
            before = live.now
            live.forget_most()
            denoiser(z[one], logsnr[one], cond_rows(cond, one))
    return max(live.most - before, z[0].numel() * z.element_size())
