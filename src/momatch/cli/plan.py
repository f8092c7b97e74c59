"""The commands that look ahead: plan and recipes."""

from __future__ import annotations

from functools import partial

from rich.console import Console, Group
from rich.table import Table

from momatch.cli.parsing import base_config, parse
from momatch.config.recipes import RECIPES, teacher_recipe
from momatch.config.schema import DistillConfig, TeacherConfig
from momatch.training.plan import ASSUMED_OPERATIONS, Plan, outline
from momatch.training.plan import plan as plan_of
from momatch.utils.errors import UsageError
from momatch.utils.text import counts_of, format_bytes, format_seconds


def plan(arguments: list[str], console: Console) -> None:
    """`momatch plan RECIPE`: what it needs, measured on a short probe; nothing is written.

    For a distillation whose teacher is not there yet, and for a recipe too large to probe here: what follows
    from the shapes alone.
    """
    base, rest = base_config(arguments, None, "plan")
    kind = type(base)
    parsed = parse(kind, rest, "plan RECIPE", base)
    teacher = teacher_recipe(parsed)
    found = outline(parsed, teacher) if teacher else plan_of(parsed)
    console.print(render(found))


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
        "PyTorch itself, its kernels' own workspace and looks at the samples come on top."
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
        ("looks at samples", format_seconds(found.look_seconds)),
        ("in all", f"{format_seconds(found.seconds)}, the final evaluation aside"),
    ]
