"""What all command lines share: how they parse, report an error and end."""

import argparse
import shlex
import sys
import traceback
from typing import NoReturn

from gptq import __version__, torchrun
from gptq.cli.printing import printable
from gptq.cli.settings import spelled
from gptq.errors import SettingError, UserError

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# Errors that input, files or the machine cause wherever they are raised, by the full names of
# their classes, so that nothing is imported; and what is said before their own reason.
_INPUT_ERRORS = {
    "builtins.MemoryError": "there is not enough memory",
    "torch.OutOfMemoryError": "there is not enough memory",
    "builtins.RecursionError": "a file, template or text is nested too deeply",
    "builtins.OverflowError": "a number is too large",
    "builtins.UnicodeError": "text cannot be encoded or decoded",
    "json.decoder.JSONDecodeError": "a file is not JSON",
    "jinja2.exceptions.TemplateError": "the chat template fails",
    "builtins.OSError": "",
}
# torch has no class for it.
_NO_MEMORY = "can't allocate memory"


class Parser(argparse.ArgumentParser):
    """Raises UserError for a command line that cannot be parsed; takes no abbreviated flags."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def report_error(stop: Exception | KeyboardInterrupt) -> int:
    """Print why a command ends; returns its exit code.

    What a user can correct is one line; anything else is a bug, and keeps its traceback. Of
    several processes that torchrun started, the first on each machine prints what all run into.
    """
    message = None if isinstance(stop, KeyboardInterrupt) else input_error(stop)
    if isinstance(stop, KeyboardInterrupt):
        # A terminal has just shown ^C, without a line's end.
        text = f"\n{': '.join(('interrupted', *map(str, stop.args)))}"
        code = EXIT_INTERRUPTED
    elif message is not None:
        text, code = printable(f"error: {message}"), EXIT_BAD_INPUT
    else:
        text, code = _bug(stop), EXIT_BUG
    if torchrun.local_rank() == 0 or not isinstance(stop, (UserError, KeyboardInterrupt)):
        print(text, file=sys.stderr)
    return code


def input_error(error: BaseException) -> str | None:
    """One line for an error that input, files or the machine cause; None for a bug."""
    if isinstance(error, SettingError):
        text = f"{spelled(error.field, error.value)} {error.problem}"
    elif isinstance(error, UserError):
        text = str(error)
    else:
        classes = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
        kinds = [_INPUT_ERRORS[name] for name in classes if name in _INPUT_ERRORS]
        if isinstance(error, RuntimeError) and _NO_MEMORY in str(error):
            kinds = [_INPUT_ERRORS["builtins.MemoryError"]]
        if not kinds:
            return None
        text = _with_reason(kinds[0], error)
    return " ".join(text.splitlines())


def _with_reason(kind: str, error: BaseException) -> str:
    reason = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        reason = f"{' -> '.join(map(str, names))}: {error.strerror}"
    elif isinstance(error, UnicodeEncodeError):
        around = error.object[max(0, error.start - 30) : error.end + 30]
        reason = f"{around!a} as {error.encoding}: {error.reason}"
    if not kind:
        return reason or type(error).__name__
    return f"{kind} ({reason})" if reason else kind


def _bug(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    ask = (
        f"unexpected {type(error).__name__}: please report it with the output of `gptq --version` "
        f"({__version__}), the command ({shlex.join(sys.argv)}) and this traceback:"
    )
    return "\n".join(map(printable, (ask, *trace.rstrip().splitlines())))
