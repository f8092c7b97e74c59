"""Recipes: each a function that returns a full config. The command line can override any field of them.

The numbers are explained, with what was tried, in docs/decisions.md.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from momatch.config.files import read
from momatch.config.schema import (
    AdapterConfig,
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StoppingConfig,
    TeacherConfig,
    TrainConfig,
    WeightingConfig,
)
from momatch.data.sources import available
from momatch.methods.alternating import AlternatingConfig
from momatch.methods.discrete import DiscreteConfig
from momatch.methods.instant import InstantConfig
from momatch.methods.reward import RewardConfig
from momatch.networks.configs import MLPConfig, TokenTransformerConfig, UNetConfig, UViTConfig
from momatch.utils.errors import ConfigError
from momatch.utils.run_folder import RunFolder

LONGER_STEPS = WeightingConfig(delta_exponent=0.6)  # flat w; what moved students most (docs/decisions.md)
EMOJI_DELTA_EXPONENTS = {
    8: 4.0,
    4: 4.0,
    2: 2.0,
    1: 0.6,
}  # by steps; above 1 is nearer to means, with less grain
METHODS = {"alternating": AlternatingConfig(), "instant": InstantConfig()}
EMOJI_SHIFTS = {16: 4.0, 32: 6.5}  # of the students' schedule, by size: the last call sees little noise


def digits_teacher() -> TeacherConfig:
    """The digits teacher that ships with the package: a 174 k-parameter U-Net, 5,000 steps."""
    return TeacherConfig(
        network=UNetConfig(channels=(16, 32, 64), attention_levels=(2,)),
        train=TrainConfig(num_steps=5000, batch_size=128, checkpoint_every=1000),
    )


def digits(steps: int) -> DistillConfig:
    """Digits student as documented in docs/numbers.md."""
    return DistillConfig(
        steps=steps,
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=1500, batch_size=128),
        optim=OptimConfig(learning_rate=3e-4),
    )


def digits_1() -> DistillConfig:
    """Digits student of 1 step, alternating moment matching."""
    return digits(1)


def digits_2() -> DistillConfig:
    """Digits student of 2 steps, alternating moment matching."""
    return digits(2)


def digits_4() -> DistillConfig:
    """Digits student of 4 steps, alternating moment matching."""
    return digits(4)


def digits_8() -> DistillConfig:
    """Digits student of 8 steps, alternating moment matching."""
    return digits(8)


def digits_instant(steps: int) -> DistillConfig:
    """Digits student by Algorithm 3: as many student updates and pictures a minibatch as `digits`."""
    return replace(
        digits(steps),
        method=InstantConfig(),
        train=TrainConfig(num_steps=750, batch_size=128, log_every=10),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=50),
    )


def digits_instant_8() -> DistillConfig:
    """Digits student of 8 steps, instant moment matching (no auxiliary network)."""
    return digits_instant(8)


def digits_elastic() -> DistillConfig:
    """Digits student for 1, 2, 4 and 8 steps at once, told how many; twice the training of one for one."""
    return replace(digits(8), steps=(1, 2, 4, 8), train=TrainConfig(num_steps=3000, batch_size=128))


def digits_lora_8() -> DistillConfig:
    """Digits student of 8 steps as a LoRA adapter of rank 8 on the frozen teacher."""
    return replace(digits(8), adapter=AdapterConfig(rank=8), optim=OptimConfig(learning_rate=3e-3))


def diffusers_8() -> DistillConfig:
    """Student of 8 steps of a small pixel model of diffusers.

    To what λ its schedule should be cut (schedule.logsnr_min) depends on the size of the pictures:
    docs/numbers.md, section 7.
    """
    return DistillConfig(
        steps=8,
        weighting=replace(LONGER_STEPS, name="signal"),
        train=TrainConfig(num_steps=500, batch_size=128),
        optim=OptimConfig(learning_rate=2e-4),
    )


def fashion14_teacher() -> TeacherConfig:
    """Fashion-MNIST at 14×14: a 160 k-parameter U-Net, small on purpose; half an hour on one core."""
    return TeacherConfig(
        data="fashion-mnist",
        image_size=14,
        network=UNetConfig(channels=(32, 64), attention_levels=(1,)),
        train=TrainConfig(num_steps=6000, batch_size=128, checkpoint_every=1000),
    )


def fashion28_teacher() -> TeacherConfig:
    """Fashion-MNIST at 28×28: a 1.0 M-parameter U-Net; for a GPU, and never run yet."""
    return TeacherConfig(
        data="fashion-mnist",
        image_size=28,
        network=UNetConfig(channels=(48, 96, 128), blocks_per_level=1, attention_levels=(2,)),
        train=TrainConfig(num_steps=12_000, batch_size=256, checkpoint_every=2000),
        optim=OptimConfig(learning_rate=1e-3, beta1=0.9, eps=1e-8, warmup_steps=500),
    )


def fashion(size: int, steps: int) -> DistillConfig:
    """Fashion-MNIST student by the joint variant of Algorithm 2; needs the teacher of its size."""
    small = size == 14
    return DistillConfig(
        teacher=f"runs/fashion{size}-teacher",
        data="fashion-mnist",
        image_size=size,
        steps=steps,
        method=AlternatingConfig("joint"),
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=1000 if small else 3000, batch_size=128 if small else 256),
        optim=OptimConfig(learning_rate=3e-4),
    )


def vectors_teacher() -> TeacherConfig:
    """Teacher of vectors or trajectories in a file of arrays (docs/data.md): an MLP, 10,000 steps."""
    return TeacherConfig(
        network=MLPConfig(width=256, depth=4, embedding_dim=128),
        sampling_steps=100,
        train=TrainConfig(num_steps=10_000, batch_size=256, checkpoint_every=2000),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200),
    )


def vectors(steps: int) -> DistillConfig:
    """Student of a teacher of vectors or trajectories, alternating moment matching."""
    return DistillConfig(
        teacher="runs/vectors-teacher",
        steps=steps,
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=4000, batch_size=256),
        optim=OptimConfig(learning_rate=1e-4 if steps == 1 else 3e-4),  # one of three one-step runs diverged
    )


def text_teacher() -> TeacherConfig:
    """Teacher of a text's characters (docs/beyond.md): masked diffusion, 0.8 M parameters."""
    return TeacherConfig(
        network=TokenTransformerConfig(width=128, depth=3, embedding_dim=64),
        sampling_steps=64,
        train=TrainConfig(num_steps=6000, batch_size=64),
        optim=OptimConfig(learning_rate=2e-3, beta1=0.9, eps=1e-8, warmup_steps=200),
        monitor=MonitorConfig(every=1000, num_samples=256),
    )


def text(steps: int) -> DistillConfig:
    """Student of a teacher of tokens, by D-MMD (docs/beyond.md), both networks from one draw."""
    return DistillConfig(
        teacher="runs/text-teacher",
        steps=steps,
        method=DiscreteConfig("joint"),
        train=TrainConfig(num_steps=1000, batch_size=64),
        optim=OptimConfig(learning_rate=3e-4),
        monitor=MonitorConfig(every=500, num_samples=256),
    )


def demo() -> DistillConfig:
    """What `momatch demo` runs: digits, 8 steps, two thirds of the documented budget."""
    return DistillConfig(
        steps=8,
        weighting=LONGER_STEPS,
        train=TrainConfig(num_steps=1000, batch_size=128, checkpoint_every=200),
        optim=OptimConfig(learning_rate=3e-4),
        monitor=MonitorConfig(every=200),
    )


def emoji16_teacher() -> TeacherConfig:
    """Text to image on the built-in emoji at 16×16: a 2.8 M-parameter U-ViT; about an hour on one core."""
    return TeacherConfig(
        data="emoji",
        image_size=16,
        network=UViTConfig(3, (32, 64), 1, 192, 4, 1, embedding_dim=128),
        train=TrainConfig(num_steps=7000, batch_size=64, checkpoint_every=500, log_every=25),
        optim=OptimConfig(learning_rate=1e-3, beta1=0.9, eps=1e-8, warmup_steps=300),
        monitor=MonitorConfig(every=500, num_samples=200),
    )


def emoji32_teacher() -> TeacherConfig:
    """The same at 32×32: 4.9 M parameters; half a day or more on one core, 9 minutes on an H200."""
    small = emoji16_teacher()
    return replace(
        small,
        image_size=32,
        network=UViTConfig(3, (32, 64, 96), 1, 256, 4, 1, embedding_dim=128),
        train=replace(small.train, num_steps=20_000),
        optim=replace(small.optim, learning_rate=5e-4),
    )


def emoji(size: int, method: Literal["alternating", "instant"], steps: int) -> DistillConfig:
    """Text-to-image student on the built-in emoji, guidance distilled in; needs the teacher of its size.

    Not the paper's: a schedule with less noise, rollouts of the student, both networks from one draw, a
    weight capped at σ = 0.05, a law of δ that leans to short steps; what each gave is in docs/decisions.md.
    """
    instant = method == "instant"  # a step takes two minibatches
    shift = 2.6 if instant and size == 32 else EMOJI_SHIFTS[size]  # as measured
    shorter_steps = WeightingConfig("snr_clipped", 400.0, delta_exponent=EMOJI_DELTA_EXPONENTS[steps])
    return DistillConfig(
        teacher=f"runs/emoji{size}-teacher",
        data="emoji",
        image_size=size,
        steps=steps,
        method=InstantConfig() if instant else AlternatingConfig("joint"),
        weighting=LONGER_STEPS if instant else shorter_steps,
        guidance=GuidanceConfig(scale=1.0, clip="static"),
        schedule=ScheduleConfig("cosine", shift=shift),
        source="rollout",
        train=TrainConfig(num_steps=120 if instant else 200, batch_size=64, log_every=10),
        optim=OptimConfig(learning_rate=5e-5 if steps > 2 else 1e-4, warmup_steps=20 if instant else 50),
        monitor=MonitorConfig(every=150, num_samples=200),
    )


def imagenet_teacher(resolution: int) -> TeacherConfig:
    """U-ViT of about 400 M parameters, as the paper's teachers; its exact shape and rate are our choice."""
    levels = (128, 256) if resolution == 64 else (128, 256, 512)
    return TeacherConfig(
        data=f"data/imagenet{resolution}",
        image_size=resolution,
        network=UViTConfig(3, levels, 3, 1024, 24, 1, num_classes=1000, embedding_dim=512, dropout=0.1),
        schedule=ScheduleConfig("cosine", shift=2 * math.log(32 / resolution)),
        train=TrainConfig(num_steps=1_000_000, batch_size=2048, checkpoint_every=5000),
        optim=OptimConfig(learning_rate=1e-4, beta1=0.9, eps=1e-8, warmup_steps=10_000),
        monitor=MonitorConfig(every=10_000, num_samples=1000),
    )


def imagenet(resolution: int, method: Literal["alternating", "instant"], steps: int) -> DistillConfig:
    """ImageNet student with the paper's settings; complete, never run here at this size.

    Batch 2048, 200,000 iterations, warm-up 1,000, EDM weight (flat for 1 and 2 steps) on the ρ-grid.

    Not known from the paper and our choice: peak rate 1e-5 (others' for a U-ViT). Adam, clip and the absence
    of EMA are the paper's and the defaults.
    """
    return DistillConfig(
        teacher=f"runs/imagenet{resolution}-teacher",
        data=f"data/imagenet{resolution}",
        image_size=resolution,
        steps=steps,
        method=METHODS[method],
        weighting=WeightingConfig("flat" if steps <= 2 else "edm", density="rho_grid"),
        train=TrainConfig(num_steps=200_000, batch_size=2048, checkpoint_every=2000),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=1000),
        monitor=MonitorConfig(every=5000, num_samples=1000),
    )


def text_to_image_512_teacher() -> TeacherConfig:
    """Text to image at 512×512 in pixels: a U-ViT of 0.84 B parameters; its shape and rate are our choice.

    Data: `momatch prepare PICTURES --image-size 512 --teacher PIPELINE`, of a pixel-space pipeline with a
    text encoder; the width of its tokens is taken from there (4,096 of a T5-XXL is assumed in a plan).
    """
    return TeacherConfig(
        data="data/captioned512",
        network=UViTConfig(3, (64, 128, 256, 512), 2, 1536, 24, 1, embedding_dim=512, text_dim=4096),
        image_size=512,
        schedule=ScheduleConfig("cosine", shift=2 * math.log(32 / 512)),
        train=TrainConfig(num_steps=500_000, batch_size=2048, checkpoint_every=5000),
        optim=OptimConfig(learning_rate=1e-4, beta1=0.9, eps=1e-8, warmup_steps=10_000),
        monitor=MonitorConfig(every=10_000, num_samples=200),
    )


def text_to_image_512(method: Literal["alternating", "instant"]) -> DistillConfig:
    """Text-to-image student of 8 steps at 512×512 with the paper's settings; never run here at this size.

    Batch 512, 20,000 iterations. Not known from the paper and our choice: peak rate 1e-5, guidance 3.
    """
    return DistillConfig(
        teacher="runs/text-to-image-512-teacher",
        data="data/captioned512",
        image_size=512,
        steps=8,
        method=METHODS[method],
        weighting=WeightingConfig("edm", density="rho_grid"),
        guidance=GuidanceConfig(scale=3.0, clip="dynamic"),
        train=TrainConfig(num_steps=20_000, batch_size=512, checkpoint_every=1000),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=1000),
        monitor=MonitorConfig(every=1000, num_samples=200),
    )


def rewarding(run: Path) -> DistillConfig:
    """What `momatch reward RUN` starts from: the settings of a finished run, a third of its steps at most.

    The rate is a tenth of that run's: the student is to move a little.

    Raises:
        ConfigError: if there is no run that distilled in that folder.
    """
    config = read(RunFolder(run).config)
    if not isinstance(config, DistillConfig):
        raise ConfigError(f"{run} trained a teacher; give the run of a student")
    steps = max(config.train.num_steps // 3, 1)
    return replace(
        config,
        method=RewardConfig(run=str(run)),
        source="data",
        adapter=AdapterConfig(),
        warm_start_steps=0,
        stopping=StoppingConfig(),
        keep_auxiliary=False,
        train=replace(config.train, num_steps=steps, log_every=10),
        optim=replace(
            config.optim,
            learning_rate=config.optim.learning_rate / 10,
            warmup_steps=min(config.optim.warmup_steps, steps // 10),
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits-teacher": digits_teacher,
    "digits-1": digits_1,
    "digits-2": digits_2,
    "digits-4": digits_4,
    "digits-8": digits_8,
    "digits-instant-8": digits_instant_8,
    "digits-elastic": digits_elastic,
    "digits-lora-8": digits_lora_8,
    "diffusers-8": diffusers_8,
    "vectors-teacher": vectors_teacher,
    **{f"vectors-{k}": partial(vectors, k) for k in (1, 2, 4, 8)},
    "text-teacher": text_teacher,
    **{f"text-{k}": partial(text, k) for k in (4, 8, 16, 32)},
    "demo": demo,
    "fashion14-teacher": fashion14_teacher,
    **{f"fashion14-{k}": partial(fashion, 14, k) for k in (1, 2, 4, 8, 16)},
    "fashion28-teacher": fashion28_teacher,
    **{f"fashion28-{k}": partial(fashion, 28, k) for k in (1, 2, 4, 8, 16)},
    "emoji16-teacher": emoji16_teacher,
    **{f"emoji16-{k}": partial(emoji, 16, "alternating", k) for k in (1, 2, 4, 8)},
    "emoji16-instant-8": partial(emoji, 16, "instant", 8),
    "emoji32-teacher": emoji32_teacher,
    **{f"emoji32-{k}": partial(emoji, 32, "alternating", k) for k in (1, 2, 4, 8)},
    "emoji32-instant-8": partial(emoji, 32, "instant", 8),
    **{f"imagenet{size}-teacher": partial(imagenet_teacher, size) for size in (64, 128)},
    **{
        f"imagenet{size}-{method}-{steps}": partial(imagenet, size, method, steps)
        for size in (64, 128)
        for method in ("alternating", "instant")
        for steps in (1, 2, 4, 8)
    },
    "text-to-image-512-teacher": text_to_image_512_teacher,
    "text-to-image-512-alternating-8": partial(text_to_image_512, "alternating"),
    "text-to-image-512-instant-8": partial(text_to_image_512, "instant"),
}


def recipe(name: str) -> RunConfig:
    """The config of a recipe.

    Raises:
        ConfigError: if there is none of that name.
    """
    if not isinstance(name, str) or name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, 3, 0.7)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"unknown recipe {name!r}; {meant}momatch recipes lists them")
    return RECIPES[name]()


def teacher_recipe(config: RunConfig) -> TeacherConfig | None:
    """The recipe that says how large networks and pictures will be, if nothing is there to measure yet."""
    if isinstance(config, TeacherConfig):
        missing = config.image_size and not available(config.data)
        return config if missing else None
    name = Path(config.teacher).name
    if Path(config.teacher).exists() or name not in RECIPES:
        return None
    made = recipe(name)
    return made if isinstance(made, TeacherConfig) and made.image_size else None
