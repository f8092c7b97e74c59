"""Configs: written, read back, compared; nonsense is refused with the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import json

import pytest

from momatch.config import files as config_files
from momatch.config.recipes import RECIPES, recipe
from momatch.config.schema import DistillConfig, TeacherConfig, to_json
from momatch.utils.errors import ConfigError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_survives_json(name):
    config = recipe(name)
    text = json.dumps(to_json(config))
    assert config_files.from_json(json.loads(text), type(config)) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": "8"}, "steps"),
        ({"stepz": 8}, "unknown config key 'stepz'"),
        ({"train": {"num_step": 8}}, "unknown config key 'train.num_step'"),
        ({"train": {"num_steps": 8.5}}, "train.num_steps"),
        ({"update": "both"}, "method.update"),
        ({"method": {"name": "alternating", "lambda_steps": 3}}, "unknown config key 'method.lambda_steps'"),
        ({"method": "gan"}, "method"),
        ({"weighting": {"name": "heavy"}}, "weighting.name"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(change, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        config_files.from_json(change, DistillConfig)


@pytest.mark.parametrize("steps", [0, 17, -1])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ConfigError, match=f"steps is {steps}; use 1 to 16"):
        DistillConfig(steps=steps)


def test_impossible_values_are_refused():
    base = DistillConfig()
    for field, inner, value in (
        ("train", "num_steps", 0),
        ("train", "batch_size", -3),
        ("optim", "learning_rate", 0.0),
        ("optim", "beta2", 1.0),
        ("weighting", "exponent", -1.0),
        ("monitor", "num_samples", 5),
    ):
        with pytest.raises(ConfigError, match=rf"{field}\.{inner} is {value}"):
            dataclasses.replace(getattr(base, field), **{inner: value})
    with pytest.raises(ConfigError, match="cond_dropout"):
        TeacherConfig(cond_dropout=1.0)


def test_differences_are_named():
    a, b = to_json(DistillConfig()), to_json(DistillConfig(steps=4))
    assert config_files.differences(a, b) == ["steps: 8 there, 4 here"]
