"""The commands that look at finished models: evaluate, guidance, report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Fixed, Suppress

from momatch.cli.conditions import notice_other_steps
from momatch.cli.parsing import (
    OptionalInt,
    OptionalText,
    RunName,
    RunPath,
    check_out,
    integers,
    numbers,
    parse,
)
from momatch.cli.progress import follow_samples
from momatch.cli.running import Running, RunningOptions
from momatch.config.schema import GuidanceConfig, distilled_guidance
from momatch.data.images import Split
from momatch.data.reading import Reading
from momatch.data.sources import load_data
from momatch.evaluation.conditions import fixed_cond
from momatch.evaluation.evaluate import Candidate, Row, assess, help_to_sample
from momatch.evaluation.gradient_moment import GradientJudge
from momatch.evaluation.report.tables import evaluation_csv, evaluation_table, evaluation_text
from momatch.interop.compatibility import (
    check_fit,
    check_null_condition,
    in_space_of,
    with_null_condition,
)
from momatch.interop.load import load_any, teacher_of_student
from momatch.models.model import Model
from momatch.models.provenance import Provenance
from momatch.training import distributed
from momatch.utils import devices
from momatch.utils.errors import UsageError
from momatch.utils.run_folder import RunFolder
from momatch.utils.settings import from_json, settings
from momatch.utils.text import count_of


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure a run's model, and its teacher, against data that no training saw.

    Attributes:
        run: folder of a run or of a model, or "digits" for the built-in teacher.
        steps: network calls to try, such as 1,2,4,8; what the model was made for, if left out.
        teacher_steps: the same for a student's teacher; left out, the teacher is not measured.
        num: samples for each line.
        seed: of samples and resampling.
        sampler: of the teacher, in place of ancestral: ddim, dpm++ (DPM-Solver++ 2M) or unipc, the last two
            those of diffusers. A student keeps the sampler that it was made for.
        data: data to compare with; what the model was trained on, if left out.
        judge: folder of another model of the same data: also gives the gradient moment, how much that model
            would still learn from the samples (docs/beyond.md). It needs no feature network.
        running: how networks run.
        format: "table" for reading; "csv" or "json" has every measurement, and nothing else is printed.
    """

    run: RunName
    steps: OptionalText = None
    teacher_steps: OptionalText = None
    sampler: Literal["ancestral", "ddim", "dpm++", "unipc"] = "ancestral"
    num: int = 20_000
    seed: int = 0
    data: OptionalText = None
    judge: OptionalText = None
    running: RunningOptions = Running()
    format: Literal["table", "csv", "json"] = "table"


def evaluate(arguments: list[str], console: Console) -> None:
    """`momatch evaluate RUN`."""
    parsed = parse(EvaluateArguments, arguments, "evaluate")
    check_enough(parsed.num)
    devices.resolve(parsed.running.device)
    model = parsed.running.prepare(load_any(parsed.run))
    data = data_for(model, parsed.data)
    origin = model.provenance
    if parsed.data is None and origin.inputs.data not in (None, data.train.fingerprint()):
        raise UsageError(
            f"{origin.data} no longer holds the pictures that {parsed.run} was trained on; "
            "name the data to compare with by --data"
        )
    steps = integers(parsed.steps, "--steps") if parsed.steps else model.step_counts
    check_fit(model, data.heldout)
    if parsed.sampler != "ancestral":
        if model.of_tokens:
            raise UsageError(f"--sampler {parsed.sampler}: tokens are sampled in one way alone; leave it out")
        if model.is_student and not parsed.teacher_steps:
            raise UsageError(
                f"--sampler {parsed.sampler}: {parsed.run} is a student, sampled as it was made for; give "
                f"its teacher, {origin.teacher}, or --teacher-steps too"
            )
        model = model if model.is_student else replace(model, sampler=parsed.sampler)
    candidates = [Candidate(_name(origin.role or "model", model), model, steps)]
    if parsed.teacher_steps:
        if not model.is_student:
            raise UsageError(
                f"--teacher-steps {parsed.teacher_steps}: {parsed.run} is no student; use --steps instead"
            )
        counts = integers(parsed.teacher_steps, "--teacher-steps")
        teacher = parsed.running.prepare(teacher_of_student(model))
        if origin.inputs.teacher not in (None, teacher.fingerprint()):
            raise UsageError(
                f"{model.provenance.teacher} is not the teacher that {parsed.run} was distilled from; "
                "put that one back there, or leave out --teacher-steps"
            )
        check_fit(teacher, data.heldout)
        asked = distilled_guidance(model)
        teacher = with_null_condition(teacher, model.denoiser.null_values)
        teacher = replace(teacher, denoiser=asked.apply(teacher.denoiser), sampler=parsed.sampler)
        candidates.insert(0, Candidate(_name("teacher", teacher), teacher, counts))
        if asked.scale:
            console.print(f"teacher: guided with w = {asked.scale:g}, as it was distilled", soft_wrap=True)
    for candidate in candidates:
        cond = fixed_cond(candidate.model, data.heldout, parsed.num)
        for k in candidate.steps:
            candidate.model.check_request(parsed.num, k, cond, parsed.seed, parsed.running.batch_size)
    notice_other_steps(model, steps)
    directory = Path(parsed.run) if RunFolder(Path(parsed.run)).exists else None
    candidates = [replace(each, model=distributed.split(each.model)) for each in candidates]
    told = console if parsed.format == "table" else Console(stderr=True)
    gradients = gradient_judge(parsed, model, data)
    batch_size = parsed.running.batch_size
    rows = measure(directory, candidates, data, parsed.num, parsed.seed, told, batch_size, gradients)
    if not distributed.is_main():
        return
    if parsed.format == "table":
        print_table(rows, console)
    else:
        contents = json.dumps([row.to_dict() for row in rows], indent=1) + "\n"
        console.out(evaluation_csv(rows) if parsed.format == "csv" else contents, end="", highlight=False)


def gradient_judge(parsed: EvaluateArguments, model: Model, data: Split) -> GradientJudge | None:
    """The model that --judge names, if any.

    Raises:
        UsageError: if it is the student's own teacher, or does not fit the data.
    """
    if parsed.judge is None:
        return None
    judge = parsed.running.prepare(load_any(parsed.judge))
    if judge.fingerprint() in (model.provenance.inputs.teacher, model.fingerprint()):
        raise UsageError(
            f"--judge {parsed.judge} is the model that is judged, or its teacher, whom a student was made to "
            "please; train another on the same data, such as by --train.seed 1"
        )
    check_fit(judge, data.heldout)
    return GradientJudge(judge, Path(parsed.judge).name)


def _name(role: str, model: Model) -> str:
    """What rows call it: a student by its role alone, anything else with its sampler, if an unusual one."""
    return role if model.is_student or model.sampler == "ancestral" else f"{role} {model.sampler}"


@settings("guidance")
class SweptGuidance(GuidanceConfig):
    """Guidance whose scale is not an option of its own: --scales says it."""

    scale: Suppress[Fixed[float]] = 0.0


@dataclass(frozen=True)
class GuidanceArguments:
    """Measure a model under several guidance scales: what fidelity costs in diversity.

    Guidance belongs into a teacher before it is distilled: `momatch distill RECIPE --guidance.scale W`.

    Attributes:
        run: folder of a run or of a model, or "digits" for the built-in teacher.
        scales: w in (1 + w) g(z, c) − w g(z, ∅), such as 0,0.5,1,2.
        steps: network calls a sample; what the model was made for, if left out.
        guidance: where guidance acts, and clipping.
        num: samples for each line.
        seed: of samples and resampling.
        data: data to compare with; what the model was trained on, if left out.
        running: how the network runs.
        out: picture of the curve, a .png or .svg; its figures are written beside it as .json.
    """

    run: RunName
    scales: str = "0,0.25,0.5,1,2,4"
    steps: OptionalInt = None
    guidance: SweptGuidance = field(default_factory=SweptGuidance)
    num: int = 4000
    seed: int = 0
    data: OptionalText = None
    running: RunningOptions = Running()
    out: Path = Path("guidance.png")


def guidance(arguments: list[str], console: Console) -> None:
    """`momatch guidance RUN`."""
    from momatch.evaluation.report.plots import guidance_curve

    if any(word.startswith("--guidance.scale") for word in arguments):
        raise UsageError("guidance takes --scales, a list such as 0,1,2, in place of --guidance.scale")
    parsed = parse(GuidanceArguments, arguments, "guidance")
    check_out(parsed.out, ".png", ".svg")
    check_enough(parsed.num)
    scales = numbers(parsed.scales, "--scales")
    devices.resolve(parsed.running.device)
    model = parsed.running.prepare(load_any(parsed.run))
    if model.is_student:
        raise UsageError(
            f"{parsed.run} is a student, its guidance is distilled in; give its teacher, "
            f"{model.provenance.teacher}"
        )
    if not model.denoiser.null_values and not model.cond_shapes:
        raise UsageError(f"{parsed.run} has no null condition, so it cannot be guided")
    data = data_for(model, parsed.data)
    check_fit(model, data.heldout)
    model = with_null_condition(model, data.heldout.null_condition)
    for scale in filter(None, scales):
        check_null_condition(model, data.heldout, scale)
    steps = model.steps if parsed.steps is None else parsed.steps
    cond = fixed_cond(model, data.heldout, max(parsed.num, 0))
    model.check_request(parsed.num, steps, cond, parsed.seed, parsed.running.batch_size)
    candidates = []
    for scale in scales:
        config = GuidanceConfig(**{**asdict(parsed.guidance), "scale": scale})
        guided = replace(model, denoiser=config.apply(model.denoiser))
        candidates.append(Candidate(f"w = {scale:g}", guided, (steps,)))
    rows = measure(None, candidates, data, parsed.num, parsed.seed, console, parsed.running.batch_size)
    print_table(rows, console)
    figure = guidance_curve(list(zip(scales, rows, strict=True)))
    figure.savefig(parsed.out, dpi=150, transparent=False, facecolor="white")
    contents = [{"scale": w, **row.to_dict()} for w, row in zip(scales, rows, strict=True)]
    parsed.out.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
    console.print(f"Curve: {parsed.out}, figures: {parsed.out.with_suffix('.json')}", soft_wrap=True)


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html.

    Attributes:
        run: the run's folder.
    """

    run: RunPath


def report(arguments: list[str], console: Console) -> None:
    """`momatch report RUN`."""
    from momatch.evaluation.report.html import write_report

    parsed = parse(ReportArguments, arguments, "report")
    if not RunFolder(parsed.run).exists:
        raise UsageError(f"{parsed.run} is not the folder of a run (no config.json)")
    console.print(f"Report: {write_report(parsed.run)}", soft_wrap=True)


def print_table(rows: list[Row], console: Console) -> None:
    """As wide as the terminal; where there is none, plain and whole."""
    if console.is_terminal:
        console.print(evaluation_table(rows, console.width))
    else:
        console.out(evaluation_text(rows), end="", highlight=False)


def measure(
    directory: Path | None,
    candidates: list[Candidate],
    data: Split,
    num_samples: int,
    seed: int,
    console: Console,
    batch_size: int | None = None,
    gradients: GradientJudge | None = None,
) -> list[Row]:
    """Evaluate; a line as each row is done."""
    rows = []
    with follow_samples(console) as watch:
        arguments = directory, candidates, data, num_samples, seed, watch, batch_size, gradients
        if not distributed.is_main():
            help_to_sample(*arguments)
            return []
        for row in assess(*arguments):
            rows.append(row)
            console.print(f"  measured: {row.name}, {count_of(row.steps, 'step')}")
    return rows


def check_enough(num: int) -> None:
    """Refuse a number of samples on which no metric means anything."""
    if num < 100:
        raise UsageError(
            f"--num {num} is too few for any metric; use 100 or more (20000 for figures to quote)"
        )


def data_for(model: Model, source: str | None) -> Split:
    """The data of that name, or what the model was trained on; pictures at the size the model makes."""
    known = source or model.provenance.data
    if known is None:
        raise UsageError(
            "this model does not say what it was trained on; name data to compare with by --data"
        )
    pictures = len(model.sample_shape) == 3 and model.sample_shape[0] in (1, 3)  # latents have more channels
    origin = model.provenance
    if pictures and origin.pipeline and not (origin.config or origin.latent):
        size = model.sample_shape[-1]  # a teacher of pixels from elsewhere
    else:
        size = int(origin.config.get("image_size", 0))
    return in_space_of(model, load_data(str(known), size, reading_of(origin)))


def reading_of(origin: Provenance) -> Reading:
    """How the data were read that a model was trained on."""
    return from_json(Reading, json.dumps(origin.config.get("reading", {})))
