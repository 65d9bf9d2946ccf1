"""What the machine offers: where to compute, in which type, and how much memory was used."""

import resource

import torch

from gptq.errors import UserError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU if there is one. Raises UserError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu") from error
    return device


def pick_dtype(name: str | None, device: torch.device, stored: object) -> torch.dtype:
    """The type of activations: float32 on a CPU, on a GPU the model's own 16-bit type."""
    if name is not None:
        if name not in _DTYPES:
            raise UserError(f"--dtype {name} is not known; choose one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else half_dtype(stored)


def half_dtype(stored: object) -> torch.dtype:
    """The 16-bit type that a model is stored in; float16 where it is stored wider."""
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, where the device's allocator can; a process's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the allocator's peak, on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
