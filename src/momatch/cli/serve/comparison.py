"""A student and its teacher side by side, from the same noise, each with its time.

choice = Choice("runs/eight", load_any("runs/eight"))
asked = request(num=16, steps=8, seed=7, label="3")
student, teacher = choice.draw(asked), choice.draw_teacher(asked)    # pictures, and seconds each took
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from momatch.cli.running import Running
from momatch.cli.sample import grid_columns
from momatch.config.schema import GuidanceConfig, distilled_guidance
from momatch.diffusion.interface import Cond
from momatch.evaluation.report.plots import image_grid
from momatch.interop.autoencoder import decoder_of, to_pictures
from momatch.interop.compatibility import with_null_condition
from momatch.interop.load import teacher_of_student
from momatch.models.model import Model
from momatch.utils.errors import RunError, UsageError

if TYPE_CHECKING:
    from momatch.interop.text_encoders import TextEncoder

ANY = "any"  # all classes in turn
MAX_NUM = 100  # pictures of one grid
TIMED_SECONDS, MAX_REPEATS = 0.5, 5  # a time is measured again until it took so long, or so often


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    Attributes:
        num: pictures.
        steps: network calls a picture; for a student's teacher its own count is taken.
        seed: of the noise.
        label: class of all pictures; None takes all in turn.
        prompt: for models that take text.
        guidance: w in (1 + w) g(z, c) − w g(z, ∅), for teachers that can be guided.
    """

    num: int
    steps: int
    seed: int = 0
    label: int | None = None
    prompt: str = ""
    guidance: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """Pictures that were asked for.

    Attributes:
        grid: uint8, (height, width) or (height, width, 3).
        steps: network calls a picture.
        seconds: for one picture, from noise to pixels: the time of all, divided by their number. What is
            quick is drawn up to MAX_REPEATS times, and the median counts.
        guidance: the scale that acted.
    """

    grid: np.ndarray
    steps: int
    seconds: float
    guidance: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What there is to show so far.

    Attributes:
        own: the model's pictures.
        teacher: its teacher's.
        problem: what went wrong, in one sentence; empty if nothing did.
    """

    own: Drawing | None = None
    teacher: Drawing | None = None
    problem: str = ""


class Choice:
    """A model that can be asked for pictures, and its teacher once that is asked for.

    Attributes:
        name: what the user calls it.
        model: a student or a teacher.
        running: how it runs, and its teacher; where it is already, if left out.
        text_encoder: of a model that takes text, else None.
    """

    def __init__(self, name: str, model: Model, running: Running | None = None):
        self.running = running or Running(device=str(model.device))
        self.name, self.model = name, self.running.prepare(model)
        self.text_encoder = _text_encoder(model)
        self._decoder = decoder_of(model)
        self._teacher: Model | None = None
        self._warm: set[tuple[int, int]] = set()

    @property
    def is_student(self) -> bool:
        """Whether there is a teacher to compare with."""
        return self.model.is_student

    @property
    def can_be_guided(self) -> bool:
        """Whether it is a teacher that knows what "nothing asked for" is; students are guided already."""
        return not self.is_student and _knows_null(self.model)

    @property
    def labels(self) -> list[tuple[str, str]]:
        """What may be asked for as `label`, as it is shown and as it is asked for; empty if nothing may."""
        if not self.model.num_classes:
            return []
        names = dict(enumerate(self.model.provenance.class_names))
        labels = range(self.model.num_classes)
        return [(ANY, ANY), *((f"{label} {names.get(label, '')}".strip(), str(label)) for label in labels)]

    @property
    def suggested_num(self) -> int:
        """Pictures to begin with: few where each may take long."""
        if math.prod(self.model.sample_shape) > 10_000 or self._decoder is not None:
            return 4
        return 25

    def draw(self, asked: Request) -> Drawing:
        """The model's own pictures.

        Raises:
            UsageError: if it cannot be asked for that.
        """
        config = GuidanceConfig(scale=asked.guidance if self.can_be_guided else 0.0)
        return self._draw(self.model, config, asked, asked.steps)

    def draw_teacher(self, asked: Request) -> Drawing:
        """Its teacher's pictures from the same noise, at the teacher's own number of steps.

        The teacher is guided as it was while the student was distilled.

        Raises:
            UsageError: if the teacher is gone, or another one is in its place.
        """
        teacher = self.teacher()
        return self._draw(teacher, distilled_guidance(self.model), asked, teacher.steps)

    def teacher(self) -> Model:
        """The teacher that the model was distilled from, loaded the first time.

        Raises:
            UsageError: if there is none that can be read, or another one is in its place.
        """
        if self._teacher is None:
            if not self.is_student:
                raise UsageError(f"{self.name} is no student, so it has no teacher to compare with")
            found = teacher_of_student(self.model)
            known = self.model.provenance.inputs.teacher
            if known not in (None, found.fingerprint()):
                raise UsageError(
                    f"{self.model.provenance.teacher} is not the teacher that {self.name} was distilled "
                    "from; put that one back there, or leave the teacher out"
                )
            found = with_null_condition(found, self.model.denoiser.null_values)
            self._teacher = self.running.prepare(found)
        return self._teacher

    def cond(self, asked: Request) -> Cond | None:
        """The condition for `asked.num` samples; None asks for nothing in particular.

        Raises:
            UsageError: if the model does not know the class.
        """
        found: Cond = {}
        if self.model.num_classes:
            if asked.label is not None and not 0 <= asked.label < self.model.num_classes:
                raise UsageError(
                    f"class {asked.label} is out of range, this model knows 0 to {self.model.num_classes - 1}"
                )
            in_turn = torch.arange(asked.num) % self.model.num_classes
            found["label"] = in_turn if asked.label is None else torch.full_like(in_turn, asked.label)
        if self.text_encoder is not None:
            for name, row in self.text_encoder.encode([asked.prompt or ""]).items():
                found[name] = row.expand(asked.num, *row.shape[1:])
        return found or None

    def _draw(self, model: Model, guidance: GuidanceConfig, asked: Request, steps: int) -> Drawing:
        if not 1 <= asked.num <= MAX_NUM:
            raise UsageError(f"the number of samples must be 1 to {MAX_NUM} here, got {asked.num}")
        cond = self.cond(asked)
        model.check_request(asked.num, steps, cond, asked.seed, self.running.batch_size)
        guided = replace(model, denoiser=guidance.apply(model.denoiser))
        key = (id(model), asked.num)
        if key not in self._warm:  # the first call of a size takes longer and would be blamed on the model
            self._pictures(guided, asked, 1, cond)
            self._warm.add(key)
        times: list[float] = []
        while not times or (sum(times) < TIMED_SECONDS and len(times) < MAX_REPEATS):
            start = time.perf_counter()
            pictures = self._pictures(guided, asked, steps, cond)
            times.append(time.perf_counter() - start)
        grid = image_grid(pictures, grid_columns(asked.num))
        return Drawing(grid, steps, median(times) / asked.num, guidance.scale)

    def _pictures(self, model: Model, asked: Request, steps: int, cond: Cond | None) -> Tensor:
        samples = model.sample(asked.num, steps, cond, asked.seed, batch_size=self.running.batch_size)
        return to_pictures(samples, self._decoder).cpu()  # a GPU is waited for


def request(
    num: Any, steps: Any, seed: Any = 0, label: str | None = ANY, prompt: str = "", guidance: Any = 0
) -> Request:
    """A request from what the fields of a page hold: floats, None where somebody emptied one, texts.

    Raises:
        UsageError: naming the field, and what it holds.
    """
    scale = 0.0 if guidance is None else float(guidance)
    if not math.isfinite(scale):
        raise UsageError(f"the guidance scale must be a number, got {guidance}")
    return Request(
        _whole(num, "the number of samples"),
        _whole(steps, "steps"),
        _whole(seed, "the seed"),
        None if label in (None, ANY) else _whole(label, "the class"),
        prompt,
        scale,
    )


def compare(choice: Choice, asked: Request, with_teacher: bool = False) -> Iterator[Outcome]:
    """The model's pictures, then its teacher's beside them; what goes wrong is the last outcome's problem."""
    outcome = Outcome()
    try:
        outcome = Outcome(choice.draw(asked))
        yield outcome
        if with_teacher and choice.is_student:
            yield replace(outcome, teacher=choice.draw_teacher(asked))
    except (UsageError, RunError, OSError) as error:
        yield replace(outcome, problem=str(error))
    except (MemoryError, RuntimeError) as error:
        if not ("memory" in str(error) or isinstance(error, MemoryError)):
            raise
        yield replace(outcome, problem="out of memory; ask for fewer samples")


def caption(drawing: Drawing) -> str:
    """What stands above a grid: "8 steps, 1.2 ms a picture"."""
    steps = "1 step" if drawing.steps == 1 else f"{drawing.steps} steps"
    guided = f", guidance {drawing.guidance:g}" if drawing.guidance else ""
    return f"{steps}{guided}, {readable(drawing.seconds)} a picture"


def ratio(student: Drawing, teacher: Drawing) -> str:
    """How the times compare, in a sentence."""
    times = teacher.seconds / student.seconds
    if times >= 1:
        return (
            f"The student was {_significant(times)} times as fast as its teacher, on this machine, just now."
        )
    return (
        f"The student took {_significant(1 / times)} times as long as its teacher, on this machine, just now."
    )


def readable(seconds: float) -> str:
    """A time in s or ms, to two significant digits."""
    return f"{_significant(seconds)} s" if seconds >= 0.995 else f"{_significant(1000 * seconds)} ms"


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"


def _whole(value: Any, what: str) -> int:
    try:
        if float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{what} must be a whole number, got {'nothing' if value in (None, '') else value}")


def _knows_null(model: Model) -> bool:
    taken = [*(["label"] if model.num_classes else []), *model.cond_shapes]
    return bool(taken) and set(taken) <= set(model.denoiser.null_values)


def _text_encoder(model: Model) -> TextEncoder | None:
    if not model.cond_shapes:
        return None
    from momatch.interop.text_encoders import text_encoder_of

    return text_encoder_of(model)
