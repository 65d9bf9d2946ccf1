"""Whether a compiled library was built from the sources beside it.

setup.py runs this file where torch is not installed: it imports the standard library only.
"""

import ctypes
import hashlib
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(part: str) -> str | None:
    """Of the sources of "cpu" or "cuda", which setup.py compiles in; None if they are not there."""
    folder = SOURCES / part
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted([*folder.iterdir(), *SOURCES.glob("*.h")]):
        if path.suffix in _SUFFIXES:
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def is_stale(library: ctypes.CDLL, part: str) -> bool:
    """Whether a library has another digest than the sources, or none, as those of old versions."""
    try:
        function = library.quant_cuda_sources
    except AttributeError:
        return True
    function.restype = ctypes.c_char_p
    # An installed package has no sources; its files were made together.
    expected = digest(part)
    return expected is not None and function().decode() != expected


def stale_text(path: Path) -> str:
    """What to tell a user of such a library."""
    return (
        f"{path} was built from other sources than those beside it and is not used; "
        "build it again: pip install . (for a checkout pip install -e ., or make)"
    )
