"""From the words of a command line to typed arguments; what cannot be read becomes one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from momatch.config.given import read_given
from momatch.config.recipes import RECIPES, recipe
from momatch.config.schema import DistillConfig, RunConfig, Steps, TeacherConfig
from momatch.methods import registry
from momatch.models.request import MAX_STUDENT_STEPS
from momatch.utils.errors import ConfigError, UsageError

Arguments = TypeVar("Arguments")
Number = TypeVar("Number", int, float)
# What an argument is called in --help.
RunName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
LEFT_OUT = "(optional)"  # where tyro would say "(default: None)"
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=LEFT_OUT)]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=LEFT_OUT)]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=LEFT_OUT)]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=LEFT_OUT)]
UNNAMED = tyro.conf.arg(name="")  # its fields are options without a name before them
ALIKE = 0.7  # of a mistyped option and the one that is perhaps meant, by difflib: --nmu and --num are 0.8
RENAMED = {
    "--update": "--method.update",
    "--teacher-term": "--method.teacher-term",
    "--instant.product": "--method.product",
    "--instant.lambda-steps": "--method.lambda-steps",
    "--instant.lambda-eps": "--method.lambda-eps",
    "--instant.centre": "--method.centre",
}
BOOLEANS = ("true", "false")
FORMS = tyro.constructors.ConstructorRegistry()  # our readings of words, whose errors are sentences


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
            raise UsageError("--config needs a file: a .yaml, .toml or .json, such as a run's config.yaml")
        config, rest = read_given(Path(arguments[1]), kind), arguments[2:]
    elif arguments[0].startswith("-"):
        raise UsageError(f"name the recipe first: momatch {command} RECIPE {arguments[0]} …")
    else:
        config, rest = recipe(arguments[0]), arguments[1:]
    if kind is not None and not isinstance(config, kind):
        right = "train-teacher" if isinstance(config, TeacherConfig) else "distill"
        raise ConfigError(f"{arguments[0]} is for momatch {right}, not for momatch {command}")
    return _with_method(config, rest)


def _with_method(config: RunConfig, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """The config with the algorithm that --method names, and the arguments left.

    It is read before all others, since it decides which settings there are under --method.
    """
    rest = list(arguments)
    while (at := next((i for i, word in enumerate(rest) if _name(word) == "--method"), None)) is not None:
        word = rest.pop(at)
        name = word.partition("=")[2] if "=" in word else rest.pop(at) if at < len(rest) else ""
        if not name or name.startswith("--"):
            raise UsageError(f"--method needs a value: {' or '.join(registry.names())}")
        if not isinstance(config, DistillConfig):
            raise UsageError(f"--method {name}: a teacher is trained by denoising; leave it out")
        if name != config.method.name:
            config = replace(config, method=registry.read(name))
    for word in rest:
        key = _name(word).removeprefix("--method.").replace("-", "_")
        if isinstance(config, DistillConfig) and _name(word).startswith("--method."):
            own = type(config.method)
            others = [n for n in registry.names() if key in _settings_of(registry.config_type(n))]
            if key not in _settings_of(own) and others:
                belongs = f"is a setting of --method {' and '.join(others)}"
                raise UsageError(f"{_name(word)} {belongs}, not of {config.method.name}")
        if (now := RENAMED.get(_name(word))) is not None:
            raise UsageError(f"{_name(word)} is called {now} now")
    return config, rest


def _settings_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def parse(
    kind: type[Arguments], arguments: list[str], command: str, default: Arguments | None = None
) -> Arguments:
    """Read arguments into `kind`; of an option given twice, the last counts.

    Raises:
        UsageError: if the arguments are wrong. SystemExit(0) after --help.
    """
    options = _options(kind, default)
    # A default that is one of a union stays what it is: a U-ViT's shape does not become a U-Net's.
    how: dict[str, Any] = {"config": (tyro.conf.AvoidSubcommands,), "registry": FORMS}
    if default is not None:
        how["default"] = default
    try:
        _check_switches(arguments, options)
        with _objections_raised():
            return tyro.cli(kind, args=arguments, prog=f"momatch {command}", **how)
    except _Objection as objection:
        sentence = _sentence(objection, arguments, command, options)
        raise UsageError(f"{sentence} (see momatch {command} --help)") from None


@dataclass(eq=False)
class _Objection(Exception):
    """What is wrong with arguments: `names` of options or positionals, and `words` as they were given."""

    problem: Literal["missing", "unknown", "too few", "no choice", "no such value", "switch"]
    names: Sequence[str] = ()
    words: Sequence[str] = ()
    count: int = 1  # of values that are needed
    reason: str = ""


@contextlib.contextmanager
def _objections_raised() -> Iterator[None]:
    """Raise tyro's objections instead of printing them.

    This is all that is used of tyro's private parts: it has no public way yet to learn what is wrong but its
    printed page. An objection that is new to us, and all of them in a tyro without this module, is printed by
    tyro itself, which then exits with 2 as well.
    """
    try:
        from tyro import _errors
    except ImportError:
        yield
        return

    def name(argument: Any) -> str:
        lowered = argument.lowered
        return str(lowered.metavar) if argument.is_positional() else "/".join(lowered.name_or_flags)

    def needed(argument: Any) -> str:
        return name(argument) if argument.is_positional() else f"{name(argument)} {argument.lowered.metavar}"

    def refuse(event: Any) -> None:
        match event:
            case _errors.MissingArgs(missing_arguments=missing, unrecognized_tokens=words):
                raise _Objection("missing", [needed(each.arg) for each in missing], words)
            case _errors.UnrecognizedArgs(tokens=words):
                raise _Objection("unknown", words=words)
            case _errors.BadValue(argument=argument) if isinstance(count := argument.lowered.nargs, int):
                raise _Objection("too few", [name(argument)], count=count)
            case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
                raise _Objection("no choice", [name(argument)], [value], reason=", ".join(map(repr, choices)))
            case _errors.InstantiationFailure(argument=argument, message=message):
                raise _Objection("no such value", [name(argument)] if argument else [], reason=message)

    with _errors.on_parse_error(refuse):
        yield


def _sentence(
    objection: _Objection, arguments: Sequence[str], command: str, options: Mapping[str, str]
) -> str:
    """What is wrong, its value, and what was perhaps meant."""
    names, words = " and ".join(objection.names), objection.words
    unknown = [word for word in arguments if _is_option(word) and _name(word) not in options]
    match objection.problem:
        case "missing" if words:  # perhaps a required one with a typing error, so first
            return f"{command} does not take {' '.join(words)}"
        case "missing":
            return f"{command} needs {names}"
        case "too few" if unknown and not _is_option(names):  # a positional is missing as it stands before
            return f"{command} does not take {unknown[0]}{_meant(unknown[:1], options)}"
        case "too few":
            return f"{names} needs {'a value' if objection.count == 1 else f'{objection.count} values'}"
        case "unknown":
            return f"{command} does not take {' '.join(words)}{_meant(unknown, options)}"
        case "no choice":
            return f"{names} {words[0]!r} is none of {objection.reason}"
        case "switch":
            given, opposite = objection.names
            return f"{given} takes no value, got {words[0]!r}; say {given} or {opposite}"
        case _:
            return f"{names} {objection.reason}".strip()


def _meant(unknown: Sequence[str], options: Mapping[str, str]) -> str:
    near = [m for word in unknown for m in difflib.get_close_matches(_name(word), options, 1, ALIKE)]
    return f"; did you mean {' and '.join(dict.fromkeys(near))}?" if near else ""


def _is_option(word: str) -> bool:
    return word.startswith("--") and word != "--"


def _name(word: str) -> str:
    """The option's name in --option, --option=value or, as tyro takes that too, --some_option."""
    return word.partition("=")[0].replace("_", "-")


def _check_switches(arguments: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse a value for a switch, which tyro would take for a positional."""
    for word, following in itertools.pairwise([*arguments, ""]):
        name, (_, equals, value) = _name(word), word.partition("=")
        if options.get(name) and (equals or following.lower() in BOOLEANS):
            raise _Objection("switch", [name, options[name]], [value if equals else following])


def _options(kind: type, default: Any = None, prefix: str = "") -> dict[str, str]:
    """The options that tyro makes of a dataclass; each switch, which takes no value, with its opposite."""
    found: dict[str, str] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional in marks or tyro.conf.Suppress in marks:
            continue
        hint = get_args(hint)[0] if marks else hint
        name = prefix if UNNAMED in marks else f"{prefix}{field.name.replace('_', '-')}"
        value = getattr(default, field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        inner = type(value) if dataclasses.is_dataclass(value) else hint  # the default's, of a union
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found |= _options(inner, value, name if UNNAMED in marks else f"{name}.")
        else:
            on, off = f"--{name}", f"--{prefix}no-{name.removeprefix(prefix)}"
            found |= {on: off, off: on} if hint is bool else {on: ""}
    return found


def _form(kind: type[int] | type[float]) -> PrimitiveConstructorSpec:
    read = whole_number if kind is int else number
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: type(value) in (kind, int),
        str_from_instance=lambda value: [str(value)],
    )


@FORMS.primitive_rule
def _number(form: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Whole and other numbers as tyro reads them, but for what is said of other words."""
    return _form(form.type) if form.type in (int, float) else None


@FORMS.primitive_rule
def _numbers(form: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Tuples of any length of numbers; tyro would name all their words, not the wrong one."""
    if form.type not in (tuple[int, ...], tuple[float, ...]) or tyro.conf.UseAppendAction in form.markers:
        return None
    each = _form(get_args(form.type)[0])
    return dataclasses.replace(
        each,
        nargs="*",
        metavar=f"[{each.metavar} [{each.metavar} ...]]",
        instance_from_str=lambda words: tuple(each.instance_from_str([word]) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(map(each.is_instance, value)),
        str_from_instance=lambda value: [str(part) for part in value],
    )


@FORMS.primitive_rule
def _step_counts(form: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """One number of steps, or several: 8, 1,2,4,8 or 1..16."""
    if form.type != Steps:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: step_counts(words[0]),
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda value: [",".join(map(str, [value] if isinstance(value, int) else value))],
    )


@FORMS.primitive_rule
def _optional(form: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """X | None, as tyro reads it, but what is wrong is said of X alone."""
    kinds = get_args(form.type)
    if len(kinds) != 2 or type(None) not in kinds or form.type_origin not in (Union, types.UnionType):
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    whole = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(kind, form.markers)
    )
    if not isinstance(whole, PrimitiveConstructorSpec) or whole.nargs != 1:
        return None  # tyro's to read
    return dataclasses.replace(
        whole,
        metavar=f"{{None}}|{whole.metavar}",
        choices=whole.choices and ("None", *whole.choices),
        instance_from_str=lambda words: None if words == ["None"] else whole.instance_from_str(words),
        is_instance=lambda value: value is None or whole.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else whole.str_from_instance(value),
    )


def step_counts(word: str) -> int | tuple[int, ...]:
    """Read "8", "1,2,4,8" or "1..16"; the bounds are the config's to check.

    Raises:
        UsageError: as `whole_number`.
    """
    first, dots, last = word.partition("..")
    if dots:
        low, high = whole_number(first), whole_number(last)
        if not 1 <= low <= high <= MAX_STUDENT_STEPS:
            raise UsageError(f"{word!r} is no range of 1 to {MAX_STUDENT_STEPS}; write it as 1..16")
        return tuple(range(low, high + 1))
    return tuple(map(whole_number, word.split(","))) if "," in word else whole_number(word)


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers: "1,2,4" → (1, 2, 4)."""
    found = _listed(text, option, whole_number, "whole numbers such as 1,2,4")
    if any(abs(number) >= 2**31 for number in found):
        raise UsageError(f"{option} {text!r} has numbers that are too large; keep below {2**31}")
    return found


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read numbers: "0,0.5,1" → (0.0, 0.5, 1.0)."""
    return _listed(text, option, number, "numbers such as 0,0.5,1")


def _listed(text: str, option: str, read: Callable[[str], Number], what: str) -> tuple[Number, ...]:
    try:
        return tuple(read(part) for part in text.split(","))
    except UsageError:
        raise UsageError(f"{option} {text!r} is not a list of {what}") from None


def whole_number(word: str) -> int:
    """Read a whole number.

    Raises:
        UsageError: whose message wants the name of the option before it.
    """
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{word!r} is not a whole number") from None


def number(word: str) -> float:
    """Read a number; raises like `whole_number`."""
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"{word!r} is not a number") from None


def check_out(path: Path, *suffixes: str, option: str = "--out") -> None:
    """Make the folder of an output, and refuse one that cannot be written, before any work."""
    if path.suffix not in suffixes:
        raise UsageError(f"{option} {path} must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{option} {path}: the folder {path.parent} cannot be made ({error.strerror})"
        ) from None
