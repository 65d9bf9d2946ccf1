"""What a command line prints on standard error while it works, where that is no terminal."""

import re

TIMES = r"\d+:\d\d:\d\d so far, about \d+:\d\d:\d\d left"
_LINE = rf"^(quantizing|evaluating [^\n]+|benchmark): [^\n]*, {TIMES}\n"


def without_progress(text: str) -> str:
    """Standard error without its lines of progress."""
    return re.sub(_LINE, "", text, flags=re.M)
