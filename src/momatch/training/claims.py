"""Whose a run's folder is: one process at a time, one config, one set of inputs; and making a run longer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from momatch.config import files as config_files
from momatch.config.given import as_yaml
from momatch.config.schema import DistillConfig, RunConfig, TeacherConfig, to_json
from momatch.models.provenance import Inputs
from momatch.training import distributed
from momatch.utils.errors import ConfigError
from momatch.utils.files import write_atomically
from momatch.utils.run_folder import RunFolder, exclusive

Config = TypeVar("Config", TeacherConfig, DistillConfig)
# Settings of train that change no number, or but in its last digits.
SAME_NUMBERS = ("prefetch", "checkpoint_every", "compile", "keep", "accumulate", "checkpointing")


@contextlib.contextmanager
def alone_in(directory: Path | None) -> Iterator[None]:
    """Inside, no other run works in `directory`; the main process holds its lock, for all.

    Raises:
        ConfigError: if another run does, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if directory:
            distributed.on_main(lambda: stack.enter_context(exclusive(directory, "training in")))
        yield


def claim(directory: Path, config: RunConfig, inputs: Inputs | None = None) -> None:
    """Make `directory` the run folder of this config and these inputs; a folder that is so already is fine.

    Raises:
        ConfigError: if it belongs to a run of another config, or cannot be written.
        RunError: if processes that train together were given different configs or inputs.
    """
    wanted = {**to_json(config), "inputs": (inputs or Inputs()).to_json()}
    distributed.check_same("settings, teacher and data", json.dumps(wanted))
    distributed.on_main(lambda: _claim(directory, config, wanted))


def _claim(directory: Path, config: RunConfig, wanted: dict[str, Any]) -> None:
    folder = RunFolder(directory)
    if folder.exists:
        changed = _changed(folder, config, wanted)
        former_end = _extends(folder, config, wanted)
        if changed and folder.begun and not former_end:
            raise ConfigError(
                f"{directory} holds a run of another config ({'; '.join(changed[:3])}); "
                "choose another --out, or delete that folder (to raise train.num_steps alone, add --extend)"
            )
        if not changed:
            return
        if former_end:
            steps = config.train.num_steps
            folder.append([dict(event="extended", step=former_end, num_steps=steps)])
        else:
            folder.second_moments.unlink(missing_ok=True)  # of a run that failed before its first step
    check_is_free(folder)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(wanted, indent=2) + "\n"
        write_atomically(folder.config, lambda temporary: temporary.write_text(text))
        write_atomically(folder.settings, lambda path: path.write_text(as_yaml(config), encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot write into {directory}: {error.strerror or error}; choose another --out"
        ) from None


def check_is_free(folder: RunFolder) -> None:
    """Refuse a folder that holds something else than a run."""
    if not folder.exists and not folder.is_empty:
        raise ConfigError(
            f"{folder.path} is not empty and no run's folder (no config.json); choose another --out"
        )


def extended(config: Config, directory: Path) -> Config:
    """The config of the run in `directory`, made as long as `config` says.

    Raises:
        ConfigError: if there is no run, or it cannot be made longer, or this would make it shorter.
    """
    return replace(
        config,
        train=replace(
            config.train,
            extended_at=tuple(
                distributed.on_main(lambda: _former_ends(RunFolder(directory), config.train.num_steps))
            ),
        ),
    )


def _former_ends(folder: RunFolder, steps: int) -> list[int]:
    if not folder.exists:
        raise ConfigError(f"there is no run in {folder.path} to extend; leave out --extend")
    if any(row.get("event") == "stop" for row in folder.rows()):
        raise ConfigError(
            f"the run in {folder.path} was ended by its stopping rule and cannot be extended; choose another "
            "--out"
        )
    try:
        train = _read(folder).get("train", {})
        before, ends = int(train.get("num_steps", 0)), [int(end) for end in train.get("extended_at", [])]
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{folder.config} is damaged (train); choose another --out or delete the folder"
        ) from None
    if steps < before:
        raise ConfigError(
            f"train.num_steps is {steps}, but the run in {folder.path} has {before}; give more with --extend"
        )
    return ends if steps == before else [*ends, before]


def _extends(folder: RunFolder, config: RunConfig, wanted: dict[str, Any]) -> int:
    """Where the folder's run ended, if what is wanted is that run, made longer; else 0."""
    train = wanted["train"]
    if not train["extended_at"]:
        return 0
    *ends, former = train["extended_at"]
    shorter = {**wanted, "train": {**train, "num_steps": former, "extended_at": ends}}
    return 0 if _changed(folder, config, shorter) else former


def _changed(folder: RunFolder, config: RunConfig, wanted: dict[str, Any]) -> list[str]:
    """In what the config of a folder differs from the one that is wanted; a run may go on on another device.

    Raises:
        ConfigError: if the folder's config is damaged.
    """
    found = _read(folder)
    with contextlib.suppress(ConfigError):  # an earlier version's, or an unknown one, which differs anyway
        if found.get("kind") == wanted["kind"]:
            found |= to_json(config_files.from_json(found, type(config)))
            found = {key: value for key, value in found.items() if key in wanted}
    same = {"device": None, "parallel": None}
    return config_files.differences(_learned_from(found) | same, _learned_from(wanted) | same)


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        found = json.loads(folder.config.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(
            f"{folder.config} is damaged ({error}); choose another --out or delete the folder"
        ) from None
    return found


def _learned_from(fields: dict[str, Any]) -> dict[str, Any]:
    """A config without what does not change what is learned."""
    train = fields.get("train")
    if not isinstance(train, dict):
        return fields
    return {**fields, "train": {k: v for k, v in train.items() if k not in SAME_NUMBERS}}
