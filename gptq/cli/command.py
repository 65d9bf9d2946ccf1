"""What all command lines share: how they parse, report an error and end."""

import argparse
import sys
from typing import NoReturn

from gptq import torchrun
from gptq.cli.settings import spelled
from gptq.errors import SettingError, UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Raises UserError for a command line that cannot be parsed; takes no abbreviated flags."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def report_error(stop: UserError | KeyboardInterrupt) -> int:
    """Print in one line why a command ends; returns its exit code.

    Of several processes that torchrun started, only the first prints.
    """
    if isinstance(stop, UserError):
        line, code = f"error: {' '.join(_message(stop).splitlines())}", EXIT_BAD_INPUT
    else:
        # A terminal has just shown ^C, without a line's end.
        line, code = f"\n{': '.join(('interrupted', *map(str, stop.args)))}", EXIT_INTERRUPTED
    if torchrun.rank() == 0:
        print(line, file=sys.stderr)
    return code


def _message(error: UserError) -> str:
    """The error's message, with a setting named as the command line spells it."""
    if isinstance(error, SettingError):
        return f"{spelled(error.field, error.value)} {error.problem}"
    return str(error)
