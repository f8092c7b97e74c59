"""From the words of a command line to typed arguments; what cannot be read becomes one sentence."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from momatch.config import files as config_files
from momatch.config.recipes import RECIPES, recipe
from momatch.config.schema import DistillConfig, RunConfig, TeacherConfig
from momatch.utils.errors import ConfigError, UsageError

Arguments = TypeVar("Arguments")
# What an argument is called in --help.
RunName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
LEFT_OUT = "(optional)"  # where tyro would say "(default: None)"
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=LEFT_OUT)]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=LEFT_OUT)]
BOX_LINE = re.compile(r"[╭╰+].*|[─-]{3,}")  # its frame, titles and rules; ASCII where the terminal wants it
TYRO_SENTENCES = [  # what tyro says, and what we say
    (
        r"Unrecognized options: (.+?) (?:Perhaps you meant|Arguments similar to \S+): (--\S+).*",
        "{command} does not take {0}; did you mean {1}?",
    ),
    (r"Unrecognized options: (.+)", "{command} does not take {0}"),
    (r"(--\S+): invalid literal for int\(\) with base 10: (.+)", "{0} {1} is not a whole number"),
    (
        r"(--\S+): no type matching .*invalid literal for int\(\) with base 10: (.+)",
        "{0} {1} is not a whole number",
    ),
    (r"(--\S+): could not convert string to float: (.+)", "{0} {1} is not a number"),
    (r"invalid choice (.+) for argument '(.+)'\. Expected one of \((.+)\)\.", "{1} {0} is none of {2}"),
    (r"Missing value for argument '(.+)'\..*", "{0} needs a value"),
]


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
            # A default that is one of a union stays what it is: a U-ViT's shape does not become a U-Net's.
            config = (tyro.conf.AvoidSubcommands,)
            if default is None:
                return tyro.cli(kind, args=arguments, prog=program, config=config)
            return tyro.cli(kind, args=arguments, prog=program, default=default, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip(" │|") for line in said.getvalue().splitlines() if line.strip()]
    if any(map(BOX_LINE.fullmatch, lines[1:2])):  # the first is a title then, in ASCII
        lines = lines[1:]
    words = " ".join(" ".join(line for line in lines if not BOX_LINE.fullmatch(line)).split())
    words = words.partition(" For full helptext")[0].partition(" Argument helptext:")[0]
    words = words.removeprefix("Error parsing ")
    raise UsageError(f"{_sentence(words, command)} (see momatch {command} --help)")


def _sentence(words: str, command: str) -> str:
    """What is wrong, its value, and what was perhaps meant; tyro's own words if they are none we know."""
    unknown = words.find("Unrecognized options: ")  # perhaps a required one with a typing error, so first
    words = words[max(unknown, 0) :]
    missing = re.fullmatch(r"Missing from .+?: (.+)", words)
    if missing:  # one after the other: its name, what it is, "(required)"
        named = [part.split() for part in missing[1].split("(required)") if part.strip()]
        return f"{command} needs {' and '.join(' '.join(n[: 1 + n[0].startswith('--')]) for n in named)}"
    for pattern, sentence in TYRO_SENTENCES:
        found = re.fullmatch(pattern, words)
        if found:
            first, *rest = found.groups()
            return sentence.format(first.replace(", ", " "), *rest, command=command)
    return words


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers: "1,2,4" → (1, 2, 4)."""
    try:
        found = tuple(int(part) for part in text.split(","))
        if any(abs(number) >= 2**31 for number in found):
            raise ValueError
        return found
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of whole numbers such as 1,2,4") from None


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read numbers: "0,0.5,1" → (0.0, 0.5, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers such as 0,0.5,1") from None


def check_out(path: Path, *suffixes: str) -> None:
    """Make the folder of an output, and refuse one that cannot be written, before any work."""
    if path.suffix not in suffixes:
        raise UsageError(f"--out {path} must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {path}: the folder {path.parent} cannot be made ({error.strerror})"
        ) from None
