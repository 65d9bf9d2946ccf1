"""What a command line prints on standard error while it works, where that is no terminal."""

import re

TIMES = r"\d+:\d\d:\d\d so far, about \d+:\d\d:\d\d left"
_LINE = rf"^(quantizing|evaluating [^\n]+|benchmark): [^\n]*, {TIMES}\n"


# Tests calibrate on little text, since it is quick.
_FEW = r"^warning: [^\n]+ different tokens are few [^\n]+\n"


def without_progress(text: str) -> str:
    """Standard error without its lines of progress, and without a warning of little text."""
    return re.sub(f"{_LINE}|{_FEW}", "", text, flags=re.M)
