"""Where to compute, in which dtype, and how much memory is free or was used."""

import math
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from gptq import torchrun
from gptq.errors import UserError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, flag: str = "--max-memory") -> int:
    """Bytes of a size such as 6GiB, 500MB or 2.5G. Raises UserError, which names the flag, for
    anything else."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    unit = None if size is None else {**_UNITS, **_BINARY_UNITS}.get(size[2])
    amount = 0.0 if size is None or unit is None else float(size[1]) * unit
    if amount in (0, math.inf):
        raise UserError(f"{flag} {text} is not a size: give one such as 6GiB or 500MB")
    return int(amount)


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process can allocate without swapping: of a GPU's memory, or its share of
    the machine's if torchrun started several processes on it.

    root: where /proc and /sys/fs/cgroup are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    entry = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    free = int(entry[1]) * 1024 if entry else sys.maxsize
    # meminfo is of the whole machine; a container's limits are in its control groups.
    limited = [_group_memory(group) for group in _memory_groups(root)]
    free = min([free, *(left for left in limited if left is not None)])
    return max(free, 0) // torchrun.local_size()


def _memory_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups whose limits hold for this process, the innermost first.

    A limit of any group on the way to the root of the tree holds. The memory controller is in
    version 1 or 2 (the kernel's cgroup-v1/memory.rst and cgroup-v2.rst).
    """
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in filter(None, _read(root / "proc/self/mountinfo").splitlines()):
        mount, _, system = line.partition(" - ")
        kind, *_, options = system.split()
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, place = mount.split()[3:5]
        # A container may see a part of the tree, by paths of the whole or of that part.
        group = PurePosixPath(paths[kind])
        inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        if ".." not in inside.parts:
            folder = root / place.lstrip("/")
            yield from (folder / part for part in (inside, *inside.parents))


def _group_memory(group: Path) -> int | None:
    """Bytes that a control group can still allocate; None if it has no limit."""
    # Version 2 reclaims memory above `high` before it fails at `max`.
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [
        int(text) for text in (_read(group / name).strip() for name in names) if text.isdigit()
    ]
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
    if not limits or not used.strip().isdigit():
        return None
    # Files' pages count as used, but are dropped when memory is needed. Version 1 counts those of
    # the groups inside in the line that begins with total_.
    pages: dict[str, str] = dict(
        re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    )
    cached = int(pages.get("total_inactive_file") or pages.get("inactive_file") or "0")
    return min(limits) - max(int(used) - cached, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def pick_device(name: str | None) -> torch.device:
    """The device of that name; for None a GPU if there is one, of the processes that torchrun
    started one for each.

    Raises UserError for a device that is unknown or cannot be used.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda" if torchrun.size() == 1 else f"cuda:{torchrun.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu") from error
    if device.type == "meta":
        raise UserError(f"--device {name} cannot be used (it holds no data); try --device cpu")
    return device


def pick_dtype(name: str | None, device: torch.device, stored: object) -> torch.dtype:
    """The dtype of activations by name; for None float32 on a CPU, and on a GPU `half_dtype`.

    stored: the dtype in the model's configuration, if it has one.
    Raises UserError for an unknown name.
    """
    if name is not None:
        if name not in _DTYPES:
            raise UserError(f"--dtype {name} is not known; choose one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else half_dtype(stored)


def calibration_dtype(name: str | None, device: torch.device, stored: object) -> torch.dtype:
    """As `pick_dtype`, for the forward that calibrates: on a CPU a model that is stored in bfloat16
    stays in it if matrix units multiply that."""
    if name is None and device.type == "cpu" and stored == torch.bfloat16 and has_matrix_units():
        return torch.bfloat16
    return pick_dtype(name, device, stored)


def has_matrix_units() -> bool:
    """Whether this processor has AMX, as far as torch can tell."""
    # The default is `bool`, which returns False, for versions of torch without that function.
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def training_dtype(device: torch.device) -> torch.dtype:
    """Of matrix products in a training: bfloat16 if the device multiplies it fast, or float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = has_matrix_units()
    return torch.bfloat16 if fast else torch.float32


def half_dtype(stored: object) -> torch.dtype:
    """The 16-bit dtype that a model is stored in; float16 if it is stored in another dtype."""
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks of a GPU's allocator; a process's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the allocator's peak, on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage counts the process that started this one, if that was larger.
    entry = re.search(r"VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")))
    return 1024 * (int(entry[1]) if entry else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
