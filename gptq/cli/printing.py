"""What can be printed: on terminals of any encoding, and with names that others chose."""

import contextlib
import io
import logging
import re
import sys
import warnings

_SURROGATES = re.compile("[\ud800-\udfff]")
# Besides control characters: the marks that turn the direction of text around, and line ends.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Of what is more than a line: without line feeds, tabs, and marks that some scripts need.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Record(logging.LogRecord):
    """A message of a library, which may quote a downloaded file."""

    def getMessage(self) -> str:
        return harmless(super().getMessage())


def prepare_streams() -> None:
    """Let the standard streams take any text, and nothing command the terminal through them.

    What the encoding of an output lacks is printed as an escape, each line as soon as it is
    complete. Bytes of the input that are no text become U+FFFD. Warnings and messages of libraries
    are escaped as `printable` and `harmless` do.
    """
    for stream, options in (
        (sys.stdin, {"errors": "replace"}),
        (sys.stdout, {"errors": "backslashreplace", "line_buffering": True}),
        (sys.stderr, {"errors": "backslashreplace"}),
    ):
        if isinstance(stream, io.TextIOWrapper):
            # A stream that was read from stays as it is.
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(**options)

    warnings.formatwarning = _warning_line
    logging.setLogRecordFactory(_Record)


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {printable(str(message))}\n"


def harmless(text: str) -> str:
    """A text of any lines, with what can command a terminal as escapes."""
    return _COMMANDS.sub(lambda match: ascii(match[0])[1:-1], text)


def printable(text: str) -> str:
    """A name or message with its control characters as escapes, as in `\\x1b`."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def without_surrogates(text: str) -> str:
    """Text that can be encoded: what a system's name or argument has of other bytes is U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)
