"""Rewards by name, for methods/reward.py: those that come with the package, and anybody's function."""

from __future__ import annotations

import importlib
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from momatch.data.emoji import MASK, TOKENS
from momatch.data.images import ImageSet
from momatch.diffusion.interface import Cond
from momatch.evaluation.builtin import classifier
from momatch.evaluation.retrieval import SIDE, load_matcher
from momatch.methods.reward import RewardFunction
from momatch.utils.errors import ConfigError
from momatch.utils.text import first_line

COLOURS = ("red", "green", "blue")
KNOWN = "classifier, classifier:7, colour:red, brightness, similarity, or package.module:function"


def reward_function(name: str, data: ImageSet, device: torch.device | str = "cpu") -> RewardFunction:
    """The reward of that name, for samples like `data`.

    Args:
        name: "classifier:7", the log-probability of a label by the built-in classifier of the data;
            "classifier", that of the label asked for; "colour:red", how far a channel is above the mean of
            the other two; "brightness", the mean of all values; "similarity" of image and text by the emoji
            matcher, −1 to 1; or a function's name, see `RewardFunction`.
        data: the training data.
        device: where samples will be.

    Raises:
        ConfigError: if there is none, or it cannot judge such data.
    """
    kind, _, option = name.partition(":")
    if kind == "classifier":
        return _log_probability(name, option, data, device)
    if kind == "colour":
        return _colour(name, option, data)
    if name == "brightness":
        return lambda x, cond, rows: x.flatten(1).mean(1)
    if name == "similarity":
        return _similarity(name, data, device)
    if option:
        return _foreign(name)
    raise ConfigError(f"method.reward is {name!r}; use {KNOWN}")


def _log_probability(name: str, option: str, data: ImageSet, device: torch.device | str) -> RewardFunction:
    found = classifier(data)
    if found is None:
        raise ConfigError(
            f"method.reward is {name!r}, but no built-in classifier knows {data.name}; use another"
        )
    network = found.network.to(device).requires_grad_(False)
    if not option:

        def of_asked(x: Tensor, cond: Cond | None, rows: Tensor | None) -> Tensor:
            if not cond or "label" not in cond:
                raise ConfigError(
                    f"method.reward is {name!r}, but no label is asked for; use classifier:LABEL"
                )
            return F.log_softmax(network(x), dim=1).gather(1, cond["label"][:, None]).squeeze(1)

        return of_asked
    if not option.isdigit() or int(option) >= data.num_classes:
        raise ConfigError(f"method.reward is {name!r}; use classifier:0 to classifier:{data.num_classes - 1}")
    return lambda x, cond, rows: F.log_softmax(network(x), dim=1)[:, int(option)]


def _colour(name: str, option: str, data: ImageSet) -> RewardFunction:
    if option not in COLOURS:
        raise ConfigError(f"method.reward is {name!r}; use colour:{', colour:'.join(COLOURS)}")
    if data.space == "latents" or data.images.shape[1] != 3:
        raise ConfigError(f"method.reward is {name!r}, but {data.name} are not RGB images; use brightness")
    channel = COLOURS.index(option)

    def excess(x: Tensor, cond: Cond | None, rows: Tensor | None) -> Tensor:
        means = x.flatten(2).mean(2)
        return means[:, channel] * 1.5 - means.sum(1) / 2

    return excess


def _similarity(name: str, data: ImageSet, device: torch.device | str) -> RewardFunction:
    if data.classifier != "emoji-matcher" or TOKENS not in data.conditions:
        raise ConfigError(f"method.reward is {name!r}, but the matcher knows emoji alone; use your own")
    matcher = load_matcher().to(device).requires_grad_(False)

    def similarity(x: Tensor, cond: Cond | None, rows: Tensor | None) -> Tensor:
        assert cond is not None
        small = F.adaptive_avg_pool2d(x, min(SIDE, x.shape[-1]))
        return (matcher.pictures(small) * matcher.captions(cond[TOKENS], cond[MASK])).sum(1)

    return similarity


def _foreign(name: str) -> RewardFunction:
    module_name, _, function_name = name.partition(":")
    try:
        found = attrgetter(function_name)(importlib.import_module(module_name))
    except AttributeError:
        found = None
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"method.reward is {name!r}, but {module_name} cannot be imported ({first_line(error)}); "
            f"use {KNOWN}"
        ) from None
    if not callable(found):
        raise ConfigError(f"method.reward is {name!r}, which is no function of {module_name}; use {KNOWN}")
    return found  # type: ignore (checked on a minibatch)
