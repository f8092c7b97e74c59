"""A run's report: one HTML file that needs nothing else, neither files nor network."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momatch.config import files as config_files
from momatch.config.schema import KINDS
from momatch.evaluation.evaluate import Row
from momatch.evaluation.report import plots, tables
from momatch.evaluation.report.tables import Verdict, number
from momatch.methods.base import MethodConfig
from momatch.utils.errors import ConfigError, UsageError
from momatch.utils.files import write_atomically
from momatch.utils.run_folder import RunFolder
from momatch.utils.text import count_of, counts_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")
BADGES = {"below": "better", "level": "undecided", "above": "worse"}
LOOKS_SHOWN = 6
ALARMS_SHOWN = 20
FINAL_NAME = re.compile(r"final-(.+)-(\d+)\.(png|txt)")


@dataclass(frozen=True)
class Picture:
    """A picture ready for the page: a data URI, and the words under it."""

    source: str
    caption: str


@dataclass(frozen=True)
class ReadRun:
    """What a run's folder holds, as far as it holds it.

    Attributes:
        path: the folder.
        config: config.json.
        records: lines of metrics.jsonl with metrics.
        events: its other lines: "start", "look", "alarm", "stop".
        rows: of evaluation.json; empty if there is none, or it cannot be read.
        problems: sentences about files that cannot be read.
    """

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rows: list[Row]
    problems: list[str]

    def of_event(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [line for line in self.events if line["event"] == event]

    @property
    def is_distillation(self) -> bool:
        """Whether this run makes a student."""
        return self.config.get("kind") != "train-teacher"

    @property
    def takes_text(self) -> bool:
        """Whether its finished model is asked by prompts."""
        path = RunFolder(self.path).model("student" if self.is_distillation else "teacher") / "model.json"
        try:
            return "encoder_hidden_states" in json.loads(_read(path))["cond_shapes"]
        except (OSError, ValueError, LookupError, TypeError):  # gone, damaged, or of an earlier version
            return False

    @property
    def steps_done(self) -> int:
        """The last step that metrics.jsonl knows of."""
        return max((line["step"] for line in self.records + self.events), default=0)

    @property
    def steps_planned(self) -> int:
        """train.num_steps."""
        return self.config.get("train", {}).get("num_steps", 0)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done, or the stopping rule has ended the run."""
        return self.steps_done >= self.steps_planned or bool(self.of_event("stop"))

    @property
    def seconds(self) -> float:
        """Time spent training, over all resumptions; each of them counts from 0."""
        total = last = 0.0
        for record in self.records:
            now = record.get("seconds", last)
            total, last = (total + last, now) if now < last else (total, now)
        return total + last


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from whatever the folder holds by now.

    Args:
        run_dir: a run's folder; it needs a config.json, all else may be missing.

    Returns:
        The report's path.

    Raises:
        UsageError: if the folder holds no run.
        OSError: if the report cannot be written; an older one is then untouched.
    """
    from jinja2 import Environment

    run = read_run(Path(run_dir))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_read(TEMPLATE))
    page = template.render(_contents(run))
    path = RunFolder(run.path).report
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def read_run(path: Path) -> ReadRun:
    """Read a run's folder, however far the run came.

    Raises:
        UsageError: if there is no readable config.json.
    """
    folder = RunFolder(path)
    try:
        config = json.loads(_read(folder.config))
        if not isinstance(config, dict) or not isinstance(config.get("train", {}), dict):
            raise ValueError("not the config of a run")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no run (config.json: {error}); give the folder of a run") from None
    lines = folder.rows()
    records = [line for line in lines if "event" not in line]
    events = [line for line in lines if "event" in line]
    rows, problems = [], []
    if folder.evaluation.exists():
        try:
            rows = [Row.from_dict(row) for row in json.loads(_read(folder.evaluation))["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"evaluation.json cannot be read ({error}); evaluate the run again.")
    return ReadRun(path, config, records, events, rows, problems)


def _contents(run: ReadRun) -> dict[str, Any]:
    """Everything that the template names."""
    outcome = _verdict(run)
    return {
        "title": _title(run),
        "name": run.path.resolve().name,
        "facts": _facts(run),
        "verdict": outcome,
        "badge": BADGES.get(outcome.outcome, "no verdict"),
        "unfinished": _unfinished(run),
        "problems": run.problems,
        "columns": tables.columns(run.rows),
        "rows": [tables.cells(row) for row in run.rows],
        "caption": tables.caption(run.rows),
        "finals": _final_pictures(run.path),
        "looks": _look_pictures(run),
        "curves": _curves(run),
        "alarms": run.of_event("alarm")[:ALARMS_SHOWN],
        "more_alarms": max(len(run.of_event("alarm")) - ALARMS_SHOWN, 0),
        "config": _flatten(run.config),
        "commands": _commands(run),
    }


def _title(run: ReadRun) -> str:
    data = run.config.get("data", "unknown data")
    if not run.is_distillation:
        return f"Teacher for {data}"
    counts = _step_counts(run.config)
    kind = f"{counts[0] if counts else '?'}-step student" if len(counts) < 2 else "Elastic student"
    return f"{kind} for {data}"


def _step_counts(config: dict[str, Any]) -> list[int]:
    """For how many steps a run's student is; several for an elastic one."""
    found = config.get("steps", [])
    return found if isinstance(found, list) else [found]


def _facts(run: ReadRun) -> list[tuple[str, str]]:
    config, images = run.config, max((r.get("images_seen", 0) for r in run.records), default=0)
    facts = [
        ("run", "distillation by moment matching" if run.is_distillation else "teacher training by denoising")
    ]
    if run.is_distillation:
        facts += [
            ("teacher", str(config.get("teacher"))),
            ("method", method.title if (method := _method(run)) else "unknown"),
        ]
        facts += [("student", f"{counts_of(_step_counts(config) or [0], 'network call')} a sample")]
    facts += [
        ("data", str(config.get("data"))),
        (
            "training",
            f"{run.steps_done:,} of {count_of(run.steps_planned, 'step')}, {images:,} images seen"
            + "".join(f"; had ended at {row['step']:,} and was extended" for row in run.of_event("extended")),
        ),
        ("time spent training", duration(run.seconds)),
    ]
    stops = run.of_event("stop")
    return facts + [("why it stopped", str(stop.get("reason"))) for stop in stops[-1:]]


def _verdict(run: ReadRun) -> Verdict:
    if not run.rows:
        return Verdict(
            "none", "This run has not been evaluated yet, so there is nothing to say about its quality."
        )
    if run.is_distillation:
        return tables.verdict(run.rows, max(_step_counts(run.config), default=None))
    measured = [(m.value, row, m) for row in run.rows if (m := tables.find(row, "frechet"))]
    if not measured:
        return Verdict("none", "No Fréchet distance was measured.")
    _, row, best = min(measured, key=lambda found: found[0])
    sentence = (
        f"The teacher is at its best at {count_of(row.steps, 'step')}: FD {tables.with_interval(best)}."
    )
    return Verdict("none", sentence)


def _unfinished(run: ReadRun) -> str:
    if run.is_complete:
        return ""
    return (
        f"This run stopped at step {run.steps_done:,} of {run.steps_planned:,}. "
        "Type the command that started it again, and it goes on from its last checkpoint."
    )


def _final_pictures(path: Path) -> list[Picture]:
    """samples/final-NAME-STEPS.png, of tokens .txt, the student's first, then by steps."""
    found = [
        (match, file) for file in path.glob("samples/final-*.*") if (match := FINAL_NAME.fullmatch(file.name))
    ]
    found.sort(key=lambda pair: (pair[0][1] != "student", pair[0][1], int(pair[0][2])))
    return [Picture(_png(file), f"{match[1]}, {count_of(int(match[2]), 'step')}") for match, file in found]


def _look_pictures(run: ReadRun) -> list[Picture]:
    """A few of the pictures taken on the way, evenly spread, the first and the last among them."""
    looks = [
        look for look in run.of_event("look") if look.get("grid") and (run.path / look["grid"]).is_file()
    ]
    if len(looks) > LOOKS_SHOWN:
        looks = [looks[round(i * (len(looks) - 1) / (LOOKS_SHOWN - 1))] for i in range(LOOKS_SHOWN)]
    return [
        Picture(
            _png(run.path / look["grid"]),
            f"step {look['step']:,}, cheap FD {number(_finite(look['frechet']))}",
        )
        for look in looks
    ]


def _method(run: ReadRun) -> MethodConfig | None:
    """What the run's method says of itself; None if the config cannot be read, or the method is gone."""
    try:
        return config_files.from_json(run.config, KINDS[run.config["kind"]]).method
    except (ConfigError, KeyError, TypeError):
        return None


def _curves(run: ReadRun) -> list[Picture]:
    start = (run.of_event("start") or [{}])[-1]
    has_student = sum("student_std" in record for record in run.records) > 1
    method = _method(run) or MethodConfig()
    curves: list[tuple[bool, Callable[[], Any], str]] = [
        (
            sum(tables.find(row, "frechet") is not None for row in run.rows) > 0,
            lambda: plots.quality_curve(run.rows),
            "Quality against sampling steps; lower is better, bars are 95 % intervals.",
        ),
        (
            len(run.of_event("look")) > 1,
            lambda: plots.frechet_curve(run.of_event("look")),
            "The cheap Fréchet distance against training pictures (with a stopping "
            "rule: pictures kept back). Few samples bias it upwards: "
            "read its course, not its height.",
        ),
        (
            sum(method.headline in record for record in run.records) > 1,
            lambda: plots.training_curve(run.records, method.headline, method.label, method.signed),
            method.caption,
        ),
        (
            has_student,
            lambda: plots.statistics_curves(run.records, start.get("data_mean"), start.get("data_std")),
            "What the student makes, beside the data. A drift away from the dashed lines is a warning.",
        ),
    ]
    return [Picture(_svg(plots.svg(draw())), text) for wanted, draw, text in curves if wanted]


def _commands(run: ReadRun) -> list[tuple[str, str]]:
    """(what for, command), for the next thing to do."""
    folder, config = shlex.quote(str(run.path)), run.config
    again = "distill" if run.is_distillation else "train-teacher"
    if not run.is_complete:
        return [
            (
                "go on from the last checkpoint",
                f"momatch {again} --config {folder}/config.json --out {folder}",
            )
        ]
    counts = _step_counts(config) or [8]
    steps = counts[-1] if run.is_distillation else config.get("sampling_steps", 8)
    asked = "--prompt 'a red heart'" if run.takes_text else "--num 64"
    sweep = "1,2,4,8,16 --teacher-steps 8,64,256" if run.is_distillation else "8,16,64,256"
    if run.takes_text:  # a picture for each held-out caption, and nothing that takes hours
        sweep = f"{steps} --teacher-steps 64 --num 191" if run.is_distillation else "64 --num 191"
    commands = [
        ("draw samples", f"momatch sample {folder} --steps {steps} {asked} --seed 7 --out {_output(run)}"),
        ("measure quality at several steps", f"momatch evaluate {folder} --steps {sweep}"),
        ("write this page again", f"momatch report {folder}"),
    ]
    if run.is_distillation:
        python = f"momatch.load_student({str(run.path)!r}).sample(64, seed=7)"
        if run.takes_text:
            python = (
                f"student = momatch.load_student({str(run.path)!r}); "
                "student.sample(1, cond=momatch.text_encoder_of(student).encode(['a red heart']), seed=7)"
            )
        commands.append(("use the student from Python, after `import momatch`", python))
    return commands


def _output(run: ReadRun) -> str:
    return "samples.txt" if any(tables.of_tokens(row) for row in run.rows) else "grid.png"


def duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '5 h 02 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _flatten(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys, as the command line spells them, and values."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(value)))
    return rows


def _finite(value: float | None) -> float:
    return float("nan") if value is None else value


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _png(path: Path) -> str:
    if path.suffix == ".txt":
        return _svg(plots.text_image(_read(path)))
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _svg(text: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
