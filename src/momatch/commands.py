"""The commands behind the command line: each parses its arguments, calls the library, prints the outcome."""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from rich.console import Console
from tyro.conf import Positional

from momatch import config_files, validation
from momatch.assembly import check_fit, distillation, teacher_training
from momatch.assessment import Candidate, assess
from momatch.config import ConfigError, DistillConfig, RunConfig, TeacherConfig
from momatch.data.images import Split
from momatch.data.sources import load_data
from momatch.denoiser import Cond
from momatch.errors import UsageError
from momatch.model import Model
from momatch.progress import Interrupted, follow
from momatch.recipes import RECIPES, recipe
from momatch.runs import Run
from momatch.teachers.own import load_any, load_teacher

Arguments = TypeVar("Arguments")
TYRO_HEADINGS = ("Parsing error ", "Value error Error parsing ", "Required options ", "Unrecognized options ")
BOX_TO_SPACES = {ord(character): " " for character in "│╭╮╰╯─╞╡┌┐└┘"}


def run(name: str, arguments: list[str]) -> int:
    """Run the command of that name; returns the exit code.

    Raises:
        UsageError: if the arguments or what they name cannot be used.
        RunError, OSError: if something under way failed.
    """
    console = Console(stderr=False, highlight=False)
    try:
        {
            "demo": demo,
            "train-teacher": train_teacher,
            "distill": distill,
            "sample": sample,
            "evaluate": evaluate,
            "report": report,
            "plan": plan,
            "recipes": recipes,
        }[name](arguments, console)
    except Interrupted as interrupted:
        console.print(str(interrupted))
        return 130
    return 0


@dataclass(frozen=True)
class DemoArguments:
    """Distil the built-in digits teacher into an 8-step student.

    Attributes:
        out: the run's folder; the same command again goes on where it stopped.
        num_samples: samples for each line of the table.
    """

    out: Path = Path("runs/demo")
    num_samples: int = 4000


def demo(arguments: list[str], console: Console) -> None:
    """`momatch demo`."""
    from momatch.reports.html import write_report

    parsed = parse(DemoArguments, arguments, "demo")
    config = recipe("demo")
    assert isinstance(config, DistillConfig)
    teacher, data = load_teacher(config.teacher), load_data(config.data)
    console.print(
        f"Teacher: {count(teacher)} parameters, trained on {len(data.train)} digits; "
        f"{len(data.heldout)} are held out.\n"
        f"Distilling it into {config.steps} steps by alternating moment matching, "
        f"{config.train.num_steps} steps of {config.train.batch_size} pictures.",
        soft_wrap=True,
    )
    finish(distillation(teacher, data, config, parsed.out), "distilling", console)
    student = load_any(parsed.out)
    console.print(f"Evaluating on {parsed.num_samples} samples each.")
    candidates = [Candidate("teacher", teacher, (8, 64)), Candidate("student", student, (config.steps,))]
    measure(parsed.out, candidates, data, parsed.num_samples, 0, console)
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


@dataclass(frozen=True)
class TeacherArguments:
    """Train a many-step model by denoising. The same command run again resumes.

    Attributes:
        out: the run's folder.
        config: settings of the run.
    """

    out: Path
    config: Annotated[TeacherConfig, tyro.conf.arg(name="")]


def train_teacher(arguments: list[str], console: Console) -> None:
    """`momatch train-teacher RECIPE --out DIR`."""
    base, rest = base_config(arguments, TeacherConfig, "train-teacher")
    assert isinstance(base, TeacherConfig)
    parsed = parse(TeacherArguments, rest, "train-teacher RECIPE", TeacherArguments(tyro.MISSING, base))
    validation.check(parsed.config)
    finish(teacher_training(load_data(parsed.config.data), parsed.config, parsed.out), "training", console)
    out = shlex.quote(str(parsed.out))
    console.print(
        f"Teacher: {parsed.out / 'teacher'}\nNext: momatch distill digits-8 --teacher {out} "
        f"--data {shlex.quote(parsed.config.data)} --out STUDENT",
        soft_wrap=True,
    )


@dataclass(frozen=True)
class DistillArguments:
    """Distil a teacher by moment matching. The same command run again resumes.

    Attributes:
        out: the run's folder.
        config: settings of the run.
    """

    out: Path
    config: Annotated[DistillConfig, tyro.conf.arg(name="")]


def distill(arguments: list[str], console: Console) -> None:
    """`momatch distill RECIPE --out DIR`."""
    base, rest = base_config(arguments, DistillConfig, "distill")
    assert isinstance(base, DistillConfig)
    parsed = parse(DistillArguments, rest, "distill RECIPE", DistillArguments(tyro.MISSING, base))
    config = parsed.config
    validation.check(config)
    finish(
        distillation(load_teacher(config.teacher), load_data(config.data), config, parsed.out),
        "distilling",
        console,
    )
    out = shlex.quote(str(parsed.out))
    console.print(
        f"Student: {parsed.out / 'student'}\nNext: momatch evaluate {out} && momatch report {out}",
        soft_wrap=True,
    )


@dataclass(frozen=True)
class SampleArguments:
    """Draw pictures from a run's model.

    Attributes:
        run: folder of a run or of a model, or "digits" for the built-in teacher.
        steps: network calls a sample; what the model was made for, if left out.
        num: how many.
        labels: classes to ask for, such as 0,1,2, taken in turn; all in turn if left out.
        seed: of the noise.
        eta: stochasticity: 1 is ancestral, 0 is DDIM.
        out: a .png for a grid, or an .npz with images (uint8) and labels.
    """

    run: Positional[str]
    steps: int | None = None
    num: int = 64
    labels: str | None = None
    seed: int = 0
    eta: float = 1.0
    out: Path = Path("samples.png")


def sample(arguments: list[str], console: Console) -> None:
    """`momatch sample RUN`."""
    parsed = parse(SampleArguments, arguments, "sample")
    if parsed.out.suffix not in (".png", ".npz"):
        raise UsageError(f"--out {parsed.out} must end in .png or .npz")
    if not parsed.out.parent.is_dir():
        raise UsageError(f"--out {parsed.out}: the folder {parsed.out.parent} does not exist; make it first")
    if not 0 <= parsed.eta <= 1:
        raise UsageError(f"--eta {parsed.eta} must lie in [0, 1]: 0 is DDIM, 1 is ancestral")
    model = load_any(parsed.run)
    steps = model.steps if parsed.steps is None else parsed.steps
    model.check_request(parsed.num, steps, None, parsed.seed)
    cond = label_cond(parsed.labels, parsed.num, model)
    images = model.sample(parsed.num, steps, cond, parsed.seed, parsed.eta)
    if parsed.out.suffix == ".npz":
        import numpy as np

        pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        if cond:
            np.savez_compressed(parsed.out, images=pixels, labels=cond["label"].numpy())
        else:
            np.savez_compressed(parsed.out, images=pixels)
    else:
        from momatch.reports.plots import image_grid, save_png

        save_png(image_grid(images, grid_columns(parsed.num)), parsed.out)
    console.print(f"{parsed.num} samples in {steps} steps each: {parsed.out}", soft_wrap=True)


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure a run's model, and its teacher, against data that no training saw.

    Attributes:
        run: folder of a run or of a model, or "digits" for the built-in teacher.
        steps: network calls to try, such as 1,2,4,8; what the model was made for, if left out.
        teacher_steps: the same for a student's teacher; left out, the teacher is not measured.
        num: samples for each line.
        seed: of samples and resampling.
        data: data to compare with; what the model was trained on, if left out.
    """

    run: Positional[str]
    steps: str | None = None
    teacher_steps: str | None = None
    num: int = 20_000
    seed: int = 0
    data: str | None = None


def evaluate(arguments: list[str], console: Console) -> None:
    """`momatch evaluate RUN`."""
    parsed = parse(EvaluateArguments, arguments, "evaluate")
    if parsed.num < 100:
        raise UsageError(
            f"--num {parsed.num} is too few for any metric; use 100 or more (20000 for figures to quote)"
        )
    model = load_any(parsed.run)
    data = load_data(parsed.data or str(model.info.get("data", "digits")))
    inputs = model.info.get("inputs", {})
    if parsed.data is None and inputs.get("data", data.train.fingerprint()) != data.train.fingerprint():
        raise UsageError(
            f"{model.info['data']} no longer holds the pictures that {parsed.run} was trained on; "
            "name the data to compare with by --data"
        )
    steps = integers(parsed.steps, "--steps") if parsed.steps else (model.steps,)
    check_fit(model, data.heldout)
    candidates = [Candidate(str(model.info.get("role", "model")), model, steps)]
    if parsed.teacher_steps:
        if model.info.get("role") != "student":
            raise UsageError(
                f"--teacher-steps {parsed.teacher_steps}: {parsed.run} is no student; use --steps instead"
            )
        counts = integers(parsed.teacher_steps, "--teacher-steps")
        teacher = load_teacher(str(model.info["teacher"]))
        if inputs.get("teacher", teacher.fingerprint()) != teacher.fingerprint():
            raise UsageError(
                f"{model.info['teacher']} is not the teacher that {parsed.run} was distilled from; "
                "put that one back there, or leave out --teacher-steps"
            )
        candidates.insert(0, Candidate("teacher", teacher, counts))
    for candidate in candidates:
        for k in candidate.steps:
            candidate.model.check_request(parsed.num, k, None, parsed.seed)
    directory = Path(parsed.run) if (Path(parsed.run) / "config.json").is_file() else None
    measure(directory, candidates, data, parsed.num, parsed.seed, console)


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html.

    Attributes:
        run: the run's folder.
    """

    run: Positional[Path]


def report(arguments: list[str], console: Console) -> None:
    """`momatch report RUN`."""
    from momatch.reports.html import write_report

    parsed = parse(ReportArguments, arguments, "report")
    if not (parsed.run / "config.json").is_file():
        raise UsageError(f"{parsed.run} is not the folder of a run (no config.json)")
    console.print(f"Report: {write_report(parsed.run)}", soft_wrap=True)


def plan(arguments: list[str], console: Console) -> None:
    """`momatch plan RECIPE`: what it needs, measured on a short probe; nothing is written."""
    from momatch import planning

    base, rest = base_config(arguments, None, "plan")
    kind = type(base)
    parsed = parse(kind, rest, "plan RECIPE", base)
    validation.check(parsed)
    console.print(planning.render(planning.plan(parsed)))


def recipes(arguments: list[str], console: Console) -> None:
    """`momatch recipes`."""
    if arguments:
        raise UsageError(f"recipes takes no arguments, got {' '.join(arguments)}")
    for name, make in RECIPES.items():
        kind = "train-teacher" if isinstance(make(), TeacherConfig) else "distill"
        console.print(f"  {name:<18}{kind:<15}{(make.__doc__ or '').strip()}", soft_wrap=True)


def finish(run: Run, title: str, console: Console) -> None:
    """Train a run to its end and save its model; one that is complete already is only saved again."""
    follow(run, title, console)
    run.finish()


def measure(
    directory: Path | None,
    candidates: list[Candidate],
    data: Split,
    num_samples: int,
    seed: int,
    console: Console,
) -> None:
    """Evaluate and print the table; a line as each row is done, since some take long."""
    from momatch.reports.tables import evaluation_table

    rows = []
    with console.status(f"sampling and measuring {num_samples} pictures a line"):
        for row in assess(directory, candidates, data, num_samples, seed):
            rows.append(row)
            console.print(f"  measured: {row.name}, {row.steps} steps")
    console.print(evaluation_table(rows))


def base_config(
    arguments: list[str], kind: type[RunConfig] | None, command: str
) -> tuple[RunConfig, list[str]]:
    """The config that a command starts from, and the arguments left: RECIPE …, or --config FILE …"""
    if not arguments or arguments[0] in ("-h", "--help"):
        fitting = [name for name, make in RECIPES.items() if kind is None or isinstance(make(), kind)]
        if not arguments:
            raise UsageError(f"name a recipe: momatch {command} RECIPE, one of {', '.join(fitting)}")
        return (kind or DistillConfig)(), arguments
    if arguments[0] == "--config":
        if len(arguments) < 2:
            raise UsageError("--config needs a file: a run's config.json")
        config, rest = config_files.read(Path(arguments[1])), arguments[2:]
    elif arguments[0].startswith("-"):
        raise UsageError(f"name the recipe first: momatch {command} RECIPE {arguments[0]} …")
    else:
        config, rest = recipe(arguments[0]), arguments[1:]
    if kind is not None and not isinstance(config, kind):
        right = "train-teacher" if isinstance(config, TeacherConfig) else "distill"
        raise ConfigError(f"{arguments[0]} is for momatch {right}, not for momatch {command}")
    return config, rest


def parse(
    kind: type[Arguments], arguments: list[str], command: str, default: Arguments | None = None
) -> Arguments:
    """Read arguments into `kind`; what tyro objects to becomes one sentence.

    Raises:
        UsageError: if the arguments are wrong. SystemExit(0) after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            program = f"momatch {command}"
            if default is None:
                return tyro.cli(kind, args=arguments, prog=program)
            return tyro.cli(kind, args=arguments, prog=program, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
    words = " ".join(said.getvalue().translate(BOX_TO_SPACES).split())
    words = words.partition(" For full helptext")[0]
    words = words.partition(" Argument helptext:")[0]
    for heading in TYRO_HEADINGS:
        words = words.removeprefix(heading)
    raise UsageError(f"{words} (see momatch {command} --help)")


def label_cond(labels: str | None, num: int, model: Model) -> Cond | None:
    """The condition for `num` samples: the given labels in turn, or all in turn."""
    if labels is None:
        return {"label": torch.arange(num) % model.num_classes} if model.num_classes else None
    if not model.num_classes:
        raise UsageError(f"--labels {labels}: this model is unconditional; leave labels out")
    chosen = torch.tensor(integers(labels, "--labels"))
    wrong = chosen[(chosen < 0) | (chosen >= model.num_classes)]
    if len(wrong):
        raise UsageError(
            f"--labels {labels}: {int(wrong[0])} is out of range, "
            f"this model knows 0 to {model.num_classes - 1}"
        )
    return {"label": chosen[torch.arange(num) % len(chosen)]}


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers: "1,2,4" → (1, 2, 4)."""
    try:
        found = tuple(int(part) for part in text.split(","))
        if any(abs(number) >= 2**31 for number in found):
            raise ValueError
        return found
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of whole numbers such as 1,2,4") from None


def grid_columns(num: int) -> int:
    """Columns that make a grid of `num` pictures about square."""
    return max(1, round(num**0.5))


def count(model: Model) -> str:
    """Number of parameters, readable."""
    return f"{sum(p.numel() for p in model.denoiser.parameters()):,}"
