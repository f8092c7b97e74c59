"""Wrong values in Python are one sentence, as they are on the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import momatch
from momatch.config import MonitorConfig, Reading, TrainConfig
from momatch.utils.errors import UsageError


@pytest.fixture(scope="module")
def teacher():
    return momatch.load_teacher("digits")


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"n": "a"}, "n is 'a'; give a whole number"),
        ({"n": 1.5}, "n is 1.5; give a whole number"),
        ({"n": True}, "n is True; give a whole number"),
        ({"n": None}, "n is None; give a whole number"),
        ({"steps": "2"}, "steps is '2'; give a whole number"),
        ({"steps": 1.5}, "steps is 1.5; give a whole number"),
        ({"seed": "a"}, "seed is 'a'; give a whole number"),
        ({"seed": 0.5}, "seed is 0.5; give a whole number"),
        ({"batch_size": "a"}, "batch_size is 'a'; give a whole number"),
        ({"eta": "a"}, r"eta is 'a'; give a number from 0 \(DDIM\) to 1"),
        ({"eta": 2}, "eta is 2; give a number"),
        ({"eta": float("nan")}, "eta is nan; give a number"),
        ({"cond": {"label": [1, 2]}}, r"label is \[1, 2\]; give a tensor of whole numbers, a row for each"),
        ({"cond": {"label": 3}}, "label is 3; give a tensor"),
        ({"cond": {"label": "3"}}, "label is '3'; give a tensor"),
        ({"cond": {"label": torch.tensor(3)}}, r"label is tensor\(3\); give a tensor"),
        ({"cond": {"label": np.zeros((2, 2))}}, r"label is \[\[0. 0.\] \[0. 0.\]\]; give a tensor"),
        ({"cond": {"label": torch.tensor([1.0, 2.0])}}, "label holds torch.float32; give whole numbers"),
        ({"cond": {"label": torch.tensor([True, False])}}, "label holds torch.bool; give whole numbers"),
        ({"cond": {"label": torch.tensor([0, 11])}}, "label 11 is out of range; this model knows 0 to 9"),
        ({"cond": {"label": torch.tensor([1])}}, "got 1 labels for 2 samples"),
        ({"cond": {"label": torch.zeros(2, 1, dtype=torch.long)}}, r"label has shape \(2, 1\)"),
        ({"cond": {3: torch.zeros(2)}}, "takes label as condition, not 3"),
        ({"cond": {"labels": torch.zeros(2)}}, "takes label as condition, not labels"),
        ({"cond": torch.zeros(2)}, "cond is a Tensor; give a dictionary"),
    ],
)
def test_a_wrong_request_of_samples_is_one_sentence(teacher, request_, says):
    with pytest.raises(UsageError, match=says) as error:
        teacher.sample(**{"n": 2, "steps": 1, **request_})
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_and_short_labels_are_taken(teacher):
    label = torch.tensor([1, 2], dtype=torch.int32)
    found = teacher.sample(np.int64(2), np.int32(1), {"label": label}, np.int64(3))
    assert torch.equal(found, teacher.sample(2, 1, {"label": label.long()}, 3))


@pytest.mark.parametrize("value", [3, None, ["digits"], ""])
@pytest.mark.parametrize(
    ("call", "what"),
    [(momatch.load_data, "data"), (momatch.load_teacher, "a teacher"), (momatch.load_student, "a student")],
)
def test_a_path_that_is_none_is_one_sentence(call, what, value):
    with pytest.raises(UsageError, match=f"^{what} is .*; give a path or a name, in quotation marks$"):
        call(value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: momatch.recipe(3), "unknown recipe 3; momatch recipes lists them"),
        (lambda: momatch.recipe(["a"]), "unknown recipe"),
        (lambda: momatch.load_data("digits", "8"), "image_size is '8'; give the side in pixels, or 0"),
        (lambda: momatch.load_data("digits", True), "image_size is True; give the side"),
        (lambda: momatch.load_data("digits", -8), "image_size is -8; give the side"),
        (lambda: momatch.load_data("digits", reading=5), r"reading is 5; give momatch.config.Reading\(…\)"),
        (lambda: Reading(num_classes="5"), "num_classes is '5'; give a whole number"),
        (lambda: Reading(max_megapixels=-1), "max_megapixels is -1; it must be at least 1, or left out"),
    ],
)
def test_other_wrong_values_are_one_sentence(call, says):
    with pytest.raises(UsageError, match=says):
        call()


def test_a_folder_that_is_none_is_one_sentence(teacher):
    with pytest.raises(UsageError, match="the folder to save in is 3; give a path"):
        teacher.save(3)
    with pytest.raises(UsageError, match="the run's folder is 5; give a path"):
        momatch.distill(teacher, momatch.load_data("digits"), momatch.recipe("digits-8"), 5)


@pytest.mark.parametrize(
    ("steps", "every", "looks"), [(3, 250, [3]), (4, 2, [2, 4]), (3, 2, [2, 3]), (3, 0, [])]
)
def test_a_run_ends_with_a_preview(teacher, tmp_path, steps, every, looks):
    config = momatch.DistillConfig(
        steps=1,
        train=TrainConfig(num_steps=steps, batch_size=4),
        monitor=MonitorConfig(every=every, num_samples=100),
        device="cpu",
    )
    momatch.distill(teacher, momatch.load_data("digits"), config, tmp_path)
    found = sorted(path.name for path in tmp_path.glob("samples/*.png"))
    assert found == [f"step-{step:08d}.png" for step in looks]
