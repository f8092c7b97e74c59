"""A student beside its teacher: the same noise, one sentence for what cannot be, times that are measured."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from momatch.cli import main
from momatch.cli.serve import comparison
from momatch.cli.serve.comparison import Choice, Drawing, Request, caption, compare, ratio, readable, request
from momatch.cli.serve.page import check_address, drawn, fields
from momatch.config.recipes import recipe
from momatch.config.schema import GuidanceConfig
from momatch.data.sources import load_data
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.schedules import cosine
from momatch.evaluation.report.plots import image_grid
from momatch.interop.load import load_any, load_teacher
from momatch.models.model import Model
from momatch.networks.configs import MLPConfig
from momatch.training.build import distillation
from momatch.utils.errors import UsageError


@pytest.fixture(scope="module")
def student():
    """A digits student whose weights are still its teacher's, from a recipe that guides the teacher."""
    config = recipe("digits-4")
    config = replace(config, guidance=GuidanceConfig(scale=1.5))
    run = distillation(load_teacher("digits"), load_data("digits"), config)
    return run.model


@pytest.fixture
def choice(student):
    return Choice("runs/four", student)


def few_steps(monkeypatch, steps=6):
    """The digits teacher, made for fewer steps than its own 256."""
    loaded = comparison.teacher_of_student
    monkeypatch.setattr(comparison, "teacher_of_student", lambda model: replace(loaded(model), steps=steps))


def test_the_pictures_are_what_the_models_sample(choice, monkeypatch):
    """Student at the steps asked for; teacher at its own, guided as it was distilled, from the same noise."""
    few_steps(monkeypatch)
    asked = Request(num=9, steps=2, seed=7, label=3)
    label = {"label": torch.full((9,), 3)}
    own = choice.draw(asked)
    expected = image_grid(choice.model.sample(9, 2, label, seed=7), 3)
    assert own.steps == 2 and own.guidance == 0 and np.array_equal(own.grid, expected)

    teacher = load_teacher("digits")
    guided = replace(teacher, denoiser=GuidanceConfig(scale=1.5).apply(teacher.denoiser))
    beside = choice.draw_teacher(asked)
    assert beside.steps == 6 and beside.guidance == 1.5
    assert np.array_equal(beside.grid, image_grid(guided.sample(9, 6, label, seed=7), 3))
    assert not np.array_equal(beside.grid, image_grid(teacher.sample(9, 6, label, seed=7), 3))


def test_all_classes_are_taken_in_turn_unless_one_is_chosen(choice):
    assert choice.cond(Request(12, 1))["label"].tolist() == [*range(10), 0, 1]
    assert choice.cond(Request(3, 1, label=4))["label"].tolist() == [4, 4, 4]
    with pytest.raises(UsageError, match="class 10 is out of range, this model knows 0 to 9"):
        choice.cond(Request(3, 1, label=10))


def test_guidance_is_for_teachers_alone(choice):
    teacher = Choice("digits", load_any("digits"))
    assert teacher.can_be_guided and not choice.can_be_guided
    plain, guided = (teacher.draw(Request(4, 2, guidance=scale)) for scale in (0, 3))
    assert guided.guidance == 3 and not np.array_equal(plain.grid, guided.grid)
    plain, same = (choice.draw(Request(4, 2, guidance=scale)) for scale in (0, 3))
    assert same.guidance == 0 and np.array_equal(plain.grid, same.grid)
    with pytest.raises(UsageError, match="guidance.scale"):
        teacher.draw(Request(4, 2, guidance=-1))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Request(4, 17), "steps must be 1 to 16 for a student, got 17"),
        (Request(4, 0), "steps must be at least 1, got 0"),
        (Request(4, 1, seed=-1), "the seed must lie in"),
        (Request(0, 1), "the number of samples must be 1 to 100 here, got 0"),
        (Request(101, 1), "the number of samples must be 1 to 100 here, got 101"),
        (Request(4, 1, label=11), "class 11 is out of range"),
    ],
)
def test_what_cannot_be_is_one_sentence(choice, asked, said):
    (outcome,) = compare(choice, asked, with_teacher=True)
    assert said in outcome.problem and outcome.own is None and outcome.teacher is None


def test_the_student_is_shown_first_and_stays_if_its_teacher_is_gone(choice, student, monkeypatch):
    few_steps(monkeypatch)
    first, second = compare(choice, Request(2, 1), with_teacher=True)
    assert first.teacher is None and second.own is first.own and second.teacher.steps == 6
    assert len(list(compare(choice, Request(2, 1)))) == 1

    monkeypatch.undo()
    gone = Choice("runs/x", replace(student, provenance={**student.info, "teacher": "runs/nowhere"}))
    first, second = compare(gone, Request(2, 1), with_teacher=True)
    assert second.own is first.own and "runs/nowhere" in second.problem
    other = Choice("runs/x", replace(student, provenance={**student.info, "inputs": {"teacher": "0" * 16}}))
    assert (
        "is not the teacher that runs/x was distilled from"
        in list(compare(other, Request(2, 1), True))[-1].problem
    )


def test_only_lack_of_memory_and_what_has_a_sentence_are_caught(choice, monkeypatch):
    def fail(error):
        def raise_it(asked):
            raise error

        monkeypatch.setattr(choice, "draw", raise_it)
        return [outcome.problem for outcome in compare(choice, Request(1, 1))]

    assert fail(RuntimeError("CUDA out of memory")) == ["out of memory; ask for fewer samples"]
    assert fail(OSError("no such file")) == ["no such file"]
    with pytest.raises(RuntimeError, match="a bug"):
        fail(RuntimeError("a bug"))


def test_the_time_is_that_of_the_draw_without_the_first_calls_delay(student, monkeypatch):
    """One untimed call warms up; then the median over the number of pictures. A clock of our own tells."""
    choice, calls = Choice("x", student), []
    clock = iter([0.0, 0.08, 1.0, 1.02, 2.0, 2.04, 3.0, 3.2, 4.0, 4.01, 5.0, 6.0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: next(clock))
    pictures = choice._pictures

    def counted(model, asked, steps, cond):
        calls.append(steps)
        return pictures(model, asked, steps, cond)

    monkeypatch.setattr(choice, "_pictures", counted)
    assert choice.draw(Request(4, 2)).seconds == pytest.approx(0.04 / 4)  # of 0.08, 0.02, 0.04, 0.2, 0.01
    assert calls == [1, 2, 2, 2, 2, 2]
    assert choice.draw(Request(4, 2)).seconds == pytest.approx(1.0 / 4)  # long enough to be timed once
    assert calls[6:] == [2]


def test_what_is_written_above_the_grids():
    grid = np.zeros((2, 2), np.uint8)
    fast, slow = Drawing(grid, 1, 0.00234), Drawing(grid, 256, 0.117, guidance=1.5)
    assert caption(fast) == "1 step, 2.3 ms a picture"
    assert caption(slow) == "256 steps, guidance 1.5, 117 ms a picture"
    assert ratio(fast, slow).startswith("The student was 50 times as fast as its teacher")
    assert ratio(slow, fast).startswith("The student took 50 times as long as its teacher")
    assert [readable(s) for s in (12.3, 1.26, 0.999, 0.0996)] == ["12 s", "1.3 s", "1 s", "100 ms"]


def test_fields_hold_floats_and_may_be_empty():
    assert request(4.0, 8.0, 7.0, "3", "a cat", 1.5) == Request(4, 8, 7, 3, "a cat", 1.5)
    assert request(4, 8, 0, "any").label is None
    for values, said in [
        ((None, 8), "the number of samples must be a whole number, got nothing"),
        ((4, 2.5), "steps must be a whole number, got 2.5"),
        ((4, 2, float("inf")), "the seed must be a whole number, got inf"),
        ((4, 2, 0, "three"), "the class must be a whole number, got three"),
        ((4, 2, 0, "any", "", float("nan")), "the guidance scale must be a number, got nan"),
    ]:
        with pytest.raises(UsageError, match=said):
            request(*values)


class Words:
    """A text encoder that knows the length of a prompt."""

    def encode(self, prompts):
        return {"length": torch.tensor([[float(len(p))] for p in prompts])}


def talking_model():
    """A network of the plane that says how long the prompt was, for each of its 64 pixels."""

    class Echo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, z, time, cond):
            return torch.zeros_like(z) + self.weight * cond["length"][:, :, None, None] / 10

    denoiser = Denoiser(Echo(), "x", {"length": torch.zeros(1)})
    return Model(
        denoiser,
        MLPConfig(),
        cosine(),
        (1, 8, 8),
        4,
        cond_shapes={"length": (1,)},
        provenance={"role": "teacher"},
    )


def test_a_prompt_is_encoded_once_and_given_to_every_picture(monkeypatch):
    text = types.ModuleType("momatch.interop.text_encoders")
    text.text_encoder_of = lambda model: Words()
    monkeypatch.setitem(sys.modules, "momatch.interop.text_encoders", text)
    choice = Choice("talking", talking_model())
    assert choice.cond(Request(3, 1, prompt="house"))["length"].tolist() == [[5.0]] * 3
    (outcome,) = compare(choice, Request(4, 2, prompt="house"))
    inner = outcome.own.grid[10:30, 10:30]
    assert (inner == 191).all()  # 0.5 in [−1, 1] as a level
    shown = fields(choice)
    assert shown["prompt"]["visible"] and not shown["label"]["visible"] and shown["guidance"]["visible"]
    (outcome,) = compare(choice, Request(4, 2, prompt="house", guidance=1))
    assert (outcome.own.grid[10:30, 10:30] == 255).all()  # (1 + w) · 0.5 − w · 0


def test_the_page_shows_the_fields_that_a_model_has(choice):
    of_student, of_teacher = fields(choice), fields(Choice("digits", load_any("digits")))
    assert of_student["with_teacher"]["visible"] and not of_teacher["with_teacher"]["visible"]
    assert of_teacher["guidance"]["visible"] and not of_student["guidance"]["visible"]
    assert of_student["steps"]["value"] == 4 and of_teacher["steps"]["value"] == 256
    assert [value for _, value in of_student["label"]["choices"]] == ["any", *map(str, range(10))]
    assert not of_student["prompt"]["visible"]


def test_classes_are_chosen_by_name_where_they_have_one():
    digits = load_any("digits")
    assert Choice("digits", digits).labels[:3] == [("any", "any"), ("0", "0"), ("1", "1")]
    named = replace(digits, provenance=replace(digits.provenance, class_names=("zero", "<b>one</b>")))
    labels = Choice("digits", named).labels
    assert labels[1:4] == [("0 zero", "0"), ("1 <b>one</b>", "1"), ("2", "2")] and len(labels) == 11
    assert request(4, 1, 0, labels[2][1]).label == 1


def test_the_page_escapes_what_a_user_typed(choice):
    (shown,) = drawn(choice, 4, "<b>", 0, "any", "", 0, True)
    assert "steps must be a whole number, got &lt;b&gt;" in shown[-1]["value"] and shown[-1]["visible"]


def test_an_address_that_cannot_be_opened_is_refused():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port} cannot be opened"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    for wrong in (0, -1, 65536):
        with pytest.raises(UsageError, match="must lie in 1"):
            check_address("127.0.0.1", wrong)
    with pytest.raises(UsageError, match="--host no.such.host.invalid"):
        check_address("no.such.host.invalid", port)


def test_the_command_says_what_is_missing(capsys, monkeypatch):
    assert main(["serve"]) == 2
    assert "name what to show" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", "digits", "--port", "7999"]) == 2
    assert "gradio is not installed; pip install 'momatch[serve]'" in capsys.readouterr().err
