"""What moment matching costs beyond its network calls.

One pair of updates through the training loop, against a loop written by hand that makes the same network
calls and Adam steps on fixed inputs and does nothing else: no batches, no noise, no weighting, no clipping,
no schedule.

    python benchmarks/step_cost.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from momatch.config.schema import OptimConfig, TrainConfig
from momatch.diffusion import schedules
from momatch.diffusion.categorical import CategoricalDenoiser, CategoricalProcess
from momatch.diffusion.denoiser import Denoiser
from momatch.interop.load import load_teacher
from momatch.methods.alternating import Alternating
from momatch.methods.discrete import DiscreteMatching
from momatch.methods.instant import Instant
from momatch.methods.jvp import forward_mode
from momatch.methods.reward import Reward
from momatch.methods.transition import Transition
from momatch.networks.configs import TokenTransformerConfig, UNetConfig
from momatch.networks.tokens import TokenTransformer
from momatch.networks.unet import UNet
from momatch.training.batches import image_batches
from momatch.training.loop import train
from timing import Ratio, compare, record

CLASSES = 10


def networks(config: UNetConfig) -> tuple[UNet, UNet, UNet]:
    """Teacher, student, auxiliary with the same weights: the shipped teacher's, or random ones of that shape.

    Weights as they are in use: a fresh network's last layer is zero, and with it most gradients.
    """
    torch.manual_seed(0)
    teacher = UNet(config)
    shipped = load_teacher("digits").denoiser.network
    if config == shipped.config:
        teacher.load_state_dict(shipped.state_dict())
    student, auxiliary = copy.deepcopy(teacher), copy.deepcopy(teacher)
    return teacher.requires_grad_(False).eval(), student, auxiliary


def ours(config: UNetConfig, batch_size: int, update: Literal["alternating", "joint"]) -> Callable[[], None]:
    """A pair of updates of the training loop."""
    teacher, student, auxiliary = (Denoiser(net, "v", {"label": CLASSES}) for net in networks(config))
    method = Alternating(teacher, student, auxiliary, Transition(schedules.cosine(), 8), update=update)
    images, labels = torch.randn(1000, 1, 8, 8), torch.randint(CLASSES, (1000,))
    endless = TrainConfig(num_steps=10**9, batch_size=batch_size, log_every=50)
    records: Iterator = train(method, image_batches(images, labels, batch_size, 0), endless, OptimConfig())
    steps = 1 if update == "joint" else 2

    def pair() -> None:
        for _ in range(steps):
            next(records)

    return pair


def bare(config: UNetConfig, batch_size: int) -> Callable[[], None]:
    """The same network calls and Adam steps, by hand: Algorithm 2's ten forward-units."""
    teacher, student, auxiliary = networks(config)
    adam_student, adam_auxiliary = (
        torch.optim.Adam(n.parameters(), lr=1e-6, betas=(0.0, 0.99), eps=1e-12, fused=True)
        for n in (student, auxiliary)
    )
    z, logsnr = torch.randn(batch_size, 1, 8, 8), torch.randn(batch_size)
    cond = {"label": torch.randint(CLASSES, (batch_size,))}

    def update(learner: UNet, other: UNet, adam: torch.optim.Adam) -> None:
        with torch.no_grad():
            other(z, logsnr, cond)
            teacher(z, logsnr, cond)
        output: Tensor = learner(z, logsnr, cond)
        adam.zero_grad(set_to_none=True)
        output.sum().backward()
        adam.step()

    def pair() -> None:
        update(auxiliary, student, adam_auxiliary)
        update(student, auxiliary, adam_student)

    return pair


def ours_instant(config: UNetConfig, batch_size: int) -> Callable[[], None]:
    """One update of Algorithm 3, through the training loop; two minibatches of `batch_size`."""
    teacher, student, _ = (Denoiser(net, "v", {"label": CLASSES}) for net in networks(config))
    scale = {name: torch.ones_like(p) for name, p in teacher.named_parameters()}
    method = Instant(teacher, student, Transition(schedules.cosine(), 8), scale)
    images, labels = torch.randn(1000, 1, 8, 8), torch.randint(CLASSES, (1000,))
    endless = TrainConfig(num_steps=10**9, batch_size=2 * batch_size, log_every=50)
    batches = image_batches(images, labels, 2 * batch_size, 0)
    records: Iterator = train(method, batches, endless, OptimConfig())

    def update() -> None:
        next(records)

    return update


def bare_instant(config: UNetConfig, batch_size: int) -> Callable[[], None]:
    """The same calls by hand: student; teacher, its gradient, its Jacobian product; student, Adam."""
    teacher, student, _ = networks(config)
    adam = torch.optim.Adam(student.parameters(), lr=1e-6, betas=(0.0, 0.99), eps=1e-12, fused=True)
    z, logsnr = torch.randn(batch_size, 1, 8, 8), torch.randn(batch_size)
    cond = {"label": torch.randint(CLASSES, (batch_size,))}
    theta = {name: p.detach().requires_grad_() for name, p in teacher.named_parameters()}
    fixed = {name: p.detach() for name, p in teacher.named_parameters()}

    def update() -> None:
        with torch.no_grad():
            student(z, logsnr, cond)
        output = functional_call(teacher, theta, (z, logsnr, cond))
        gradient = torch.autograd.grad(output.sum(), list(theta.values()))
        direction = dict(zip(theta, gradient, strict=True))
        with torch.no_grad(), forward_mode(teacher):
            jvp(lambda p: functional_call(teacher, p, (z, logsnr, cond)), (fixed,), (direction,))
        sample: Tensor = student(z, logsnr, cond)
        adam.zero_grad(set_to_none=True)
        sample.sum().backward()
        adam.step()

    return update


def ours_reward(config: UNetConfig, batch_size: int, steps: int) -> Callable[[], None]:
    """One update with a reward that costs nothing, after a sample in all steps."""
    teacher, student, auxiliary = (Denoiser(net, "v", {"label": CLASSES}) for net in networks(config))
    transition = Transition(schedules.cosine(), steps)
    method = Reward(teacher, student, auxiliary, lambda x, cond, rows: x.flatten(1).mean(1), transition)
    images, labels = torch.randn(1000, 1, 8, 8), torch.randint(CLASSES, (1000,))
    endless = TrainConfig(num_steps=10**9, batch_size=batch_size, log_every=50)
    records: Iterator = train(method, image_batches(images, labels, batch_size, 0), endless, OptimConfig())

    def update() -> None:
        next(records)

    return update


def bare_reward(config: UNetConfig, batch_size: int, steps: int) -> Callable[[], None]:
    """The same calls by hand: k of the student, one each of three frozen networks, one with a gradient."""
    teacher, student, auxiliary = networks(config)
    adam = torch.optim.Adam(student.parameters(), lr=1e-6, betas=(0.0, 0.99), eps=1e-12, fused=True)
    z, logsnr = torch.randn(batch_size, 1, 8, 8), torch.randn(batch_size)
    cond = {"label": torch.randint(CLASSES, (batch_size,))}

    def update() -> None:
        with torch.no_grad():
            for network in (*[student] * steps, teacher, auxiliary, auxiliary):
                network(z, logsnr, cond)
        output: Tensor = student(z, logsnr, cond)
        adam.zero_grad(set_to_none=True)
        output.sum().backward()
        adam.step()

    return update


TOKENS = TokenTransformerConfig(num_tokens=28, length=32, width=128, depth=4)


def ours_discrete(batch_size: int) -> Callable[[], None]:
    """A pair of alternating updates of D-MMD on random tokens."""
    torch.manual_seed(0)
    teacher = CategoricalDenoiser(TokenTransformer(TOKENS), "mask")
    transition = Transition(schedules.cosine(), 8, process=CategoricalProcess("mask"))
    method = DiscreteMatching(teacher, copy.deepcopy(teacher), copy.deepcopy(teacher), transition)
    for network in method.trainable.values():
        network.requires_grad_(True)
    rows = torch.nn.functional.one_hot(torch.randint(27, (1000, 32)), 28).float()
    endless = TrainConfig(num_steps=10**9, batch_size=batch_size, log_every=50)
    records: Iterator = train(method, image_batches(rows, None, batch_size, 0), endless, OptimConfig())

    def pair() -> None:
        next(records)
        next(records)

    return pair


def bare_discrete(batch_size: int) -> Callable[[], None]:
    """The same network calls and Adam steps, by hand."""
    torch.manual_seed(0)
    teacher, student, auxiliary = (TokenTransformer(TOKENS) for _ in range(3))
    adams = [
        torch.optim.Adam(n.parameters(), lr=1e-6, betas=(0.0, 0.99), eps=1e-12, fused=True)
        for n in (auxiliary, student)
    ]
    z = torch.nn.functional.one_hot(torch.randint(28, (batch_size, 32)), 28).float()
    logsnr = torch.randn(batch_size)

    def pair() -> None:
        for learner, other, adam in zip((auxiliary, student), (student, auxiliary), adams, strict=True):
            with torch.no_grad():
                other(z, logsnr)
                teacher(z, logsnr)
            output: Tensor = learner(z, logsnr).softmax(-1)
            adam.zero_grad(set_to_none=True)
            output.square().sum().backward()
            adam.step()

    return pair


def main() -> None:
    torch.set_num_threads(1)
    digits = UNetConfig(channels=(16, 32, 64), attention_levels=(2,), num_classes=CLASSES)
    tiny = UNetConfig(channels=(8, 16), num_classes=CLASSES, embedding_dim=24)
    size = sum(p.numel() for p in UNet(tiny).parameters())
    results: list[Ratio] = [
        compare(
            "alternating, digits U-Net, batch 128", ours(digits, 128, "alternating"), bare(digits, 128), 1.03
        ),
        compare("joint, digits U-Net, batch 128", ours(digits, 128, "joint"), bare(digits, 128), 0.72),
        compare(
            f"alternating, {size:,} parameters, batch 1",
            ours(tiny, 1, "alternating"),
            bare(tiny, 1),
            1.05,
            41,
            20,
        ),
        compare(
            "instant, digits U-Net, batch 128", ours_instant(digits, 128), bare_instant(digits, 128), 1.05
        ),
        compare("reward, 4 steps, batch 128", ours_reward(digits, 128, 4), bare_reward(digits, 128, 4), 1.05),
        compare("D-MMD, tokens 32, batch 128", ours_discrete(128), bare_discrete(128), 1.05),
        compare(f"joint, {size:,} parameters, batch 1", ours(tiny, 1, "joint"), bare(tiny, 1), 0.72, 41, 20),
    ]
    record("step-cost", results)


if __name__ == "__main__":
    main()
