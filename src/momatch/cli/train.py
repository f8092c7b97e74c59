"""The commands that make models: demo, train-teacher, distill.

Like all commands, each parses its arguments, calls the library and prints the outcome.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from momatch.cli.evaluate import measure, print_table
from momatch.cli.parsing import base_config, parse
from momatch.cli.progress import follow
from momatch.config.recipes import recipe, rewarding, teacher_recipe
from momatch.config.schema import DistillConfig, TeacherConfig
from momatch.data.images import ImageSet, Split
from momatch.data.reading import Reading
from momatch.data.sources import load_data
from momatch.evaluation.evaluate import Candidate
from momatch.interop.load import load_any
from momatch.methods.reward import RewardConfig
from momatch.models.model import Model
from momatch.networks.configs import UViTConfig
from momatch.training import distributed
from momatch.training.build import distillation, teacher_of, teacher_training
from momatch.training.claims import extended
from momatch.training.fitting import Config, choices, first_that_fits
from momatch.training.plan import plan as planned
from momatch.training.run import Run
from momatch.training.trackers import check_names
from momatch.utils import devices
from momatch.utils.errors import Notice, UsageError
from momatch.utils.memory import free_bytes
from momatch.utils.text import format_bytes


@dataclass(frozen=True)
class DemoArguments:
    """Distil the built-in digits teacher into an 8-step student.

    Attributes:
        out: the run's folder; the same command again goes on where it stopped.
        num_samples: samples for each line of the table.
        device: where to train: cpu, cuda, cuda:1; auto is a GPU if there is one.
    """

    out: Path = Path("runs/demo")
    num_samples: int = 4000
    device: str = devices.AUTO


def demo(arguments: list[str], console: Console) -> None:
    """`momatch demo`."""
    from momatch.evaluation.report.html import write_report

    parsed = parse(DemoArguments, arguments, "demo")
    config = recipe("demo")
    assert isinstance(config, DistillConfig)
    config = replace(config, device=parsed.device)
    teacher, data = teacher_of(config), load_data(config.data, config.image_size, config.reading)
    console.print(
        f"Teacher: {count(teacher)} parameters, trained on {len(data.train)} digits; "
        f"{len(data.heldout)} are held out.\n"
        f"Distilling it into {config.step_counts[-1]} steps by alternating moment matching, "
        f"{config.train.num_steps} steps of {config.train.batch_size} pictures.",
        soft_wrap=True,
    )
    finish(distillation(teacher, data, config, parsed.out), "distilling", console)
    student = load_any(parsed.out).to(teacher.device)
    console.print(f"Evaluating on {parsed.num_samples} samples each.")
    candidates = [Candidate("teacher", teacher, (8, 64)), Candidate("student", student, config.step_counts)]
    print_table(measure(parsed.out, candidates, data, parsed.num_samples, 0, console), console)
    written = write_report(parsed.out)
    out = shlex.quote(str(parsed.out))
    console.print(
        f"\nReport: {written}\nStudent: {parsed.out / 'student'}\n\nNext:\n"
        f"  momatch sample {out} --num 64 --labels 0,1,2,3 --out grid.png\n"
        f"  momatch evaluate {out} --steps 1,2,4,8,16 --num 20000\n"
        "  momatch distill digits-4 --out runs/digits-4\n"
        "  momatch recipes",
        soft_wrap=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Where and how long a run trains.

    Attributes:
        out: the run's folder.
        extend: make the run in the folder longer, to the --train.num-steps given now: its learning rate rises
            anew from its former end, and falls to 0 at its new one. Give it again to resume.
        fit: cut minibatches into as many parts, and compute as many activations again, as the free memory of
            the device asks for; the numbers stay the same, but for rounding.
        track: who else is told of metrics and previews: tensorboard, wandb, mlflow, trackio, or several with
            commas between.
    """

    out: Path
    extend: bool = False
    fit: bool = False
    track: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherArguments(RunArguments):
    """Train a many-step model by denoising. The same command run again resumes.

    Attributes:
        config: settings of the run.
    """

    config: Annotated[TeacherConfig, tyro.conf.arg(name="")]


def train_teacher(arguments: list[str], console: Console) -> None:
    """`momatch train-teacher RECIPE --out DIR`."""
    base, rest = base_config(arguments, TeacherConfig, "train-teacher")
    assert isinstance(base, TeacherConfig)
    parsed = parse(
        TeacherArguments, rest, "train-teacher RECIPE", TeacherArguments(out=tyro.MISSING, config=base)
    )
    track = check_names(parsed.track)
    config = extended(parsed.config, parsed.out) if parsed.extend else parsed.config
    data = load_data(config.data, config.image_size, config.reading)
    notice_unread_captions(config, data.train)
    if parsed.fit:
        config = fitted(config, None, data, console)
    run = teacher_training(data, config, parsed.out)
    finish(run, "training", console, track)
    out = shlex.quote(str(parsed.out))
    name = "emoji16-8" if run.model.cond_shapes else "digits-8"
    name = {"vectors": "vectors-8", "tokens": "text-8"}.get(data.train.space, name)
    given = parsed.config.image_size
    size = "" if given == recipe(name).image_size else f" --image-size {given}"
    reading = "".join(f" {word}" for word in as_options(parsed.config.reading))
    console.print(
        f"Teacher: {parsed.out / 'teacher'}\nNext: momatch distill {name} --teacher {out} "
        f"--data {shlex.quote(parsed.config.data)}{size}{reading} --out STUDENT",
        soft_wrap=True,
    )


def fitted(config: Config, teacher: Model | None, data: Split, console: Console) -> Config:
    """The config with the quickest settings that fit the memory free on its device, measured there.

    Raises:
        UsageError: among several processes, or if none fits.
    """
    if distributed.size() > 1:
        raise UsageError(
            "--fit measures a single process; for several, momatch plan RECIPE --gpus N --memory 80GiB says "
            "what fits"
        )
    found = list(choices(config, lambda each: planned(each, teacher, data, probe_seconds=0.0)))
    best = first_that_fits(found, free_bytes(devices.resolve(config.device)))
    how = f"; {best.options()}" if best.options() else ""
    console.print(f"A step takes about {format_bytes(best.memory)}{how}", soft_wrap=True)
    return best.apply(config)


def as_options(reading: Reading) -> list[str]:
    """What was said of reading the data, in words of a command line."""
    words = []
    for each in fields(Reading):
        value, option = getattr(reading, each.name), f"--{each.name.replace('_', '-')}"
        if value != each.default:
            words += [option] if value is True else [option, shlex.quote(str(value))]
    return words


def notice_unread_captions(config: TeacherConfig, images: ImageSet) -> None:
    """Say so where pictures have captions that the teacher will not read."""
    if images.captions is None:
        return
    if not images.conditions:
        remedy = "to train on them, encode them first: momatch prepare --text-encoder minilm-l6"
    elif not isinstance(config.network, UViTConfig):
        remedy = "of momatch's own networks only the U-ViT reads text, as in the recipe emoji16-teacher"
    else:
        return
    warnings.warn(f"the captions of {config.data} are not used; {remedy}", Notice, stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class DistillArguments(RunArguments):
    """Distil a teacher by moment matching. The same command run again resumes.

    --method NAME chooses the algorithm: alternating (Algorithm 2), instant (Algorithm 3), or
    your own as package.module:ConfigClass; its settings are the --method.… below.

    Attributes:
        config: settings of the run.
    """

    config: Annotated[DistillConfig, tyro.conf.arg(name="")]


def distill(arguments: list[str], console: Console) -> None:
    """`momatch distill RECIPE --out DIR`."""
    base, rest = base_config(arguments, DistillConfig, "distill")
    assert isinstance(base, DistillConfig)
    parsed = parse(DistillArguments, rest, "distill RECIPE", DistillArguments(out=tyro.MISSING, config=base))
    track = check_names(parsed.track)
    config = extended(parsed.config, parsed.out) if parsed.extend else parsed.config
    check_teacher_is_there(config)
    teacher, data = teacher_of(config), load_data(config.data, config.image_size, config.reading)
    if parsed.fit:
        config = fitted(config, teacher, data, console)
    finish(distillation(teacher, data, config, parsed.out), "distilling", console, track)
    out = shlex.quote(str(parsed.out))
    following = f"momatch evaluate {out} && momatch report {out}"
    if data.train.captions is not None and data.train.conditions:
        caption = shlex.quote(data.train.captions[0])
        following = f"momatch sample {out} --prompt {caption} && momatch evaluate {out} --num 1000"
    console.print(f"Student: {parsed.out / 'student'}\nNext: {following}", soft_wrap=True)


def reward(arguments: list[str], console: Console) -> None:
    """`momatch reward RUN --reward NAME --out DIR`: a run of the method reward, made of a finished one."""
    first, *others = arguments or ["--"]
    if first in ("-h", "--help"):
        base, others = DistillConfig(method=RewardConfig()), [first]
    elif first.startswith("-"):
        raise UsageError("name the finished run first: momatch reward RUN --reward NAME --out DIR")
    else:
        base = rewarding(Path(first))
    words = [_long_name(word) for word in others]
    parsed = parse(DistillArguments, words, "reward RUN", DistillArguments(out=tyro.MISSING, config=base))
    config = parsed.config
    teacher, data = teacher_of(config), load_data(config.data, config.image_size)
    finish(distillation(teacher, data, config, parsed.out), "rewarding", console)
    out = shlex.quote(str(parsed.out))
    following = f"momatch evaluate {out} && momatch report {out}"
    console.print(f"Student: {parsed.out / 'student'}\nNext: {following}", soft_wrap=True)


def _long_name(word: str) -> str:
    """--reward, --scale and --anchor are settings of the method."""
    name = word.partition("=")[0]
    return f"--method.{word.removeprefix('--')}" if name in ("--reward", "--scale", "--anchor") else word


def check_teacher_is_there(config: DistillConfig) -> None:
    """Say how to get the teacher of a recipe that has not been trained yet.

    Raises:
        UsageError: naming the command.
    """
    if teacher_recipe(config):
        name, folder = Path(config.teacher).name, shlex.quote(config.teacher)
        raise UsageError(
            f"there is no folder {folder}; train that teacher first, momatch train-teacher {name} --out "
            f"{folder}, or name another by --teacher"
        )


def finish(run: Run, title: str, console: Console, track: Sequence[str] = ()) -> None:
    """Train a run to its end and save its model; one that is complete already is only saved again."""
    follow(run, title, console, track)
    run.finish()


def count(model: Model) -> str:
    """Number of parameters, readable."""
    return f"{sum(p.numel() for p in model.denoiser.parameters()):,}"
