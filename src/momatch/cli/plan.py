"""The commands that look ahead: plan and recipes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro
from rich.console import Console, Group
from rich.table import Table

from momatch.cli.parsing import base_config, parse
from momatch.config.recipes import RECIPES, teacher_recipe
from momatch.config.schema import DistillConfig, RunConfig, TeacherConfig
from momatch.training.fitting import choices, first_that_fits
from momatch.training.plan import ASSUMED_OPERATIONS, PROBE_SECONDS, Plan, outline
from momatch.training.plan import plan as plan_of
from momatch.utils.errors import ConfigError, UsageError
from momatch.utils.text import bytes_of, count_of, counts_of, format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Say what a run needs, measured on a short probe; nothing is written.

    Of a distillation whose teacher is not there yet, and of a recipe too large to probe here, what follows
    from the shapes alone.

    Attributes:
        gpus: how many share each minibatch, for the table of what fits.
        memory: of each GPU, such as 80GiB: which settings fit it, the quickest first.
    """

    gpus: int = 1
    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class DistillPlan(PlanArguments):
    """See `PlanArguments`.

    Attributes:
        config: settings of the run.
    """

    config: Annotated[DistillConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TeacherPlan(PlanArguments):
    """See `PlanArguments`.

    Attributes:
        config: settings of the run.
    """

    config: Annotated[TeacherConfig, tyro.conf.arg(name="")]


def plan(arguments: list[str], console: Console) -> None:
    """`momatch plan RECIPE`."""
    base, rest = base_config(arguments, None, "plan")
    if isinstance(base, DistillConfig):
        parsed = parse(DistillPlan, rest, "plan RECIPE", DistillPlan(config=base))
    else:
        parsed = parse(TeacherPlan, rest, "plan RECIPE", TeacherPlan(config=base))
    if parsed.gpus < 1:
        raise UsageError(f"--gpus is {parsed.gpus}; give 1 or more")
    if parsed.gpus > 1 and not parsed.memory:
        raise UsageError(f"--gpus {parsed.gpus} is for what fits them; say their --memory, such as 80GiB")
    memory = _memory(parsed.memory) if parsed.memory else 0
    console.print(render(_planned(parsed.config)))
    if memory:
        console.print(*what_fits(parsed.config, memory, parsed.gpus), sep="\n", soft_wrap=True)


def what_fits(config: RunConfig, memory: int, gpus: int = 1) -> Iterator[str]:
    """What settings take of each GPU, line by line, up to the first that fits; nothing else is changed.

    Args:
        config: the run.
        memory: of a GPU, in bytes.
        gpus: how many.
    """
    found = list(choices(config, lambda each: _planned(each, probe_seconds=0.0), gpus))
    yield f"\nOn {count_of(gpus, 'GPU')} of {format_bytes(memory)}, a tenth of it to stay free:"
    try:
        best = first_that_fits(found, memory)
    except ConfigError as error:
        yield f"  {error}"
        return
    for choice in found[: found.index(best) + 1]:
        how = choice.options() or "as it is"
        slower = f", {choice.time:.2f} of the time a step" if choice.time > 1 else ""
        verdict = "fits" if choice is best else "too much"
        yield (
            f"  {how}: {format_bytes(choice.memory)}, {count_of(choice.part, 'image')} at a time{slower}: "
            f"{verdict}"
        )
    if config.precision == "bfloat16" and teacher_recipe(config):
        yield "  Activations are counted as float32; in bfloat16 they take about 0.6 of that."


def _planned(config: RunConfig, probe_seconds: float = PROBE_SECONDS) -> Plan:
    teacher = teacher_recipe(config)
    return outline(config, teacher) if teacher else plan_of(config, probe_seconds=probe_seconds)


def _memory(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise UsageError(f"--memory {error}") from None


def recipes(arguments: list[str], console: Console) -> None:
    """`momatch recipes`."""
    if arguments:
        raise UsageError(f"recipes takes no arguments, got {' '.join(arguments)}")
    for name, make in RECIPES.items():
        kind = "train-teacher" if isinstance(make(), TeacherConfig) else "distill"
        maker = make.func if isinstance(make, partial) else make
        summary = (maker.__doc__ or "").strip().partition("\n")[0]
        if isinstance(make, partial) and kind == "distill":
            config = make()
            assert isinstance(config, DistillConfig)
            summary = f"{counts_of(config.step_counts, 'step')}, {config.method.name}: {summary}"
        console.print(f"  {name:<33}{kind:<15}{summary}", soft_wrap=True)


def render(found: Plan) -> Group:
    """The plan for the terminal, by rich."""
    memory = Table(title="Memory", title_justify="left")
    for i, column in enumerate(("network", "parameters", "weights", "gradients", "optimizer", "together")):
        memory.add_column(column, justify="right" if i else "left")
    for n in found.networks:
        sizes = (n.weights, n.gradients, n.optimizer_state, n.memory)
        memory.add_row(n.role, f"{n.parameters:,}", *map(format_bytes, sizes))
    outlined = found.device == "none"
    sizes = {"activations": found.activations}
    sizes |= {} if outlined else {"workspace": found.workspace, "data": found.data}
    for name, size in sizes.items():
        elsewhere = name == "data" and found.on_gpu
        memory.add_row(name, "in main memory" if elsewhere else "", "", "", "", format_bytes(size))
    memory.add_section()
    memory.add_row("in all", "", "", "", "", format_bytes(found.memory))

    time = Table.grid(padding=(0, 2))
    for name, value in _time_rows(found):
        time.add_row(name, value)
    return Group(
        memory,
        f"At the peak of a step of batch size {found.batch_size}, all on one device. Activations grow in "
        f"proportion to it, {format_bytes(found.activations // found.batch_size)} a picture, and so does "
        "most of the workspace.",
        "PyTorch itself, its kernels' own workspace and previews come on top."
        + (" So does the workspace of the step, which only a run here could show." if outlined else ""),
        "",
        time,
    )


def _time_rows(found: Plan) -> list[tuple[str, str]]:
    steps = f"{found.num_steps:,} steps, {format_seconds(found.num_steps * found.seconds_per_step)}"
    units = (
        "cost of a step",
        f"{found.forward_units} forward passes; a backward one counts as two",
    )
    if found.device == "none":
        operations = found.seconds_per_step * ASSUMED_OPERATIONS
        return [
            units,
            ("operations a step", f"{operations:.2e}, from the shapes: teacher or data are not here yet"),
            ("training", f"{steps}, on one GPU that does {ASSUMED_OPERATIONS:.0e} operations a second"),
        ]
    where = f"{found.device}, {found.threads} thread{'s' if found.threads > 1 else ''}"
    probe_text = f"{found.seconds_per_step:.3g} s, mean of {found.probe_steps} on {where}"
    return [
        units,
        ("time a step", probe_text),
        ("speed", f"{found.images_per_second:,.0f} images/s at batch size {found.batch_size}"),
        ("training", steps),
        ("previews", format_seconds(found.look_seconds)),
        ("in all", f"{format_seconds(found.seconds)}, the final evaluation aside"),
    ]
