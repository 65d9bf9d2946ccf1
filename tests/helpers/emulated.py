"""CUDA source as libraries for the host, under cuda_emulation.h, and a GPU's where there is one."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant_cuda.cuda import kernels, layout

HERE = Path(__file__).parent
KERNELS = sorted((HERE.parents[1] / "quant_cuda" / "csrc" / "cuda").glob("*.cu"))
CACHE = HERE.parents[1] / ".cache" / "emulated"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-x", "c++"]
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def build(
    folder: Path, sources: list[Path], sanitize: bool = False, objects: Sequence[Path] = ()
) -> Path:
    """Compile .cu files with the host's compiler into one shared library.

    objects: compiled before, to be linked with them.
    """
    includes = [f"-I{HERE}", f"-I{KERNELS[0].parent}"]
    extra = SANITIZE if sanitize else []
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        command = [COMPILER, *FLAGS, *extra, *includes, "-c", str(source), "-o", made]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_one, sources))
    library = folder / "emulated.so"
    subprocess.run(
        [COMPILER, "-shared", *extra, *made, *map(str, objects), "-o", str(library)], check=True
    )
    return library


def library() -> Path:
    """All kernels as one library beside their objects, kept in .cache until their source changes.

    Of several processes that ask for it one compiles.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / _digest()
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for other in CACHE.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
            # A folder with this name is whole.
            unfinished = CACHE / "unfinished"
            build(unfinished, KERNELS)
            unfinished.rename(folder)
    return folder / "emulated.so"


def _digest() -> str:
    """Of everything that the library is made from."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    found = hashlib.sha256(version + " ".join([COMPILER, *FLAGS]).encode())
    headers = [*KERNELS[0].parents[1].rglob("*.[hc]*"), *HERE.glob("*.h")]
    for path in sorted({*KERNELS, *headers}):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def sanitizer() -> str:
    """Path of AddressSanitizer's runtime, which has to be loaded before Python."""
    found = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@dataclass(frozen=True)
class Kernels:
    """The kernels of one library on one device."""

    library: CDLL
    device: str
    settle: Callable[[int, int], None]
    """Order of threads (0 to 4) and whether asynchronous copies land at once; nothing on a GPU."""
    wgmma: bool
    """Whether the kernel for compute capability 9.0 runs here."""

    def launch(self, processors: int = 4) -> kernels.Launch:
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        return kernels.Launch(self.library, stream, processors, self.wgmma)

    def matmul(
        self,
        x: Tensor,
        weight: layout.KernelWeight,
        processors: int = 4,
        bias: Tensor | None = None,
        kernel: str | None = None,
    ) -> Tensor:
        return kernels.launch_matmul(self.launch(processors), x, weight, bias, kernel)

    def dequantize(self, weight: layout.KernelWeight, dtype: torch.dtype) -> Tensor:
        return kernels.launch_dequantize(self.launch(), weight, dtype)


def emulated(path: Path) -> Kernels:
    library = kernels.load(path)
    return Kernels(library, "cpu", library.emulation_settings, True)


def on_gpu() -> Kernels:
    wgmma = torch.cuda.get_device_capability() == (9, 0)
    return Kernels(kernels.load(kernels.LIBRARY), "cuda", lambda order, eager: None, wgmma)


def cuda_compiler() -> str | None:
    """nvcc, where there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)
