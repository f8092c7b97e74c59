"""The command line. Imports nothing heavy, so that `momatch --help` answers at once."""

from momatch.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
