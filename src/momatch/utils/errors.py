"""Errors whose message is one sentence for the user: what, its value, the remedy."""

from __future__ import annotations


class UsageError(ValueError):
    """Something asked for cannot be done as asked. The command line exits with 2."""


class RunError(RuntimeError):
    """Something under way failed; what was done before is safe. The command line exits with 1."""


class Notice(UserWarning):
    """Something is not done that a file asks for; the message says what to do about it."""


class ConfigError(UsageError):
    """A config that cannot be run; the message names the key, the value and what to do."""


class Interrupted(Exception):
    """The user stopped long work; what was done is saved, and the message says how to go on."""
