"""What nvcc makes of the kernels: registers and spills, which must not grow unnoticed."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import emulated

from quant_cuda.cuda.variants import TILES

RECORD = Path(__file__).parents[1] / "helpers" / "cuda_registers.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
# nvcc releases differ by a few registers.
ALLOWANCE = 8


def kernel_name(mangled: str) -> str:
    """gemv<4,half,0> of a name in an unnamed namespace."""
    name = re.search(r"\d([a-z_]+)(?:I(.*?)EE?v|E)", re.sub(r"^.*?_cu_[0-9a-f]{8}", "", mangled))
    assert name, mangled
    arguments = name[2] or ""
    arguments = re.sub(r"L[ib](\d+)E", r",\1", arguments).replace("6__half", ",half")
    arguments = arguments.replace("13__nv_bfloat16", ",bfloat")
    arguments = re.sub(r"(^|\d,?)f$", r"\1,float", arguments)
    return f"{name[1].lstrip('0123456789')}<{arguments.strip(',')}>"


def registers(nvcc: str, folder: Path, architecture: str) -> dict[str, int]:
    """Registers of each kernel; a spill counts as a thousand more."""
    found: dict[str, int] = {}
    for source in emulated.KERNELS:
        target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", target, "-cubin"]
        made = folder / f"{source.stem}.{architecture}.cubin"
        report = subprocess.run(
            [*command, "-o", str(made), str(source)], capture_output=True, text=True, check=True
        ).stderr
        assert "Performance Loss" not in report, report  # of wgmma, each waiting for the last
        for entry in report.split("Compiling entry function '")[1:]:
            mangled = entry.partition("'")[0]
            # benchmarks/gpu.sh has compute-sanitizer look at kernels with such names alone.
            assert f"_{source.stem}_cu_" in mangled
            used = re.search(r"Used (\d+) registers", entry)
            spilled = re.search(r"(\d+) bytes spill stores", entry)
            assert used, entry
            assert spilled, entry
            spills = int(spilled[1]) > 0
            found[kernel_name(mangled)] = int(used[1]) + 1000 * spills
    return found


@pytest.mark.slow
def test_registers_and_spills(tmp_path):
    """Compile for every architecture; write what was found where nothing is on record."""
    nvcc = emulated.cuda_compiler()
    if nvcc is None:
        pytest.skip("no nvcc here")
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda a: registers(nvcc, tmp_path, a), ARCHITECTURES)
        found = dict(zip(ARCHITECTURES, reports, strict=True))
    (tmp_path / RECORD.name).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    for architecture, kernels in found.items():
        assert set(kernels) == set(known[architecture]), f"see {tmp_path / RECORD.name}"
        for kernel, used in kernels.items():
            limit = known[architecture][kernel] + ALLOWANCE
            assert used <= limit, f"{kernel} takes {used} registers on {architecture}, not {limit}"


def test_every_kernel_is_on_record_without_spills():
    """The source's kernels by name; with -m slow their registers are compared."""
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    sources = emulated.KERNELS[0].parent.glob("*.cu*")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    defined = set(re.findall(r"__global__.*?\n\s+(\w+)\(", text))
    assert defined
    for architecture in ARCHITECTURES:
        assert {name.partition("<")[0] for name in known[architecture]} == defined
        assert all(used <= 255 for used in known[architecture].values())


def test_products_name_their_numbers_in_order():
    """What the emulation has twins of: wgmma's operands, of which %i is the i-th that C++ gives."""
    text = (emulated.KERNELS[0].parent / "ptx_hopper.cuh").read_text(encoding="utf-8")
    count = len(re.findall(r"#define WGMMA_NAMES_\d", text))
    for i in range(count):
        four = ", ".join(f"%{4 * i + j}" for j in range(4))
        names = f'WGMMA_NAMES_{i} ", {four}"' if i else f'"{four}"'
        sums = f"WGMMA_SUMS_{i}, WGMMA_FOUR({4 * i})" if i else "WGMMA_FOUR(0)"
        assert f"#define WGMMA_NAMES_{i + 1} {names}\n" in text
        assert f"#define WGMMA_SUMS_{i + 1} {sums}\n" in text
    made = re.findall(r"^WGMMA\((\d+), .*", text, re.MULTILINE)
    for rows in map(int, made):
        k = rows // 2
        a = ", ".join(f"%{k + i}" for i in range(4))
        assert f'WGMMA({rows}, {rows // 8}, "{a}", "%{k + 4}", "%{k + 5}")\n' in text
    assert {tile[1] for tile in TILES if tile[0].startswith("bulk")} <= set(map(int, made))
