"""Builds the compiled code beside the package: for CPUs if there is a C++ compiler, for GPUs if
there is nvcc. Without either the package works, but slower."""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("quant_cuda/csrc/cpu")
COMMON = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]
# One file per instruction set, each with its own flags; the code picks one when it runs.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *(*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
    "-mprefer-vector-width=512",
]
# GCC otherwise moves all multiplications of a loop's body before all additions, and their results
# do not fit the registers.
IN_ORDER = ["-fno-tree-ter"]
# +------------------------------------------------------------------------------------------------+
# | The order of the objects matters. The files share headers, so several objects define the same  |
# | inline functions (also those of the C++ library), each compiled with its own flags. The linker |
# | keeps the first definition and drops the others. It must run on every processor on which one   |
# | of its callers runs: portable files come first, then each file after those whose flags it      |
# | includes. A processor without AVX-512 would otherwise die of an illegal instruction in code    |
# | that looks portable. tests/quant_cuda/test_cpu_library.py checks this order.                   |
# +------------------------------------------------------------------------------------------------+
X86_FLAGS = {
    "solver_avx2.cpp": AVX2,
    "product_avx2.cpp": [*AVX2, *IN_ORDER],
    "solver_avx512.cpp": AVX512,
    "product_avx512.cpp": [*AVX512, *IN_ORDER],
    "product_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
}
PORTABLE = (
    *("solver_generic.cpp", "product_generic.cpp"),
    *("tiles.cpp", "reader.cpp", "parallel.cpp", "dispatch.cpp"),
)
# The C++ library is inside, and hidden, because torch may bring another. Its unused parts are left
# out, because they ask for a newer C library.
LINKING = [
    *("-static-libstdc++", "-static-libgcc", "-pthread", "-ldl"),
    *("-Wl,--gc-sections", "-Wl,--exclude-libs,ALL"),
]

CUDA_SOURCES = Path("quant_cuda/csrc/cuda")
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Machine code for each of these, and what drivers of later GPUs compile for themselves; the
# environment variable CUDA_TARGETS names others.
CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "compute_90")

COMPILERS = "the code needs C++17: GCC 11, Clang 14 or later; CXX names the compiler"


def define_digest(part: str) -> str:
    """The flag by which a library knows its sources, see quant_cuda/sources.py."""
    return f"-DQUANT_CUDA_SOURCES={runpy.run_path('quant_cuda/sources.py')['digest'](part)}"


def sources() -> dict[str, list[str]]:
    """The files to compile for this machine, in the order of linking, and the flags of each."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {**{name: [] for name in PORTABLE}, **(X86_FLAGS if x86 else {})}


class BuildNative(build_ext):
    """Compiles to a plain shared library that is loaded through ctypes: it needs no torch to build
    and fits every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "quant_cuda.cuda._cuda":
            build_cuda(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "cuda")
            return
        compiler = os.environ.get("CXX", "c++")
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)

        common = [*COMMON, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        steps = [
            Step(objects / f"{name}.o", [SOURCES / name], [compiler, *common, *flags, "-c"])
            for name, flags in sources().items()
        ]
        next(step for step in steps if step.inputs[0].stem == "dispatch").command.append(
            define_digest("cpu")
        )
        shared = [compiler, *common, "-shared", *LINKING]
        try:
            last = Step(target, [step.output for step in steps], shared)
            build(objects, steps, last, list(SOURCES.glob("*.h")))
        except (OSError, subprocess.CalledProcessError) as error:
            # An optional extension that fails this way is left out, with a warning.
            raise CompileError(
                f"no compiled CPU code ({error}); slower, but all works. {COMPILERS}"
            ) from error


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3: its libraries are loaded through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


@dataclass(frozen=True)
class Step:
    """One call of the compiler."""

    output: Path
    inputs: list[Path]
    command: list[str]

    @property
    def line(self) -> list[str]:
        return [*self.command, *map(str, self.inputs), "-o", str(self.output)]


def build_cuda(target: Path, objects: Path) -> None:
    """Compile the CUDA kernels to a library that is loaded through ctypes. No GPU is needed."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise CompileError("no nvcc in CUDA_HOME or PATH: no CUDA kernels; Triton's serve instead")
    for folder in (target.parent, objects):
        folder.mkdir(parents=True, exist_ok=True)
    # The one GPU that runs sm_90 has all that sm_90a asks for, wgmma.cu's instructions among it.
    named = os.environ.get("CUDA_TARGETS", "").split() or CUDA_TARGETS
    targets = ["sm_90a" if target == "sm_90" else target for target in named]
    targets = [target for target in targets if can_compile(nvcc, target)]
    if not targets:
        raise CompileError(f"{nvcc} knows none of {' '.join(named)}: no CUDA kernels")
    if not any(target.startswith("compute") for target in targets) and named is CUDA_TARGETS:
        targets.append(targets[-1].replace("sm", "compute"))  # for later GPUs
    codes = [code_for(target) for target in targets]
    codes += ["-DQUANT_CUDA_SM90A"] if "sm_90a" in targets else []
    steps = [
        Step(objects / f"{source.stem}.o", [source], [nvcc, *CUDA_FLAGS, *codes, "-c"])
        for source in sorted(CUDA_SOURCES.glob("*.cu"))
    ]
    next(step for step in steps if step.inputs[0].stem == "dequantize").command.append(
        define_digest("cuda")
    )
    headers = [*CUDA_SOURCES.glob("*.cuh"), *CUDA_SOURCES.parent.glob("*.h")]
    try:
        last = Step(target, [step.output for step in steps], [nvcc, "-shared"])
        build(objects, steps, last, headers)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"no CUDA kernels ({error}); Triton's serve instead") from error


def code_for(target: str) -> str:
    """The flag of nvcc for a target, as sm_80 or compute_90."""
    return f"-gencode=arch={target.replace('sm', 'compute')},code={target}"


def can_compile(nvcc: str, target: str) -> bool:
    """Whether this nvcc knows a target; those before 12.0 do not know sm_90a."""
    command = [nvcc, "--dryrun", code_for(target), "-c", str(CUDA_SOURCES / "dequantize.cu")]
    known = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not known:
        print(f"{nvcc} does not know {target}: it is left out")
    return known


def build(folder: Path, steps: list[Step], last: Step, headers: list[Path]) -> None:
    """Run all steps, those but the last at once: by ninja, which leaves out what is up to date."""
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda step: subprocess.run(step.line, check=True), steps))
        subprocess.run(last.line, check=True)
        return
    known = " ".join(sorted(map(str, headers)))
    # Its log goes beside the objects.
    text = [f"builddir = {folder}", "rule run", "  command = $line"]
    for step in [*steps, last]:
        text += [
            f"build {step.output}: run {' '.join(map(str, step.inputs))} | {known}",
            f"  line = {shlex.join(step.line)}",
        ]
    file = folder / "build.ninja"
    file.write_text("\n".join([*text, ""]))
    subprocess.run([ninja, "-f", str(file)], check=True)


setup(
    ext_modules=[
        Extension(
            "quant_cuda.cpu._native",
            sources=[str(SOURCES / name) for name in sources()],
            depends=[str(path) for path in SOURCES.glob("*.h")],
            optional=True,
        ),
        Extension(
            "quant_cuda.cuda._cuda",
            sources=[str(path) for path in CUDA_SOURCES.glob("*.cu")],
            depends=[str(path) for path in CUDA_SOURCES.glob("*.cuh")],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
