"""Every field of every config is checked the moment it is made: words, types, bounds, NaN and infinity."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic.fields import FieldInfo

from momatch import config
from momatch.config import DistillConfig, TeacherConfig
from momatch.config.recipes import recipe
from momatch.config.schema import Steps
from momatch.methods import registry
from momatch.networks.configs import UNetConfig, UViTConfig
from momatch.utils.errors import ConfigError

METHODS = [registry.config_type(name) for name in registry.names()]
KINDS = [kind for name in config.__all__ if isinstance(kind := getattr(config, name), type)]
KINDS = [*{k: None for k in [*KINDS, *METHODS] if dataclasses.is_dataclass(k)}]
NETWORKS = [UNetConfig, UViTConfig]


def bounds_of(hint: Any) -> list[Any]:
    found = []
    for mark in getattr(hint, "__metadata__", ()):
        found += mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return found


def inner(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def wrong_values(hint: Any) -> list[Any]:
    """Values that a field of this type must refuse."""
    kind = inner(hint)
    if get_origin(kind) is Literal:
        return ["no such word", get_args(kind)[0].upper(), "", 3, None]
    if kind == Steps:
        return ["8", None, True, 0, 17, 2.0, math.nan, (), (0, 4), [4, "8"], [1, 17]]
    if get_origin(kind) is tuple:
        return ["8", 8, ({},), None]
    if kind == int | tuple[int, ...]:  # numbers of steps
        return ["1", None, True, math.nan, 2.0, 0, 17, (), (0, 4), ("1", 2)]
    if dataclasses.is_dataclass(kind) or not isinstance(kind, type):
        return ["no such settings", 3, None, math.nan]
    if kind is bool:
        return ["true", 1, None, math.nan]
    if kind is str:
        return [3, None, math.nan, b"digits"]
    wrong: list[Any] = ["1", None, True, math.nan, math.inf, -math.inf]
    if kind is int:
        wrong += [1.5, 2.0]
    for mark in bounds_of(hint):
        for name, beyond in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
            if hasattr(mark, name):
                wrong.append(kind(getattr(mark, name) + beyond))
    return wrong


def cases():
    for kind in KINDS:
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            for value in wrong_values(hints[field.name]):
                yield pytest.param(kind, field.name, value, id=f"{kind.__name__}.{field.name}={value!r}")


@pytest.mark.parametrize(("kind", "field", "value"), cases())
def test_a_field_refuses_what_it_cannot_hold_and_says_so_in_one_sentence(kind, field, value):
    for make in (lambda: kind(**{field: value}), lambda: dataclasses.replace(kind(), **{field: value})):
        with pytest.raises(ConfigError) as refused:
            make()
        sentence = str(refused.value)
        assert field in sentence and "\n" not in sentence and "pydantic" not in sentence
        assert ";" in sentence, "a remedy"


@pytest.mark.parametrize("shape", NETWORKS)
def test_the_shape_of_a_network_is_checked_when_it_becomes_part_of_a_config(shape):
    hints, refused = get_type_hints(shape), 0
    for field in dataclasses.fields(shape):
        for value in [*wrong_values(hints[field.name]), *([-1] if hints[field.name] is int else [])]:
            try:
                broken = dataclasses.replace(shape(), **{field.name: value})
                with pytest.raises((ConfigError, TypeError)) as error:
                    TeacherConfig(network=broken)
            except BaseException as failure:
                raise AssertionError(f"{shape.__name__}.{field.name} takes {value!r}") from failure
            refused += 1
            assert error.type is TypeError or f"network.{field.name}" in str(error.value)
    assert refused > 30


def test_every_config_was_walked():
    """Whatever stands in a run's config, at any depth, is among the kinds above."""

    def kinds(value: Any):
        yield type(value)
        for field in dataclasses.fields(value):
            if dataclasses.is_dataclass(inner_value := getattr(value, field.name)):
                yield from kinds(inner_value)

    for top in (DistillConfig(), TeacherConfig()):
        assert set(kinds(top)) <= {*KINDS, *NETWORKS}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"method": "gan"},
            "method is 'gan'; use alternating, consistency, discrete, dmd, instant, progressive, regression, "
            "reward, or your own as package.module:ConfigClass",
        ),
        ({"method": "Alternating"}, "method is 'Alternating'; use alternating, consistency"),
        ({"source": "dta"}, "source is 'dta'; use data or rollout"),
        ({"posterior": "frsh"}, "posterior is 'frsh'; use conditional or fresh"),
        ({"method": "os:path"}, "method is 'os:path', which is no MethodConfig"),
        ({"method": "no_such_module:C"}, "no_such_module cannot be imported"),
    ],
)
def test_a_misspelt_option_given_in_python_is_refused(change, sentence):
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(recipe("digits-8"), **change)
    assert sentence in str(refused.value)


def test_a_method_may_be_given_by_its_name():
    assert (
        dataclasses.replace(recipe("digits-8"), method="instant").method == registry.config_type("instant")()
    )
