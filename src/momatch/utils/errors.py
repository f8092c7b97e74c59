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
    """Long work was stopped; what was done is saved, and the message says how to go on.

    Args:
        message: for the user.
        preempted: by SIGTERM, as when a machine is taken away: the command line exits with 75 then (the
            EX_TEMPFAIL of sysexits.h: the same command again goes on), otherwise with 130.
    """

    def __init__(self, message: str, preempted: bool = False):
        super().__init__(message)
        self.exit_code = 75 if preempted else 130
