"""The compiled CUDA code: a shared library beside this file, called through ctypes.

`Launch` takes tensors of whatever memory the library reads, so that tests can hand it a library
that the host's compiler made of the same source.
"""

import ctypes
import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant_cuda import sources
from quant_cuda.cuda.tuned import Table, table_for

__all__ = ["LIBRARY", "SIGNATURES", "Launch", "available", "current", "load"]

LIBRARY = Path(__file__).with_name("_cuda.so")

# The C arguments of each launcher that is not in `kernels.KERNELS`: p for a pointer, i for an int.
SIGNATURES = {
    "dequantize": "ii ppp iiii p",
    "add_partials": "i ppp iii p",
    "plain_dequantize": "ii ppppp iii p",
    "sweep_block": "pppppppppp iiiiiii p",
    "refine_group": "pppppp iiiii p",
    "decode": "p i p p",
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int}


def load(path: Path) -> ctypes.CDLL:
    """A library of the kernels."""
    library = ctypes.CDLL(str(path))
    library.quant_cuda_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library. Warns, and returns None, if there is one that cannot be used."""
    if not LIBRARY.exists():
        return None
    try:
        found = load(LIBRARY)
    except OSError as error:
        warnings.warn(f"{LIBRARY} cannot be loaded ({error}): pip install . again", stacklevel=4)
        return None
    if sources.is_stale(found, "cuda"):
        warnings.warn(sources.stale_text(LIBRARY), stacklevel=4)
        return None
    return found


@dataclass(frozen=True)
class Launch:
    """Where kernels run."""

    library: ctypes.CDLL
    stream: int
    processors: int
    """Multiprocessors of the device."""
    wgmma: bool = False
    """Whether it runs the kernels for compute capability 9.0."""
    tuned: Table | None = None
    """What was measured on this kind of GPU."""

    def __call__(
        self, name: str, *arguments: int | Tensor | None, signature: str | None = None
    ) -> None:
        """Call the launcher `quant_cuda_<name>`; of a tensor it gets the address.

        signature: of its C arguments, the stream included; None for that of SIGNATURES.
        Raises RuntimeError if the launch fails.
        """
        function = getattr(self.library, f"quant_cuda_{name}")
        if function.argtypes is None:
            kinds = (signature or SIGNATURES[name]).replace(" ", "")
            function.argtypes = [_KINDS[kind] for kind in kinds]
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        code = function(*plain, self.stream)
        if code:
            raise RuntimeError(f"{name} failed: {self.library.quant_cuda_error(code).decode()}")


@functools.cache
def available() -> bool:
    """Whether the kernels were built and there is a GPU that runs them (compute capability 8.0)."""
    if not LIBRARY.exists() or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and _library() is not None


def current(x: Tensor) -> Launch:
    """The library on the current stream of x's GPU. Raises RuntimeError if it was not built."""
    library = _library()
    if library is None:
        raise RuntimeError("no CUDA kernels were built from these sources: pip install . with nvcc")
    stream = torch.cuda.current_stream(x.device).cuda_stream
    processors, wgmma, tuned = _capabilities(x.device)
    return Launch(library, stream, processors, wgmma, tuned)


@functools.cache
def _capabilities(device: torch.device) -> tuple[int, bool, Table | None]:
    """The processors, wgmma and tuned of a `Launch` on this GPU."""
    properties = torch.cuda.get_device_properties(device)
    library = _library()
    has_wgmma = library is not None and bool(library.quant_cuda_has_wgmma())
    wgmma = has_wgmma and torch.cuda.get_device_capability(device) == (9, 0)
    return properties.multi_processor_count, wgmma, table_for(properties.name)
