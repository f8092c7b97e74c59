"""What sampling costs beyond its network calls: k steps of the ancestral sampler against k forward passes.

python benchmarks/sample_cost.py
"""

from __future__ import annotations

import torch

from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.sampling import ancestral
from momatch.networks.configs import UNetConfig
from momatch.networks.unet import UNet
from timing import Ratio, compare, record

CLASSES = 10


def case(denoiser: Denoiser, steps: int, batch_size: int) -> Ratio:
    """`steps` steps of the sampler against as many calls of the bare network."""
    generator, schedule = torch.Generator().manual_seed(0), schedules.cosine()
    noise, logsnr = torch.randn(batch_size, 1, 8, 8), torch.randn(batch_size)
    cond = {"label": torch.randint(CLASSES, (batch_size,))}

    def sample() -> None:
        ancestral(denoiser, noise, steps, schedule, cond, generator)

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(steps):
                denoiser.network(noise, logsnr, cond)

    name = f"{steps} steps, digits U-Net, batch {batch_size}"
    pairs = max(11, 6000 // (steps * batch_size))
    return compare(name, sample, forwards, 1.02, min(pairs, 81), max(1, 16 // steps))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels=(16, 32, 64), attention_levels=(2,), num_classes=CLASSES)).eval()
    denoiser = Denoiser(network, "v", {"label": CLASSES})
    record("sample-cost", [case(denoiser, steps, size) for size in (256, 16) for steps in (1, 4, 8, 64)])


if __name__ == "__main__":
    main()
