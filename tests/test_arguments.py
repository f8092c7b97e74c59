"""Words of a command line become typed values, or one sentence that names the word and the remedy."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from momatch.cli import main
from momatch.cli import parsing as arguments
from momatch.cli.parsing import integers, numbers, parse
from momatch.utils.errors import UsageError


@dataclass(frozen=True)
class Inner:
    """Inside another."""

    channels: tuple[int, ...] = (8,)
    rates: tuple[float, ...] = ()
    centre: bool = False
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Words:
    """Of every type that our commands use."""

    run: tyro.conf.Positional[str]
    name: str
    num: int | None = None
    method: Literal["a", "b"] | None = None
    eta: float = 1.0
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    network: Inner = field(default_factory=Inner)
    flat: Annotated[Inner, tyro.conf.arg(name="")] = field(default_factory=Inner)


GIVEN = "r --name n "
READ = {
    "--eta -1.5": ("eta", -1.5),
    "--eta=-1e-3": ("eta", -1e-3),
    "--eta -inf": ("eta", float("-inf")),
    "--num -3": ("num", -3),
    "--num=4": ("num", 4),
    "--num None": ("num", None),
    "--num 3 --num 4": ("num", 4),
    "--method b": ("method", "b"),
    "--method None": ("method", None),
    "--prompt x --prompt=--y": ("prompt", ("x", "--y")),
    "--name=--x": ("name", "--x"),
    "--network.channels 8 -16": ("network", Inner(channels=(8, -16))),
    "--network.channels": ("network", Inner(channels=())),
    "--network.channels 8 --network.channels 4": ("network", Inner(channels=(4,))),
    "--network.rates 1 .5": ("network", Inner(rates=(1.0, 0.5))),
    "--network.centre --network.no-centre": ("network", Inner()),
    "--centre": ("flat", Inner(centre=True)),
    "--network.pair 3 4": ("network", Inner(pair=(3, 4))),
}


@pytest.mark.parametrize("words", READ)
def test_words_become_values(words):
    name, value = READ[words]
    found = getattr(parse(Words, (GIVEN + words).split(), "c"), name)
    assert found == value and type(found) is type(value)


def test_a_default_is_where_one_begins():
    default = Words(tyro.MISSING, tyro.MISSING, num=5, network=Inner(rates=(0.5,)))
    found = parse(Words, [*GIVEN.split(), "--network.centre"], "c", default)
    assert found == Words("r", "n", num=5, network=Inner(rates=(0.5,), centre=True))


REFUSED = {
    GIVEN + "--num 1.5": "--num '1.5' is not a whole number",
    GIVEN + "--num=": "--num '' is not a whole number",
    GIVEN + "--num -x": "--num needs a value",
    GIVEN + "--num --eta 1": "--num needs a value",
    GIVEN + "--eta=x": "--eta 'x' is not a number",
    GIVEN + "--prompt": "--prompt needs a value",
    GIVEN + "--method c": "--method 'c' is none of 'None', 'a', 'b'",
    GIVEN + "--network.channels 8 x 16": "--network.channels 'x' is not a whole number",
    GIVEN + "--network.channels=8 1.5": "--network.channels '1.5' is not a whole number",
    GIVEN + "--network.rates 1 y": "--network.rates 'y' is not a number",
    GIVEN + "--network.pair 3": "--network.pair needs 2 values",
    GIVEN + "--network.pair 3 4 5": "c does not take 5",
    GIVEN + "--centre True": "--centre takes no value, got 'True'; say --centre or --no-centre",
    GIVEN + "--network.no-centre=0": "--network.no-centre takes no value, got '0'; "
    "say --network.no-centre or --network.centre",
    GIVEN + "other more": "c does not take other more",
    GIVEN + "--nmu=3": "c does not take --nmu=3; did you mean --num?",
    GIVEN + "--nmu 3 --network.chanels 8": "c does not take --nmu 3 --network.chanels 8; "
    "did you mean --num and --network.channels?",
    GIVEN + "--zzz": "c does not take --zzz",
    GIVEN + "-n 3": "c does not take -n 3",
    "": "c needs RUN and --name STR",
    "r": "c needs --name STR",
    "--name n": "c needs RUN",
    "r --nmae n": "c does not take --nmae n",
    "--nmu 3 r --name n": "c does not take --nmu; did you mean --num?",
    "--zzz r --name n": "c does not take --zzz",
}


@dataclass(frozen=True)
class Named(Words):
    """With a name for what has no option, as our commands have it."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]


@pytest.mark.parametrize("words", REFUSED)
def test_words_that_cannot_be_read_become_one_sentence(words, capsys):
    with pytest.raises(UsageError) as error:
        parse(Named, words.split(), "c")
    assert str(error.value) == f"{REFUSED[words]} (see momatch c --help)"
    said = capsys.readouterr()
    assert not said.out and not said.err, "tyro's own words; its private events have changed"


def test_tyro_still_has_the_private_events_that_we_read():
    from tyro import _errors

    names = ("MissingArgs", "UnrecognizedArgs", "BadValue", "InvalidChoice", "InstantiationFailure")
    missing = [name for name in (*names, "on_parse_error") if not hasattr(_errors, name)]
    assert not missing, "tyro has changed: see momatch.cli.parsing._objections_raised"


def test_without_those_events_tyro_speaks_for_itself(monkeypatch, capsys):
    monkeypatch.delattr(tyro, "_errors")
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    with pytest.raises(SystemExit) as stop:
        parse(Named, ["r"], "c")
    assert stop.value.code == 2 and "--name" in capsys.readouterr().err


COMMANDS = [
    *("demo", "sample", "evaluate", "guidance", "export", "report", "prepare", "serve", "compare"),
    *("distill digits-8", "train-teacher digits-teacher", "train-teacher emoji16-teacher", "plan digits-8"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_we_suggest_are_those_that_tyro_shows(command, capsys, monkeypatch):
    """What is listed to suggest an option from is made apart from tyro's own list."""
    listed = []
    made = arguments._options

    def noted(*given):
        listed.append(made(*given))
        return listed[-1]

    monkeypatch.setattr(arguments, "_options", noted)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    rows = re.findall(r"^[│ ] (--\S+?)(?:, (--\S+))? ", capsys.readouterr().out, re.MULTILINE)  # one column
    assert listed and {option for row in rows for option in row if option} == set(listed[-1])


def test_lists_in_one_word():
    assert integers("1,-2, 4", "--steps") == (1, -2, 4)
    assert numbers("0,.5,1e3", "--scales") == (0.0, 0.5, 1000.0)
    for read, text in ((integers, "1,,2"), (integers, "1.5"), (numbers, ""), (numbers, "1;2")):
        with pytest.raises(UsageError, match=f"^--x '{re.escape(text)}' is not a list of .*numbers such as"):
            read(text, "--x")
    with pytest.raises(UsageError, match="^--x '1,2147483648' has numbers that are too large"):
        integers("1,2147483648", "--x")
