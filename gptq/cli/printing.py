"""What can be printed: on terminals of any encoding, and with names that others chose."""

import contextlib
import io
import re
import sys

_SURROGATES = re.compile("[\ud800-\udfff]")
# Besides control characters: the marks that turn the direction of text around, and line ends.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def prepare_streams() -> None:
    """Let the standard streams take any text.

    What the encoding of an output lacks is printed as an escape, each line as soon as it is
    complete. Bytes of the input that are no text become U+FFFD.
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


def printable(text: str) -> str:
    """A name or message with its control characters as escapes, as in `\\x1b`."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def without_surrogates(text: str) -> str:
    """Text that can be encoded: what a system's name or argument has of other bytes is U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)
